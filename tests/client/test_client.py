"""A client's turn."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import experiment, tiny_world
from fixtures.toy import LOCAL, Federation

import fedlora
from fedlora.client.jobs import Job, Reply
from fedlora.client.training import train
from fedlora.client.turn import close_turn, decoded, open_turn
from fedlora.client.workspace import Workspace
from fedlora.core.tree import Tree, flatten
from fedlora.engines import Serial
from fedlora.methods import fedavg, het_lora
from fedlora.recipe import Recipe
from fedlora.recipe.local import AdamW, Local, Schedule, Sgd
from fedlora.rounds.phases import open_phase
from fedlora.rounds.plan import make_plan
from fedlora.testing import TensorTask, toy_task
from fedlora.transport import Link, TopK
from fedlora.tuning import BitFit, Bottleneck, Full, LoRA, SparseMask

world = pytest.fixture(scope="module")(tiny_world)


@pytest.mark.parametrize("tuning", [LoRA(rank=4), Full(), BitFit(), SparseMask(density=0.2), Bottleneck(width=4)])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(tuning: LoRA) -> None:
    gradients = {}
    for compute in ("fp32", "bf16"):
        task = toy_task(num_examples=12)
        workspace = Workspace(task, 0, torch.device("cpu"))
        recipe = Recipe(tuning=tuning, local=Local(compute=compute))
        state, _ = open_phase(workspace, 0, recipe, seed=0, rounds_done=0, carry=None)
        noise = torch.Generator().manual_seed(1)
        workspace.installed.load({k: v + 0.05 * torch.randn(v.shape, generator=noise) for k, v in state.params.items()})
        workspace.model.eval()
        with workspace.autocast(compute):
            loss = task.loss(workspace.model, task.batch(task.labels.argsort(), workspace.device))
        loss.backward()
        parameters = workspace.installed.parameters
        gradients[compute] = flatten(
            {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in parameters.items()}
        )
    assert float(torch.cosine_similarity(gradients["fp32"], gradients["bf16"], dim=0)) > 0.99


def test_a_model_is_gone_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    task, recipe = toy_task(), Recipe(tuning=SparseMask(density=0.2))
    workspace = Workspace(task, 0, torch.device("cpu"))
    open_phase(workspace, 0, recipe, 0, 0, None)
    weight = weakref.ref(next(workspace.model.parameters()))
    load, held = task.load_model, []

    def noted(*given: Any) -> Any:
        held.append(weight() is not None)
        return load(*given)

    monkeypatch.setattr(task, "load_model", noted)
    gc.disable()
    try:
        open_phase(workspace, 1, recipe, 0, 0, None)
    finally:
        gc.enable()
    assert held == [False]


def test_what_is_trained_stays_in_float32_and_what_is_frozen_does_not() -> None:
    workspace = Workspace(toy_task(), 0, torch.device("cpu"))
    open_phase(workspace, 0, Recipe(tuning=LoRA(rank=2), local=Local(compute="bf16")), 0, 0, None)
    dtypes = {name: value.dtype for name, value in workspace.model.named_parameters()}
    trained = workspace.installed.parameters
    assert {dtypes[name] for name in trained} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in trained} == {torch.bfloat16}


def test_a_schedule_runs_over_the_whole_run_and_never_starts_again() -> None:
    cosine = [Schedule(shape="cosine").factor(done, 10) for done in range(10)]
    assert cosine[0] == 1.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[-1] > 0
    assert [round(Schedule(shape="linear").factor(done, 4), 2) for done in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert Schedule(warmup=0.5).factor(0, 4) == pytest.approx(1 / 3)
    assert Schedule(warmup=0.5).factor(2, 4) == 1.0


@pytest.mark.parametrize("optimizer", ["{kind='sgd',lr=0.1}", "{kind='adamw',lr=0.01}"])
@pytest.mark.parametrize("mode", ["mode='centralised'", "method.memory='init'"])
def test_a_factor_that_begins_to_move_later_joins_what_is_remembered(
    world: Path, tmp_path: Path, optimizer: str, mode: str
) -> None:
    chosen = [f"method.local.optimizer={optimizer}", "method.local.keep_optimizer=true", "method.memory='init'", mode]
    rolora = "method.tuning={kind='lora',rank=4,train='alternate'}"
    result = fedlora.run(experiment(world, "bitfit", rolora, *chosen, rounds=3), tmp_path / "run")
    assert all(row.update_norm > 0 for row in result.rows[1:])


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.1), AdamW(lr=0.01)], ids=["sgd", "adamw"])
def test_weights_that_lie_otherwise_in_memory_are_trained_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, optimizer: Sgd | AdamW
) -> None:
    local = Local(optimizer=optimizer, batch_size=8, dropout=False)

    def trained() -> Tree:
        federation = Federation(fedavg(rounds=2, tuning=Full(), local=local))
        return federation.go_on(federation.start(), 2).params

    expected = trained()
    load = TensorTask.load_model

    def transposed(*arguments: Any) -> Any:
        model, head = load(*arguments)
        for value in model.parameters():
            if value.ndim == 2:
                value.data = value.data.t().contiguous().t()
        return model, head

    monkeypatch.setattr(TensorTask, "load_model", transposed)
    found = trained()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


class Together(Serial):
    """Opens the turns of a whole cohort, trains them, and closes them, the last one first."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        turns = [open_turn(job, self.workspace, self.population.rows_of(job.client)) for job in jobs]
        ended = list(zip(turns, train(self.workspace, turns), strict=True))
        return reversed([close_turn(ready, trained) for ready, trained in reversed(ended)])


