"""Frozen weights rounded as they are read: the same bits as rounding them later, and half of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fixtures import tiny_language
from fixtures.tiny import experiment, ledger, save_model, tiny_world
from fixtures.tiny_language import language_world

import fedlora
from fedlora.client import workspace
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.server.aggregate import Stack
from fedlora.tasks import Model
from fedlora.tasks.models.loading import FEW_BITS, head_names, load_pretrained
from fedlora.tasks.models.rounded import is_stored_in_bfloat16, rounded_names
from fedlora.tuning import BitFit, Bottleneck, Full, HeadOnly, LoRA, SparseMask, SvdOfDelta, SvdOfWeight

CPU = torch.device("cpu")
BF16 = Local(compute="bf16")
world = pytest.fixture(scope="module")(tiny_world)
language = pytest.fixture(scope="module")(language_world)


@pytest.fixture(scope="module", autouse=True)
def _stored(world: Path) -> None:
    save_model(world / "coarse")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world / "coarse", dtype=torch.bfloat16)
    model.save_pretrained(world / "coarse")


def formats(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in model.named_parameters()}


# ---- what is rounded


def test_all_but_the_head_is_read_in_bfloat16(world: Path) -> None:
    one, head = load_pretrained("AutoModelForSequenceClassification", Model(path=str(world / "bert")), 3, CPU)
    other, same = load_pretrained(
        "AutoModelForSequenceClassification", Model(path=str(world / "bert")), 3, CPU, compute="bf16"
    )
    assert head == same
    assert {name for name, found in formats(other).items() if found == torch.float32} == head
    rounded = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(rounded[name], value.to(rounded[name].dtype)), name
    assert {str(value.dtype) for value in other.buffers()} == {str(value.dtype) for value in one.buffers()}


def test_named_modules_of_the_head_and_fresh_parts_stay_float32(world: Path) -> None:
    model = Model(path=str(world / "bert"), head=("pooler",))
    loaded, head = load_pretrained("AutoModelForSequenceClassification", model, 3, CPU, compute="bf16")
    assert any("pooler" in name for name in head)
    assert {name for name, found in formats(loaded).items() if found == torch.float32} == head


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (Recipe(tuning=LoRA(rank=2), local=BF16), "bf16"),
        (Recipe(tuning=LoRA(rank=2)), "fp32"),
        (Recipe(tuning=LoRA(rank=2, init=SvdOfWeight()), local=BF16), "stored"),
        (Recipe(tuning=LoRA(rank=2, init=SvdOfDelta(fold="rest")), local=BF16), "stored"),
        (Recipe(tuning=LoRA(rank=2), local=BF16, aggregator=Stack()), "fp32"),
        (Recipe(tuning=Bottleneck(width=2), local=BF16), "bf16"),
        (Recipe(tuning=HeadOnly(), local=BF16), "bf16"),
        (Recipe(tuning=BitFit(), local=BF16), "fp32"),
        (Recipe(tuning=SparseMask(density=0.1), local=BF16), "fp32"),
        (Recipe(tuning=Full(), local=BF16), "fp32"),
    ],
)
def test_a_recipe_is_rounded_early_only_if_it_cannot_tell(recipe: Recipe, found: str) -> None:
    assert workspace._as_loaded(recipe) == found


def test_whether_a_checkpoint_stores_nothing_finer_is_read_from_its_files(world: Path, tmp_path: Path) -> None:
    assert is_stored_in_bfloat16(str(world / "coarse"), None)
    assert not is_stored_in_bfloat16(str(world / "bert"), None)
    assert not is_stored_in_bfloat16(str(tmp_path), None)
    assert not is_stored_in_bfloat16("nobody/nothing", None)


# ---- the same bits


def ran(root: Path, folder: Path, *words: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    with monkeypatch.context() as patch:
        if not early:
            patch.setattr(workspace, "_as_loaded", lambda recipe: "fp32")
        return ledger(fedlora.run(experiment(root, *words, "method.local.compute='bf16'", rounds=2), folder).folder)


@pytest.mark.parametrize(
    "words",
    [
        ("lora",),
        ("lora", "task.pooling='mean'"),
        ("bottleneck",),
        ("head_only",),
        ("federa", "model.path='{root}/coarse'"),
        ("federa",),
    ],
    ids=" ".join,
)
def test_a_run_has_the_bits_of_rounding_later(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    words = tuple(word.format(root=world) for word in words)
    early, late = (
        ran(world, tmp_path / str(early), *words, early=early, monkeypatch=monkeypatch) for early in (True, False)
    )
    assert early == late
    assert early[-1]["metrics"]["loss"] != early[0]["metrics"]["loss"]


def test_a_language_model_is_read_in_bfloat16(language: Path) -> None:
    task = tiny_language.prepare(language)
    plain, rounded = (task.load_model(0, compute, CPU)[0] for compute in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert set(formats(rounded).values()) == {torch.bfloat16}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for value in plain.parameters():  # buffers stay as they are
            value.data = value.data.to(torch.bfloat16)
        one, other = (task.loss(model.eval(), task.batch(np.arange(4), CPU)) for model in (plain, rounded))
    assert torch.equal(one, other)


# ---- memory


def one_billion() -> Any:
    return transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192,
    )  # fmt: skip


def test_a_model_of_one_billion_is_held_in_1_2_times_its_weights_in_bfloat16() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(one_billion())
        head = head_names(model, set(), fresh_head=False)
        names = set(rounded_names(model, head))
        adapters = LoRA(rank=16, targets="all-linear").install(model, head, 0).parameters
    weights = {name: value.numel() for name, value in model.named_parameters() if name not in adapters}
    assert sum(weights.values()) > 1e9
    held = sum(size * (2 if name in names else 4) for name, size in weights.items())
    held += sum(4 * value.numel() for value in adapters.values())
    assert held <= 1.2 * 2 * sum(weights.values())


LOADS = """
import sys
from pathlib import Path
import torch
from fedlora.tasks import Model
from fedlora.tasks.models.loading import load_pretrained

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

