"""Tunings that train weights the model already has; SLoRA's mask against a slow reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.core.state import PhaseHandover, ServerState
from fedlora.core.tree import num_entries
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.recipe.local import AdamW, Local, Sgd
from fedlora.rounds.ledger import RoundRecord
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.testing import equal_population, toy_task
from fedlora.tuning import BitFit, Full, HeadOnly, SparseMask, Tuning
from fedlora.tuning.base import seed_from_tree, seed_to_tree

CPU = torch.device("cpu")
DECAYING = {
    "adamw": AdamW(lr=1e-2, weight_decay=0.1),
    "sgd": Sgd(lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def opened(tuning: Tuning, seed: int = 0, family: str = "bert", **local: Any) -> tuple[Workspace, Recipe, ServerState]:
    workspace = Workspace(toy_task(family, num_examples=16), 0, CPU)
    recipe = Recipe(tuning=tuning, local=Local(**{"batch_size": 4, "dropout": False, **local}))
    state, _ = open_phase(workspace, 0, recipe, seed=seed, rounds_done=0, carry=None)
    return workspace, recipe, state


def turn(workspace: Workspace, recipe: Recipe, state: ServerState, clients: int = 2) -> tuple[ServerState, RoundRecord]:
    engine = Serial(workspace, equal_population(16, clients))
    return run_round(recipe, state, tuple(range(clients)), engine, seed=0, rounds=5)


def snapshot(workspace: Workspace) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in workspace.model.named_parameters()}


# ---- the mask


@pytest.mark.parametrize("density", [0.013, 0.1, 0.5, 1.0])
def test_exactly_the_stated_number_of_positions_in_every_matrix(density: float) -> None:
    workspace, _, state = opened(SparseMask(density=density))
    named = dict(workspace.model.named_parameters())
    assert len(workspace.installed.places) == 2 * 6 + 1  # query, key, value, three dense; the pooler
    for name, index in workspace.installed.places.items():
        assert index.numel() == state.params[name].numel() == int(density * named[name].numel())
        assert len(set(index.tolist())) == index.numel()
        assert 0 <= int(index.min()) <= int(index.max()) < named[name].numel()


def test_a_matrix_too_small_for_the_density_still_moves_in_one_place() -> None:
    workspace, _, _ = opened(SparseMask(density=1e-6))
    assert {index.numel() for index in workspace.installed.places.values()} == {1}


def test_everybody_draws_the_same_mask_from_the_announcement() -> None:
    server, recipe, state = opened(SparseMask(density=0.1))
    device = Workspace(toy_task(), 99, CPU)
    device.apply_setup(0, recipe, state.setup)
    assert list(device.installed.places) == list(server.installed.places)
    assert all(torch.equal(device.installed.places[n], index) for n, index in server.installed.places.items())


def test_masks_differ_by_matrix() -> None:
    places = [i for i in opened(SparseMask(density=0.1))[0].installed.places.values() if i.numel() == 102]
    assert len({tuple(index.tolist()) for index in places}) == len(places) == 9


def test_masks_differ_by_seed() -> None:
    one, other = (opened(SparseMask(density=0.1), seed)[0].installed.places for seed in (0, 1))
    assert not any(torch.equal(index, other[name]) for name, index in one.items())


def test_every_position_is_as_likely_as_every_other() -> None:
    """Rows and columns of a matrix are hit as a binomial law has it: 1024 entries, half of them drawn."""
    workspace, _, _ = opened(SparseMask(density=0.5))
    hits = sum(torch.bincount(i, minlength=1024) for i in workspace.installed.places.values() if i.numel() == 512)
    assert isinstance(hits, Tensor)
    assert hits.sum() == 9 * 512
    for sums in (hits.view(32, 32).sum(0), hits.view(32, 32).sum(1)):
        assert int((sums - 144).abs().max()) < 5 * np.sqrt(288 / 4)


def test_the_mask_does_not_depend_on_the_weights() -> None:
    one, other = opened(SparseMask(density=0.1))[0], Workspace(toy_task(seed=5), 0, CPU)
    open_phase(other, 0, Recipe(tuning=SparseMask(density=0.1)), seed=0, rounds_done=0, carry=None)
    assert all(torch.equal(other.installed.places[n], index) for n, index in one.installed.places.items())


def test_a_seed_travels_exactly() -> None:
    for seed in (0, 1, 2**48 - 1, 123456789012345):
        assert seed_from_tree(seed_to_tree(seed)) == seed


# ---- training under the mask


@pytest.mark.parametrize("optimizer", DECAYING.values(), ids=DECAYING)
def test_weights_off_the_mask_keep_their_bits_under_decay_and_momentum(optimizer: AdamW | Sgd) -> None:
    workspace, recipe, state = opened(SparseMask(density=0.1), optimizer=optimizer, epochs=2)
    before = snapshot(workspace)
    for _ in range(2):
        state, _ = turn(workspace, recipe, state)
    after = snapshot(workspace)
    for name, index in workspace.installed.places.items():
        off = torch.ones(before[name].numel(), dtype=torch.bool)
        off[index] = False
        assert torch.equal(before[name].view(-1)[off], after[name].view(-1)[off])
        assert not torch.equal(before[name].view(-1)[index], after[name].view(-1)[index])


@pytest.mark.parametrize("optimizer", DECAYING.values(), ids=DECAYING)
def test_training_is_that_of_a_dense_model_whose_steps_are_masked(optimizer: AdamW | Sgd) -> None:
    """The reference computes every gradient densely and applies decay, momentum and step on the mask alone."""
    workspace, recipe, state = opened(SparseMask(density=0.2), optimizer=optimizer, epochs=2, shuffle=False)
    places = workspace.installed.places
    task = toy_task(num_examples=16)
    model = task.make_model().eval()
    moving = {name: value for name, value in model.named_parameters() if name in state.params}
    masks = {name: torch.ones(value.numel()) for name, value in moving.items()}
    for name, index in places.items():
        masks[name] = torch.zeros(moving[name].numel()).index_fill(0, index, 1.0)
    memory: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(1, 9):
        model.zero_grad()
        rows = np.arange(4 * ((step - 1) % 4), 4 * ((step - 1) % 4) + 4)
        task.loss(model, task.batch(rows, CPU)).backward()  # type: ignore[no-untyped-call]
        for name, value in moving.items():
            assert value.grad is not None
            mask, w, g = masks[name].view_as(value), value.data, value.grad
            m, v = memory.get(name, (torch.zeros_like(w), torch.zeros_like(w)))
            if isinstance(optimizer, Sgd):
                m = 0.9 * m + g + 0.1 * w
                change = -1e-2 * m
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                change = -1e-2 * (0.1 * w + m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
            memory[name] = (m, v)
            value.data = w + mask * change
    after, _ = turn(workspace, recipe, state, clients=1)
    for name, value in after.params.items():
        expected = moving[name].detach().view(-1)[places[name]] if name in places else moving[name].detach()
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", [{"proximal": 10.0}, {"clip_norm": 1e-3}, {"compute": "bf16"}], ids=str)
def test_other_local_settings_work_on_packed_values(setting: dict[str, Any]) -> None:
    workspace, recipe, state = opened(SparseMask(density=0.1), optimizer=Sgd(lr=0.1), **setting)
    plain, recipe_plain, same = opened(SparseMask(density=0.1), optimizer=Sgd(lr=0.1))
    _, row = turn(workspace, recipe, state)
    _, row_plain = turn(plain, recipe_plain, same)
    assert row.update_norm > 0
    if "compute" in setting:
        assert row.update_norm == pytest.approx(row_plain.update_norm, rel=0.1)
    else:
        assert row.update_norm < 0.9 * row_plain.update_norm


def test_a_second_round_starts_from_the_mean_of_the_first() -> None:
    workspace, recipe, state = opened(SparseMask(density=0.1))
    state, _ = turn(workspace, recipe, state)
    workspace.installed.load(state.params)
    now = snapshot(workspace)
    for name, index in workspace.installed.places.items():
        assert torch.equal(now[name].view(-1)[index], state.params[name])


def test_dense_gradients_do_not_pile_up() -> None:
    workspace, recipe, state = opened(SparseMask(density=0.1))
    turn(workspace, recipe, state)
    named = dict(workspace.model.named_parameters())
    assert all(named[name].grad is None for name in workspace.installed.places)


# ---- bytes


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_values_travel_packed_and_without_indices(density: float) -> None:
    workspace, recipe, state = opened(SparseMask(density=density))
    values = num_entries({name: state.params[name] for name in workspace.installed.places})
    _, row = turn(workspace, recipe, state, clients=1)
    assert 4 * values <= row.down_bytes["adapter"] <= 4 * values + 4
    assert 4 * values <= row.up_bytes["adapter"] <= 4 * values + 4


def test_the_mask_costs_a_seed() -> None:
    workspace, recipe, state = opened(SparseMask(density=0.5))
    _, row = turn(workspace, recipe, state, clients=1)
    assert row.down_bytes["seed"] == state.setup_bytes["seed"] <= 16
    assert len(state.setup) == sum(state.setup_bytes.values()) <= 32


def test_biases_move_whole_if_asked_for() -> None:
    _, _, without = opened(SparseMask(density=0.1))
    _, _, with_biases = opened(SparseMask(density=0.1, biases=True))
    added = with_biases.params.keys() - without.params.keys()
    assert len(added) == 13
    assert all(name.endswith(".bias") for name in added)
    assert with_biases.params["bert.encoder.layer.0.intermediate.dense.bias"].shape == (48,)


# ---- from one phase to the next


def test_changes_put_packed_values_back_at_their_places() -> None:
    workspace, recipe, state = opened(SparseMask(density=0.1))
    before = snapshot(workspace)
    after, _ = turn(workspace, recipe, state)
    changes = recipe.tuning.changes(workspace.installed, state.init, after.params)
    workspace.installed.load(after.params)
    now = snapshot(workspace)
    assert set(changes) == set(workspace.installed.places)
    for name, change in changes.items():
        torch.testing.assert_close(before[name] + change, now[name], atol=1e-6, rtol=0)


def test_what_an_earlier_phase_learnt_is_taken_over_where_the_mask_is() -> None:
    workspace, recipe, state = opened(SparseMask(density=0.5))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    delta = torch.arange(1024.0).view(32, 32)
    carry = PhaseHandover({name: delta}, {"classifier.bias": torch.tensor([1.0, 2.0, 3.0])})
    start = recipe.tuning.start(workspace.installed, seed=4, carry=carry)
    plain = recipe.tuning.start(workspace.installed, seed=4, carry=None)
    taken = start.params[name] - plain.params[name]
    assert start.params["classifier.bias"].tolist() == [1.0, 2.0, 3.0]
    torch.testing.assert_close(taken, taken.round(), atol=1e-4, rtol=0)
    assert len(set(taken.round().tolist())) == 512
    energy = float(taken.square().sum() / delta.square().sum())
    assert start.facts["energy_kept"] == pytest.approx(energy, rel=1e-4)
    assert state.init[name].shape == (512,)


@pytest.mark.parametrize("tuning", [Full(), BitFit()], ids=str)
def test_dense_tunings_take_over_a_change_as_it_is(tuning: Tuning) -> None:
    workspace, _, state = opened(tuning)
    name = "bert.encoder.layer.0.attention.self.query.bias"
    carry = PhaseHandover({name: torch.arange(32.0)}, {"classifier.bias": torch.tensor([1.0, 2.0, 3.0])})
    start = tuning.start(workspace.installed, seed=4, carry=carry)
    assert torch.equal(start.params[name], state.init[name] + torch.arange(32.0))
    assert start.params["classifier.bias"].tolist() == [1.0, 2.0, 3.0]
    assert start.facts == {"energy_kept": 1.0}


# ---- the other subsets


def trained(tuning: Tuning) -> tuple[set[str], set[str], nn.Module]:
    workspace, _, state = opened(tuning)
    adapters, head = ({n for n, g in state.schema.groups.items() if g == group} for group in ("adapter", "head"))
    return adapters, head, workspace.model


def test_full_trains_everything() -> None:
    adapters, head, model = trained(Full())
    assert head == {"classifier.weight", "classifier.bias"}
    assert adapters | head == {name for name, _ in model.named_parameters()}


def test_bitfit_trains_the_biases_and_the_head() -> None:
    adapters, head, model = trained(BitFit())
    assert head == {"classifier.weight", "classifier.bias"}
    assert adapters == {name for name, _ in model.named_parameters() if name.endswith("bias")} - head


def test_head_only_trains_the_head() -> None:
    assert trained(HeadOnly())[:2] == (set(), {"classifier.weight", "classifier.bias"})


def test_head_only_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"head_only would train nothing: Bert.* has no task head"):
        HeadOnly().install(toy_task().make_model(), frozenset(), 0)


@pytest.mark.parametrize("tuning", [Full(), BitFit(), HeadOnly(), SparseMask(density=0.1)], ids=str)
def test_what_is_not_trained_asks_for_no_gradient(tuning: Tuning) -> None:
    workspace, _, state = opened(tuning)
    wanted = {*state.params, *workspace.installed.places}
    assert {name for name, value in workspace.model.named_parameters() if value.requires_grad} == wanted


@pytest.mark.parametrize("tuning", [Full(), BitFit(), HeadOnly(), SparseMask(density=0.1)], ids=str)
def test_a_turn_that_moves_nothing_stops_the_run(tuning: Tuning) -> None:
    workspace, recipe, state = opened(tuning, optimizer=Sgd(lr=1e-45))
    with pytest.raises(TrainingError, match="did not move"):
        turn(workspace, recipe, state)


@pytest.mark.parametrize("tuning", [Full(), SparseMask(density=0.1)], ids=str)
def test_a_turn_without_steps_answers_with_zeros(tuning: Tuning) -> None:
    workspace, recipe, state = opened(tuning)
    recipe = replace(recipe, local=replace(recipe.local, max_steps=0))
    after, row = turn(workspace, recipe, state)
    assert row.update_norm == 0
    assert all(torch.equal(after.params[name], value) for name, value in state.params.items())
