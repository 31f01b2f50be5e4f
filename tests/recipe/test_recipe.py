"""Recipes: what is refused, in one sentence that says what to do instead, and the papers' methods as values."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError
from fedlora.core.rates import LrScale, Schedule
from fedlora.engines import Serial
from fedlora.methods import METHODS, fedavg, federa, flasc, slora
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import AdamW, Local, Sgd
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.server.aggregate import Mean
from fedlora.server.optimizers import AdamW as ServerAdamW
from fedlora.server.optimizers import Sgd as ServerSgd
from fedlora.testing import equal_population, toy_task
from fedlora.transport import BFloat16, Dense, Link, TopK
from fedlora.tuning import (
    BitFit,
    Bottleneck,
    Full,
    HeadOnly,
    Kaiming,
    LoRA,
    Orthogonal,
    Peft,
    SparseMask,
    SvdOfDelta,
    SvdOfWeight,
    Tuning,
)

THIN = Link(sparsify=TopK(density=0.25))
FROM_INIT = Link(sparsify=TopK(density=0.25), reference="init")
NOISE = CentralGaussian(clip_norm=1.0, noise_multiplier=1.0)
# a trained entry that arrives as zero takes pre-trained knowledge away
NOT_NEUTRAL: list[Tuning] = [
    LoRA(init=SvdOfWeight()),
    LoRA(init=SvdOfDelta()),
    LoRA(init=SvdOfDelta(fold="rest")),
    SparseMask(),
    Full(),
    BitFit(),
    Peft(config={"peft_type": "IA3"}),
]
NEUTRAL: list[Tuning] = [LoRA(), LoRA(init=Orthogonal()), Bottleneck()]


# ---- refusals


@pytest.mark.parametrize("tuning", NOT_NEUTRAL, ids=str)
def test_a_sparse_downlink_of_pre_trained_knowledge_is_refused_and_the_way_out_works(tuning: Any) -> None:
    with pytest.raises(ConfigError, match=r"set down\.reference = 'init'"):
        Recipe(tuning=tuning, down=THIN)
    assert Recipe(tuning=tuning, down=FROM_INIT).down.reference == "init"


@pytest.mark.parametrize("tuning", NEUTRAL, ids=str)
def test_a_sparse_downlink_is_taken_where_zero_is_neutral(tuning: Any) -> None:
    assert Recipe(tuning=tuning, down=THIN).down == THIN


@pytest.mark.parametrize("tuning", NOT_NEUTRAL + NEUTRAL, ids=str)
def test_a_sparse_uplink_and_a_dense_downlink_are_taken_everywhere(tuning: Any) -> None:
    assert Recipe(tuning=tuning, up=THIN).down.sparsify == Dense()


@pytest.mark.parametrize("tuning", NEUTRAL, ids=str)
def test_zero_is_neutral_as_claimed(tuning: Any) -> None:
    """Whatever adapter entries arrive as zero at the start, the function is the pre-trained one."""
    small = replace(tuning, **({"width": 4} if isinstance(tuning, Bottleneck) else {"rank": 4}))
    task = toy_task(num_examples=8)
    workspace = Workspace(task, 0, torch.device("cpu"))
    state, _ = open_phase(workspace, 0, Recipe(tuning=small), seed=0, rounds_done=0, carry=None)
    mask = torch.Generator().manual_seed(1)
    sent = {
        name: value * (torch.rand(value.shape, generator=mask) < 0.3)
        if state.schema[name].group == "adapter"
        else value
        for name, value in state.params.items()
    }
    workspace.installed.load(sent)
    batch = task.batch(task.labels, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = (task.loss(model.eval(), batch) for model in (workspace.model, task.make_model()))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_an_uplink_that_counts_from_the_init_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leave up\.reference at 'zero'"):
        Recipe(up=Link(reference="init"))


def test_noise_under_example_weighting_is_refused_and_the_way_out_works() -> None:
    with pytest.raises(ConfigError, match=r"and aggregator\.weighting = 'uniform'"):
        Recipe(privacy=NOISE, aggregator=Mean(weighting="examples"))
    assert Recipe(privacy=NOISE, aggregator=Mean(weighting="uniform")).privacy == NOISE


def test_example_weighting_without_noise_is_taken() -> None:
    assert Recipe(aggregator=Mean(weighting="examples")).aggregator.weighting == "examples"


@pytest.mark.parametrize(
    "build",
    [
        lambda: Recipe(tuning=Full(), down=THIN),
        lambda: Recipe(up=Link(reference="init")),
        lambda: Recipe(privacy=NOISE, aggregator=Mean(weighting="examples")),
        lambda: slora(rounds=3, warm_rounds=3),
    ],
)
def test_a_refusal_is_one_sentence(build: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    text = str(caught.value)
    assert "\n" not in text
    assert ". " not in text
    assert ";" in text  # what is wrong; what to do


# ---- values


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().memory = "init"  # type: ignore[misc]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Recipe(tunning=LoRA()),  # type: ignore[call-arg]
        lambda: LoRA(ranks=4),  # type: ignore[call-arg]
        lambda: LoRA(rank=0),
        lambda: LoRA(alpha=0.0),
        lambda: LoRA(alpha=float("nan")),
        lambda: LoRA(dropout=1.0),
        lambda: SparseMask(density=0.0),
        lambda: SparseMask(density=1.1),
        lambda: Bottleneck(width=0),
        lambda: Phase(rounds=0),
        lambda: Local(epochs=0),
        lambda: Local(batch_size=0),
        lambda: ServerSgd(lr=-1.0),
        lambda: ServerSgd(momentum=1.0),
        lambda: Recipe(memory="everything"),  # type: ignore[arg-type]
    ],
)
def test_unknown_fields_and_impossible_values_are_refused(build: Any) -> None:
    with pytest.raises(ValidationError):
        build()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_value_that_survives_json(name: str) -> None:
    phases = METHODS[name]()
    assert phases == METHODS[name]()
    adapter = TypeAdapter(tuple[Phase, ...])
    assert adapter.validate_json(adapter.dump_json(phases)) == phases
    assert sum(phase.rounds for phase in phases) == 40


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_rounds(name: str) -> None:
    assert sum(phase.rounds for phase in METHODS[name](rounds=12)) == 12


def test_flasc_is_lora_with_two_sparse_links_and_adamw_on_the_server() -> None:
    (phase,) = flasc(down=0.25, up=0.5, rank=4)
    recipe = phase.recipe
    assert recipe.tuning == LoRA(rank=4, alpha=16.0, init=Kaiming())
    assert (recipe.down, recipe.up) == (
        Link(sparsify=TopK(density=0.25), reference="init"),
        Link(sparsify=TopK(density=0.5)),
    )
    assert recipe.server == ServerAdamW(lr=5e-3, weight_decay=0.0, lr_scale=LrScale(head=10.0))
    assert recipe.aggregator == Mean(weighting="uniform")


def test_flasc_at_density_one_is_dense() -> None:
    (phase,) = flasc(down=1.0, up=1.0)
    assert (phase.recipe.down, phase.recipe.up) == (Link(reference="init"), Link())


def test_flasc_over_an_svd_start_never_sends_raw_weights_thinned() -> None:
    try:
        (phase,) = flasc(init="svd_of_weight")
    except ConfigError:
        (phase,) = flasc(init="svd_of_weight", reference="init")
    assert phase.recipe.tuning == LoRA(init=SvdOfWeight())
    assert (phase.recipe.down.reference, phase.recipe.up.reference) == ("init", "zero")


def test_federa_is_lora_that_starts_at_the_svd_of_the_weights() -> None:
    (phase,) = federa(rank=4, alpha=8.0)
    tuning = LoRA(rank=4, alpha=8.0, init=SvdOfWeight(split="symmetric"))
    assert phase.recipe == Recipe(tuning=tuning, server=phase.recipe.server)
    assert phase.recipe.server.weight_decay == 0  # type: ignore[attr-defined]
    assert phase.recipe.local.optimizer.weight_decay == 0  # decay would pull pre-trained knowledge to zero


def test_slora_is_a_sparse_mask_and_then_lora_from_the_svd_of_the_delta() -> None:
    warm, rest = slora(rounds=10, warm_rounds=4, rank=8, density=0.05, mask_targets="all-linear")
    assert (warm.rounds, rest.rounds) == (4, 6)
    assert warm.recipe.tuning == SparseMask(density=0.05, targets="all-linear")
    assert rest.recipe.tuning == LoRA(rank=8, init=SvdOfDelta())
    warm, rest = slora(rounds=10, rank=8)
    assert (warm.rounds, warm.recipe.tuning) == (2, SparseMask(rank=8, targets="default"))


def test_a_mask_is_as_large_as_a_lora_of_its_rank_or_a_share_of_the_matrix() -> None:
    assert SparseMask(rank=2).entries(10, 6) == 32
    assert SparseMask(rank=8).entries(10, 6) == 60
    assert SparseMask(density=0.5).entries(10, 6) == 30
    assert SparseMask().entries(20, 30) == 6
    with pytest.raises(ConfigError, match=r"follows from density = 0\.1 or from rank = 2, not from both"):
        SparseMask(density=0.1, rank=2)


def test_precision_goes_to_both_links() -> None:
    for name in ("lora", "flasc", "federa", "slora", "primed_lora"):
        for phase in METHODS[name](precision=BFloat16()):
            assert phase.recipe.down.precision == phase.recipe.up.precision == BFloat16()


# ---- a client's turn


def test_the_schedule_by_hand() -> None:
    assert [Schedule().factor(r, 4) for r in range(4)] == [1, 1, 1, 1]
    assert [Schedule(shape="linear").factor(r, 4) for r in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [Schedule(shape="cosine").factor(r, 4) for r in (0, 2)] == pytest.approx([1, 0.5])
    assert [Schedule(warmup=0.5).factor(r, 4) for r in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_no_round_trains_with_a_rate_of_zero_or_above_one(shape: Any, warmup: float, rounds: int) -> None:
    factors = [Schedule(shape=shape, warmup=warmup).factor(r, rounds) for r in range(rounds)]
    assert min(factors) > 0
    assert max(factors) <= 1


@pytest.mark.parametrize(
    "ours", [Sgd(lr=0.2, momentum=0.5, weight_decay=0.1), AdamW(lr=0.2, weight_decay=0.1)], ids=str
)
def test_client_optimisers_are_those_of_torch_with_the_factor_on_the_rate(ours: Any) -> None:
    one, other = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    theirs = (
        torch.optim.SGD([other], lr=0.1, momentum=0.5, weight_decay=0.1)
        if isinstance(ours, Sgd)
        else torch.optim.AdamW([other], lr=0.1, weight_decay=0.1)
    )
    built = ours.build([one], [0.5])
    for step in range(3):
        for parameter, optimizer in ((one, built), (other, theirs)):
            parameter.grad = torch.tensor([1.0, 0.5]) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_the_proximal_term_is_added_to_every_gradient(mu: float) -> None:
    """``x = x - lr (g(x) + mu (x - x_start))``, step by step."""
    task, device = toy_task(num_examples=16), torch.device("cpu")
    local = Local(
        optimizer=Sgd(lr=0.1, momentum=0.0), batch_size=4, dropout=False, shuffle=False, proximal=mu, epochs=2
    )
    (phase,) = fedavg(tuning=HeadOnly(), local=local)
    workspace = Workspace(task, 0, device)
    state, _ = open_phase(workspace, 0, phase.recipe, seed=0, rounds_done=0, carry=None)
    engine = Serial(workspace, equal_population(16, 1))
    after, _ = run_round(phase.recipe, state, (0,), engine, seed=0, rounds=1)
    model = task.make_model().eval()
    head = {name: value for name, value in model.named_parameters() if name in state.params}
    for step in range(8):
        model.zero_grad()
        task.loss(model, task.batch(np.arange(16)[step % 4 * 4 :][:4], device)).backward()  # type: ignore[no-untyped-call]
        for name, value in head.items():
            assert value.grad is not None
            value.data = value.data - 0.1 * (value.grad + mu * (value.data - state.params[name]))
    for name, value in head.items():
        torch.testing.assert_close(after.params[name], value.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.5, 1.0)])
def test_noise_reaches_every_coordinate_and_the_clip_every_client(rates: tuple[float, float]) -> None:
    down, up = rates
    (phase,) = flasc(
        rank=2, down=down, up=up, privacy=CentralGaussian(clip_norm=1e-3, noise_multiplier=0.0), server=ServerSgd()
    )
    noisy = replace(phase.recipe, privacy=CentralGaussian(clip_norm=1e-3, noise_multiplier=1.0))
    norms = []
    for recipe in (phase.recipe, noisy):
        workspace = Workspace(toy_task(num_examples=16), 0, torch.device("cpu"))
        state, _ = open_phase(workspace, 0, recipe, seed=0, rounds_done=0, carry=None)
        after, row = run_round(recipe, state, (0, 1), Serial(workspace, equal_population(16, 2)), seed=0, rounds=1)
        moved = {name: after.params[name] - value for name, value in state.params.items()}
        norms.append(row.update_norm)
    assert norms[0] <= 1e-3 * (1 + 1e-5)
    # z C / n = 0.5e-3 on each of the P coordinates
    count = sum(value.numel() for value in moved.values())
    assert norms[1] == pytest.approx(0.5e-3 * count**0.5, rel=0.15)
    assert sum(int((value == 0).sum()) for value in moved.values()) < 0.02 * count


def test_head_only_is_a_recipe_like_any_other() -> None:
    assert Recipe(tuning=HeadOnly(), up=THIN).tuning == HeadOnly()