SPARSE = Link(sparsify=TopK(density=0.3), feedback=True)


@pytest.mark.parametrize(
    "phases",
    [
        fedavg(rounds=3, local=Local(keep_optimizer=True), up=SPARSE, memory="last_round"),
        het_lora(rounds=3, rank=8, local=LOCAL),
    ],
    ids=["memory", "ranks"],
)
def test_turns_of_a_cohort_can_be_taken_together(phases: Any) -> None:
    one, other = Federation(phases), Federation(phases)
    other.engine = Together(other.workspace, other.engine.population)
    found, expected = (each.go_on(each.start(), 3) for each in (other, one))
    assert all(torch.equal(value, expected.params[name]) for name, value in found.params.items())
    assert [row.up_bytes for row in other.rows] == [row.up_bytes for row in one.rows]


@pytest.mark.parametrize("same", [True, False])
def test_a_turn_shares_the_parameters_of_its_process_only_if_they_are_what_was_sent(same: bool) -> None:
    federation = Federation(fedavg(rounds=1, local=LOCAL))
    state = federation.start()
    (job,) = make_plan(federation.phases[0].recipe, state, (0,), {}, 0, 1).hand_over()
    assert job.start is not None
    if not same:
        job = job._replace(start={name: value + 1 for name, value in job.start.items()})
    found = decoded(job, federation.workspace)
    assert found.payload == b""
    assert found.start is not None
    assert all((value is state.params[name]) is same for name, value in found.start.items())
    assert all(torch.equal(value, state.params[name]) for name, value in found.start.items())


@pytest.mark.parametrize("density", [0.25, 0.04])
@pytest.mark.parametrize("factors", ["both", "B", "alternate"])
def test_a_density_is_a_share_of_what_is_trained(factors: Any, density: float) -> None:
    sparse = Link(sparsify=TopK(density=density))
    down = replace(sparse, reference="init")
    federation = Federation(fedavg(rounds=4, tuning=LoRA(rank=4, train=factors), up=sparse, down=down, local=LOCAL))
    state = federation.go_on(federation.start(), 4)
    entries = {
        factor: sum(state.params[name].numel() for name, leaf in state.schema.items() if leaf.factor == factor)
        for factor in ("A", "B", "")
    }
    for turn, row in enumerate(federation.rows):
        moving = {"both": "AB", "B": "B", "alternate": "BA"[turn % 2]}[factors]
        trained = entries[""] + sum(entries[factor] for factor in moving)
        assert row.density_up * sum(entries.values()) == pytest.approx(int(density * trained))
        # a factor that was frozen in this round moved in an earlier one
        sent = trained if factors == "B" else sum(entries.values())
        assert row.density_down * sum(entries.values()) <= int(density * sent) + 1e-6
