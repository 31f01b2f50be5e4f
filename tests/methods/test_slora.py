"""SLoRA (arXiv 2308.06522, Sec. 3): the hand-over from the sparse phase to LoRA, equation by equation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.toy import num_nonzero
from torch import Tensor

from fedlora.client.workspace import Workspace
from fedlora.core import tree
from fedlora.core.errors import ConfigError
from fedlora.core.state import PhaseHandover, ServerState
from fedlora.engines import Serial
from fedlora.methods import Phases, primed_lora, slora
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.downlink import view
from fedlora.rounds.ledger import RoundRecord
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.rounds.round import run_round
from fedlora.server.optimizers import Adam
from fedlora.server.optimizers import Sgd as ServerSgd
from fedlora.testing import FAMILIES, TensorTask, equal_population, toy_task
from fedlora.tuning import Bottleneck, Full, HeadOnly, LoRA, SparseMask, SvdOfWeight
from fedlora.tuning.lora import lora_layers

CPU = torch.device("cpu")
LOCAL = Local(optimizer=Sgd(lr=0.1), batch_size=4, dropout=False)
QUERY = "bert.encoder.layer.0.attention.self.query"
TARGETS = ("query", "value")


def phases_of(**settings: Any) -> Phases:
    return slora(
        **{
            "rounds": 2,
            "warm_rounds": 1,
            "rank": 3,
            "alpha": 12.0,
            "density": 0.3,
            "local": LOCAL,
            "server": ServerSgd(),
            "mask_targets": "all-linear",
            **settings,
        }
    )


def rounds_of(workspace: Workspace, phases: Phases, phase: int, state: ServerState) -> tuple[ServerState, RoundRecord]:
    engine = Serial(workspace, equal_population(16, 2))
    for _ in range(phases[phase].rounds):
        state, row = run_round(phases[phase].recipe, state, (0, 1), engine, seed=0, rounds=2)
    return state, row


def logits(task: TensorTask, workspace: Workspace) -> Tensor:
    batch = task.batch(np.arange(16), CPU)
    batch.pop("labels")
    with torch.no_grad():
        return workspace.model.eval()(**batch).logits  # type: ignore[no-any-return]


class HandOver:
    """A first phase, and the second one just opened."""

    def __init__(self, phases: Phases, family: str = "bert") -> None:
        self.task = toy_task(family, num_examples=16)
        self.workspace = Workspace(self.task, 0, CPU)
        warm, cold = (phase.recipe for phase in phases[:2])
        state, _ = open_phase(self.workspace, 0, warm, seed=0, rounds_done=0, carry=None)
        self.warm, _ = rounds_of(self.workspace, phases, 0, state)
        self.workspace.installed.load(self.warm.params)
        self.last_logits = logits(self.task, self.workspace)
        self.trained = {n: v.detach().clone() for n, v in self.workspace.model.named_parameters()}
        self.carry: PhaseHandover = close_phase(self.workspace, warm, self.warm)
        self.state, self.facts = open_phase(self.workspace, 1, cold, 0, self.warm.round, self.carry)
        self.workspace.installed.load(view(cold, self.state, 0))
        self.pretrained = dict(self.task.make_model().named_parameters())

    def product(self, name: str) -> Tensor:
        layer = lora_layers(self.workspace.model)[name]
        return layer.scale * self.state.params[f"{name}.lora_B"] @ self.state.params[f"{name}.lora_A"]


def best(source: Tensor, rank: int) -> Tensor:
    left, values, right = np.linalg.svd(source.double().numpy(), full_matrices=False)
    return torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank]).float()


# ---- what is carried


def test_the_delta_is_what_the_weights_moved_by() -> None:
    over = HandOver(phases_of())
    assert set(over.carry.delta) == {n for n in over.warm.params if over.warm.schema[n].group == "adapter"}
    for name, delta in over.carry.delta.items():
        moved = over.trained[name] - over.pretrained[name].detach()
        assert bool(moved.any())
        torch.testing.assert_close(delta, moved, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 3, 32])
@pytest.mark.parametrize("split", ["symmetric", "left"])
def test_w0_plus_scale_b_a_is_w0_plus_the_best_part_of_the_delta(rank: int, split: str) -> None:
    over = HandOver(phases_of(rank=rank, split=split))
    for name, layer in lora_layers(over.workspace.model).items():
        expected = over.pretrained[f"{name}.weight"].detach() + best(over.carry.delta[f"{name}.weight"], rank)
        torch.testing.assert_close(layer.matrix() + over.product(name), expected, atol=1e-5, rtol=0)


def test_the_transposed_matrices_of_gpt2_are_handed_over_in_their_orientation() -> None:
    over = HandOver(phases_of(), "gpt2")
    name = "transformer.h.1.attn.c_attn"
    torch.testing.assert_close(over.product(name), best(over.carry.delta[f"{name}.weight"].T, 3), atol=1e-5, rtol=0)


def test_the_base_is_the_pre_trained_one_again() -> None:
    over = HandOver(phases_of())
    for name, value in over.workspace.model.named_parameters():
        if name not in over.state.params:
            assert torch.equal(value, over.pretrained[name])


def test_the_head_is_carried() -> None:
    over = HandOver(phases_of())
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(over.state.params[name], over.warm.params[name])
        assert not torch.equal(over.state.params[name], over.pretrained[name])


def test_server_and_client_optimisers_start_anew() -> None:
    local = Local(optimizer=Sgd(lr=0.1), batch_size=4, keep_optimizer=True)
    over = HandOver(phases_of(server=Adam(), local=local, warm_local=local, memory="init"))
    assert over.warm.parts.store("server").trees
    assert over.warm.clients[0].parts.tree("optimizer", "state")
    assert (over.state.parts, over.state.clients, over.state.steps) == ({}, {}, 0)
    assert (over.state.phase, over.state.round) == (1, 1)


def test_the_energy_kept_is_reported() -> None:
    over = HandOver(phases_of())
    kept = sum(float(over.product(name).square().sum()) for name in lora_layers(over.workspace.model))
    total = tree.norm(over.carry.delta) ** 2
    assert over.facts == {"energy_kept": pytest.approx(kept / total, rel=1e-4)}
    assert 0 < over.facts["energy_kept"] < 1


def test_everything_is_kept_where_the_rank_is_full_and_nothing_else_moved() -> None:
    over = HandOver(phases_of(rank=32, targets=TARGETS, mask_targets=TARGETS))
    assert over.facts["energy_kept"] == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(logits(over.task, over.workspace), over.last_logits, atol=1e-4, rtol=0)


def test_a_larger_rank_keeps_more() -> None:
    kept = [HandOver(phases_of(rank=rank)).facts["energy_kept"] for rank in (1, 4, 16)]
    assert kept == sorted(kept)
    assert len(set(kept)) == 3


def test_a_matrix_the_first_phase_left_alone_starts_as_kaiming() -> None:
    over = HandOver(phases_of(mask_targets=("value",)))
    assert not over.state.params[f"{QUERY}.lora_B"].any()
    assert bool(over.state.params[f"{QUERY}.lora_A"].any())


# ---- folds


@pytest.mark.parametrize(
    "phases",
    [
        phases_of(fold="rest"),
        phases_of(fold="rest", biases=True, split="left"),
        phases_of(fold="rest", targets=("intermediate.dense",), mask_targets=TARGETS),
        primed_lora(rounds=2, warm_rounds=1, rank=3, alpha=12.0, fold="rest", local=LOCAL, warm_local=LOCAL),
    ],
    ids=["slora", "biases", "other matrices", "primed"],
)
def test_folding_the_rest_goes_on_from_the_last_model_exactly(phases: Phases) -> None:
    over = HandOver(phases)
    fresh = Workspace(over.task, 0, CPU)
    fresh.open(0, phases[0].recipe)
    assert float((logits(over.task, fresh) - over.last_logits).abs().max()) > 1e-2
    torch.testing.assert_close(logits(over.task, over.workspace), over.last_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["albert", "gpt2", "qwen3"])
def test_folding_the_rest_is_exact_where_matrices_are_shared_or_transposed(family: str) -> None:
    over = HandOver(phases_of(fold="rest", biases=True), family)
    torch.testing.assert_close(logits(over.task, over.workspace), over.last_logits, atol=1e-4, rtol=0)


def test_without_a_fold_the_model_is_another_one() -> None:
    over = HandOver(phases_of())
    assert float((logits(over.task, over.workspace) - over.last_logits).abs().max()) > 1e-2


def test_biases_that_were_trained_are_folded_and_matrices_are_not() -> None:
    over = HandOver(phases_of(biases=True))
    now = dict(over.workspace.model.named_parameters())
    assert phases_of(biases=True)[1].recipe.tuning.init.fold == "biases"  # type: ignore[union-attr]
    for name in over.carry.delta:
        expected = over.trained[name] if name.endswith(".bias") else over.pretrained[name]
        torch.testing.assert_close(now[name], expected, atol=1e-6, rtol=0)


def test_biases_that_were_not_trained_are_not_folded_nor_announced() -> None:
    over = HandOver(phases_of())
    assert phases_of()[1].recipe.tuning.init.fold == "none"  # type: ignore[union-attr]
    assert "fold" not in over.state.setup_bytes


@pytest.mark.parametrize("fold", ["biases", "rest"])
def test_a_fold_is_billed_and_a_client_that_receives_it_settles_alike(fold: str) -> None:
    phases = phases_of(biases=True, fold=fold)
    over = HandOver(phases)
    device = Workspace(over.task, 5, CPU)
    device.apply_setup(1, phases[1].recipe, over.state.setup)
    theirs = dict(device.model.named_parameters())
    for name, value in over.workspace.model.named_parameters():
        if name not in over.state.params:
            assert torch.equal(value, theirs[name])
    _, row = rounds_of(over.workspace, phases, 1, over.state)
    assert row.down_bytes["fold"] == 2 * over.state.setup_bytes["fold"] > 0


def test_the_rest_costs_what_moved_and_not_the_whole_model() -> None:
    over = HandOver(phases_of(fold="rest", density=0.01))
    moved = num_nonzero(over.carry.delta)
    entries = sum(value.numel() for value in over.pretrained.values())
    positions = entries * -(0.01 * math.log2(0.01) + 0.99 * math.log2(0.99)) / 8
    assert over.state.setup_bytes["fold"] < 4 * moved + positions + 100


@pytest.mark.parametrize("fold", ["none", "biases", "rest"])
def test_what_the_second_phase_changed_counts_from_the_pre_trained_weights(fold: str) -> None:
    """So that a third phase, or an export, loses nothing."""
    phases = phases_of(fold=fold, biases=True)
    over = HandOver(phases)
    state, _ = rounds_of(over.workspace, phases, 1, over.state)
    changes = close_phase(over.workspace, phases[1].recipe, state).delta
    over.workspace.installed.load(state.params)
    now = dict(over.workspace.model.named_parameters())
    layers = lora_layers(over.workspace.model)
    for name, before in over.pretrained.items():
        if name in over.state.params:
            continue
        after = now[name].detach()
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in layers:
            layer = layers[module]
            after = after + layer.scale * state.params[f"{module}.lora_B"] @ state.params[f"{module}.lora_A"]
        torch.testing.assert_close(before.detach() + changes.get(name, torch.zeros(())), after, atol=1e-5, rtol=0)


# ---- whole methods


@pytest.mark.parametrize("family", FAMILIES)
def test_both_phases_train_in_every_family(family: str) -> None:
    phases = phases_of(biases=True)
    over = HandOver(phases, family)
    state, row = rounds_of(over.workspace, phases, 1, over.state)
    assert (row.phase, row.round) == (1, 2)
    assert math.isfinite(row.loss)
    adapters = [name for name, group in state.schema.groups.items() if group == "adapter"]
    assert all(not torch.equal(state.params[name], over.state.params[name]) for name in adapters)
    assert 0 < over.facts["energy_kept"] < 1


def test_primed_lora_hands_over_from_full_fine_tuning() -> None:
    phases = primed_lora(rounds=2, warm_rounds=1, rank=3, alpha=12.0, local=LOCAL, warm_local=LOCAL)
    over = HandOver(phases)
    assert isinstance(phases[0].recipe.tuning, Full)
    assert set(over.carry.delta) | set(over.carry.head) == set(over.pretrained)
    expected = best(over.trained[f"{QUERY}.weight"] - over.pretrained[f"{QUERY}.weight"].detach(), 3)
    torch.testing.assert_close(over.product(QUERY), expected, atol=1e-5, rtol=0)


def test_a_dense_mask_learns_what_full_fine_tuning_of_those_matrices_would() -> None:
    """At density one the mask's order does not matter, so two seeds agree."""
    one, other = (SparseMask(density=1.0) for _ in range(2))
    results = []
    for tuning, seed in ((one, 0), (other, 1)):
        workspace = Workspace(toy_task(num_examples=16), 0, CPU)
        recipe = phases_of()[0].recipe.__class__(tuning=tuning, local=Local(batch_size=4, dropout=False, shuffle=False))
        state, _ = open_phase(workspace, 0, recipe, seed=seed, rounds_done=0, carry=None)
        state, _ = run_round(recipe, state, (0,), Serial(workspace, equal_population(16, 1)), seed=seed, rounds=1)
        results.append(tuning.changes(workspace.installed, state.init, state.params))
    for name, change in results[0].items():
        torch.testing.assert_close(change, results[1][name], atol=1e-6, rtol=0)


