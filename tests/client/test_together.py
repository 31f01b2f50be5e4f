"""Per-example gradients of a batch in one pass: equal to those of single passes, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import COLOURS, make_rows, tiny_world, write_rows
from fixtures.tiny_language import instruction_world, prepare_answers
from fixtures.toy import LOCAL
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fedlora.client.together import Together, together
from fedlora.client.training import training_mode
from fedlora.client.workspace import Workspace
from fedlora.core.state import generator
from fedlora.privacy.examples import ExampleNoise
from fedlora.privacy.rows import NoRule, RowGradients
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.rounds.phases import open_phase
from fedlora.tasks import Files, Model, QuestionAnswering, TextClassification, TokenClassification
from fedlora.tasks.base import Prepared, Task
from fedlora.testing import toy_task
from fedlora.testing.models import TensorTask
from fedlora.tuning import BitFit, Bottleneck, Full, HeadOnly, LoRA, SparseMask, Tuning

world = pytest.fixture(scope="module")(tiny_world)
language = pytest.fixture(scope="module")(instruction_world)
CPU = torch.device("cpu")
NOISE = ExampleNoise(clip_norm=0.3, noise_multiplier=0.0, seed=0)


def opened(task: Prepared, tuning: Tuning) -> Workspace:
    """A model with a tuning, all of whose values have moved."""
    workspace, recipe = Workspace(task, 0, CPU), Recipe(tuning=tuning)
    state, _ = open_phase(workspace, 0, recipe, 0, 0, None)
    workspace.apply_setup(0, recipe, state.setup)
    draws = generator(1)
    for value in workspace.installed.parameters.values():
        value.data.add_(0.05 * torch.randn(value.shape, generator=draws))
    workspace.installed.refresh()
    workspace.model.eval()
    return workspace


def step(workspace: Workspace, source: Any, rows: Any) -> dict[str, torch.Tensor]:
    """The gradients of a step."""
    ahead = workspace.task.batches(source.passes(rows), CPU)
    values = list(workspace.installed.parameters.values())
    source.gradients(lambda _: workspace.task.loss(workspace.model, next(ahead)), values, rows, 8, None)
    found = {name: value.grad for name, value in workspace.installed.parameters.items() if value.grad is not None}
    for value in values:
        value.grad = None
    return found


def check_equal(workspace: Workspace, rows: Any, clip_norm: float = 0.3) -> None:
    """A batch is trusted, and its clipped sum is that of single passes, to 1e-5 of its norm."""
    noise = ExampleNoise(clip_norm=clip_norm, noise_multiplier=0.0, seed=0)
    source = together(workspace, noise, np.arange(6), Local(batch_size=8))
    assert isinstance(source, Together)
    single, whole = step(workspace, noise, rows), step(workspace, source, rows)
    assert single.keys() == whole.keys()
    apart = sum(float((single[name] - whole[name]).double().square().sum()) for name in single) ** 0.5
    assert apart <= 1e-5 * sum(float(value.double().square().sum()) for value in single.values()) ** 0.5


BATCHED = [
    ("bert", LoRA(rank=2)),
    ("bert", LoRA(rank=2, train="B")),
    ("bert", BitFit()),
    ("bert", HeadOnly()),
    ("bert", Bottleneck(width=4)),
    ("gpt2", LoRA(rank=2)),
    ("gpt2", BitFit()),
    ("t5", LoRA(rank=2)),
    ("vit", LoRA(rank=2)),
    ("llama", LoRA(rank=2)),
]
SINGLE = [("bert", Full()), ("t5", Full()), ("bert", SparseMask(density=0.1)), ("mobilenet_v2", LoRA(rank=2))]


@pytest.mark.parametrize(("family", "tuning"), BATCHED, ids=lambda value: str(getattr(value, "kind", value)))
def test_a_batch_gives_the_gradients_of_single_examples(family: str, tuning: Tuning) -> None:
    workspace = opened(toy_task(family), tuning)
    check_equal(workspace, np.array([3, 1, 4, 15, 9, 2, 6]))
    check_equal(workspace, np.arange(19), clip_norm=1e9)


@pytest.mark.parametrize(("family", "tuning"), SINGLE, ids=lambda value: str(getattr(value, "kind", value)))
def test_what_has_no_rule_is_computed_one_example_at_a_time(family: str, tuning: Tuning) -> None:
    workspace = opened(toy_task(family), tuning)
    before = workspace.installed.read()
    assert together(workspace, NOISE, np.arange(6), LOCAL) is NOISE
    assert all(torch.equal(value, before[name]) for name, value in workspace.installed.read().items())


def question(row: dict[str, str]) -> dict[str, object]:
    """Which word of a text is a colour?"""
    text, colour = row["text"], row["label"]
    return {"context": text, "question": "w1", "answers": {"text": [colour], "answer_start": [text.index(colour)]}}


def tagged(row: dict[str, str]) -> dict[str, object]:
    """Its colours; an empty word makes no piece."""
    words = [""] if row["text"].startswith("w1") else row["text"].split()
    return {"tokens": words, "tags": ["B-x" if word in COLOURS else "O" for word in words]}


CASES: dict[str, tuple[Task, Any]] = {
    "single": (TextClassification(), lambda row: row),
    "padded": (TextClassification(pad_to=16, max_length=16), lambda row: row),
    "multi": (
        TextClassification(problem="multi"),
        lambda row: row | {"label": [row["label"], COLOURS[len(row["text"]) % 3]]},
    ),
    "regression": (TextClassification(problem="regression"), lambda row: row | {"label": len(row["text"]) / 10}),
    "questions": (QuestionAnswering(max_length=9, stride=1), question),
    "tags": (TokenClassification(max_length=6, stride=1), tagged),
}


@pytest.mark.parametrize("case", CASES)
def test_every_task_states_how_a_loss_divides_among_examples(world: Path, tmp_path: Path, case: str) -> None:
    task, made = CASES[case]
    rows = [made(row) for row in make_rows(20, 0)]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    prepared = task.prepare(Model(path=str(world / "bert")), Files(train=file, test=file))
    check_equal(opened(prepared, LoRA(rank=2)), np.array([5, 0, 7, 11, 3, 2, 19, 8, 1]), clip_norm=0.02)


def test_next_tokens_divide_by_the_tokens_that_are_learnt(language: Path) -> None:
    task = prepare_answers(language)
    check_equal(opened(task, LoRA(rank=2)), np.array([5, 0, 7, 1, 3]), clip_norm=0.02)
    packed = prepare_answers(language, packing=True)
    assert together(opened(packed, LoRA(rank=2)), NOISE, np.arange(6), LOCAL) is NOISE


class Sideways(nn.Module):
    """A model that passes tokens of all rows to its layer first by place, as some families do."""

    def __init__(self, sideways: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sideways = sideways
        self.table = nn.Buffer(torch.randn(64, 8))
        self.inner, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        states = self.table[input_ids]
        states = self.inner(states.transpose(0, 1)).transpose(0, 1) if self.sideways else self.inner(states)
        return SequenceClassifierOutput(logits=self.classifier(states.tanh().mean(1)))


@pytest.mark.parametrize("sideways", [False, True])
def test_a_model_that_mixes_rows_is_found_out(sideways: bool) -> None:
    tokens = torch.randint(1, 64, (12, 8), generator=generator(0))
    workspace = opened(TensorTask(lambda: Sideways(sideways), tokens, torch.arange(12) % 3), HeadOnly())
    assert isinstance(together(workspace, NOISE, np.arange(4), LOCAL), Together) is not sideways


def test_a_step_without_a_rule_is_made_of_single_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, rows = opened(toy_task(), LoRA(rank=2)), np.arange(7)
    source = together(workspace, NOISE, rows, LOCAL)
    expected = step(workspace, NOISE, rows)

    def no_rule(self: RowGradients) -> list[Tensor]:
        raise NoRule("none today")

    monkeypatch.setattr(RowGradients, "by_row", no_rule)
    found = step(workspace, source, rows)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_an_example_without_a_finite_gradient_adds_nothing_and_a_batch_may_be_empty() -> None:
    found = [torch.tensor([[3.0, 4.0], [torch.nan, 0.0], [0.3, 0.0]]), torch.tensor([[0.0], [1.0], [torch.inf]])]
    noise = ExampleNoise(clip_norm=1.0, noise_multiplier=0.0, seed=0)
    first, second = noise.clipped_rows(found)
    torch.testing.assert_close(first, torch.tensor([0.6, 0.8]))
    assert second.tolist() == [0.0]
    workspace = opened(toy_task(), LoRA(rank=2))
    source = together(workspace, noise, np.arange(4), LOCAL)
    assert all(not value.any() for value in step(workspace, source, np.zeros(0, np.int64)).values())


def test_a_client_with_one_example_or_batches_of_one_takes_single_passes() -> None:
    workspace = opened(toy_task(), LoRA(rank=2))
    assert together(workspace, NOISE, np.arange(1), LOCAL) is NOISE
    assert together(workspace, NOISE, np.arange(9), Local(batch_size=1)) is NOISE
    assert workspace.batches_examples == {}


def test_packed_values_learn_under_noise() -> None:
    workspace = opened(toy_task(), SparseMask(density=0.1))
    found = step(workspace, ExampleNoise(clip_norm=1e9, noise_multiplier=0.0, seed=0), np.arange(8))
    workspace.task.loss(workspace.model, workspace.task.batch(np.arange(8), CPU)).backward()  # type: ignore[no-untyped-call]
    for name, value in workspace.installed.parameters.items():
        assert value.grad is not None
        assert value.grad.any()
        torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-6)


def test_the_comparison_leaves_no_trace() -> None:
    """Neither in the modes of modules nor in what dropout draws later, so that a resumed run compares again unseen."""
    workspace = opened(toy_task(), LoRA(rank=2, dropout=0.5))
    with training_mode(workspace.model, dropout=False):
        modes, state = [module.training for module in workspace.model.modules()], torch.get_rng_state()
        assert len(set(modes)) == 2
        assert isinstance(together(workspace, NOISE, np.arange(6), LOCAL), Together)
        assert [module.training for module in workspace.model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