path, compute = sys.argv[1:]
rest = (0, torch.device("cpu"), None, False, 0, "model", compute)
load_pretrained("AutoModelForCausalLM", Model(path=path + "/little"), *rest)
before = peak()
model, _ = load_pretrained("AutoModelForCausalLM", Model(path=path + "/large"), *rest)
for value in model.parameters():  # what is mapped from the file is in memory once it is read
    value.sum()
print(1024 * (peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("stored", [torch.bfloat16])
def test_loading_takes_no_more_than_the_rounded_weights(tmp_path: Path, stored: torch.dtype) -> None:
    sizes = {"little": (64, 1), "large": (1024, 8)}
    num = 0
    for name, (size, layers) in sizes.items():
        config = transformers.LlamaConfig(
            vocab_size=8000,
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=8,
            intermediate_size=4 * size,
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=stored)
        num = sum(value.numel() for value in model.parameters())
        model.save_pretrained(tmp_path / name)
    assert num > 1e8
    took = {
        compute: int(subprocess.check_output([sys.executable, "-c", LOADS, str(tmp_path), compute], text=True))
        for compute in ("fp32", "bf16")
    }
    assert took["bf16"] <= 1.2 * 2 * num < took["fp32"]


# ---- few bits


def test_matrices_of_four_bits_multiply_in_bfloat16() -> None:
    config = transformers.BitsAndBytesConfig(**FEW_BITS["4bit"])  # type: ignore[no-untyped-call]
    twice = transformers.BitsAndBytesConfig(**FEW_BITS["4bit_double"])  # type: ignore[no-untyped-call]
    assert config.bnb_4bit_compute_dtype == twice.bnb_4bit_compute_dtype == torch.bfloat16
    assert [config.bnb_4bit_use_double_quant, twice.bnb_4bit_use_double_quant] == [False, True]