def test_the_first_phase_sends_fewer_bytes_than_the_model_and_the_second_those_of_lora() -> None:
    phases = phases_of(density=0.01)
    over = HandOver(phases)
    _, row = rounds_of(over.workspace, phases, 1, over.state)
    factors = sum(v.numel() for n, v in over.state.params.items() if over.state.schema[n].group == "adapter")
    assert 2 * 4 * factors <= row.up_bytes["adapter"] <= 2 * (4 * factors + 8)


@pytest.mark.parametrize("make", [slora, primed_lora])
def test_a_first_phase_that_leaves_no_round_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="make it smaller"):
        make(rounds=5, warm_rounds=5)


@pytest.mark.parametrize("make", [slora, primed_lora])
def test_rounds_count_both_phases(make: Any) -> None:
    assert [phase.rounds for phase in make(rounds=7, warm_rounds=2)] == [2, 5]


# ---- starts that do not take over


def test_a_start_that_does_not_look_at_the_delta_keeps_no_energy() -> None:
    for tuning in (LoRA(rank=3), LoRA(rank=3, init=SvdOfWeight()), HeadOnly()):
        over = HandOver(
            (phases_of()[0], phases_of()[1].__class__(recipe=phases_of()[1].recipe.__class__(tuning=tuning)))
        )
        assert over.facts == {"energy_kept": 0.0}


def test_lora_after_a_bottleneck_is_refused() -> None:
    recipe = phases_of()[0].recipe.__class__(tuning=Bottleneck(width=2), local=LOCAL)
    with pytest.raises(ConfigError, match="use `lora`"):
        HandOver((phases_of()[0].__class__(recipe=recipe, rounds=1), phases_of()[1]))
