"""``benchmarks/gpu.py`` keeps what it has measured, and compares like with like; ``make gpu`` always runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fedlora
from benchmarks import gpu, graphs


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Bench:
    """A tiny one on a CPU."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return gpu.Bench(torch.device("cpu"), True, time.monotonic() + 1000, tmp_path)


def test_the_figures_so_far_are_written_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def card(bench: gpu.Bench) -> dict[str, Any]:
        """Measures something."""
        return {"rate": 1.0}

    def load(bench: gpu.Bench) -> dict[str, Any]:
        """Fails, and leaves no time."""
        bench.deadline = 0.0
        raise RuntimeError("out of memory")

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(transformers.logging, "disable_progress_bar", lambda: None)
    monkeypatch.setattr(gpu, "card", card)
    monkeypatch.setattr(gpu, "load", load)
    monkeypatch.setattr(sys, "argv", ["gpu", "card", "load", "methods", "--device", "cpu", "--tiny"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    found = json.loads((tmp_path / "gpu-cpu-dry-run.json").read_text())
    assert found["parts"] == {
        "card": {"rate": 1.0},
        "load": {"failed": "RuntimeError: out of memory"},
        "methods": {"left out": "no time was left"},
    }


def test_what_the_mode_of_waits_says_of_itself_is_no_wait(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"]

    def set_mode(mode: str) -> None:
        if said:
            warnings.warn(said.pop(), stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(gpu.Bench, "cuda", True)
    for name in ("sync", "fresh"):
        monkeypatch.setattr(gpu.Bench, name, lambda self: None)
    monkeypatch.setattr(gpu.Bench, "peak", lambda self: None)
    assert gpu.waits(bench) == {"per step": 0, "by line": {}, "per turn, by line": {}}
    assert not said


def test_one_that_fails_leaves_the_figures_of_the_others(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run, why = fedlora.run, {"failed": "RuntimeError: no kernel"}

    def failing(experiment: Any, *_: Any) -> Any:
        if not isinstance(experiment, fedlora.Experiment) or experiment.label == "federa":
            raise RuntimeError("no kernel")
        return run(experiment, *_)

    monkeypatch.setattr(gpu, "peft_loop", failing)
    monkeypatch.setattr(fedlora, "run", failing)
    found = gpu.turn(bench)
    assert found["peft"] == why
    assert found["tokens/s, fedlora"] > 0
    found = gpu.methods(bench)
    assert found["federa"] == why
    assert all("losses" in found[kind] for kind in ("lora", "flasc", "slora"))


@pytest.mark.parametrize(("replayed", "same"), [(True, True), (False, False)])
def test_a_graph_that_does_nothing_has_other_bits(
    bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch, replayed: bool, same: bool
) -> None:
    def captured(function: Callable[[], None], device: torch.device) -> graphs.Graph:
        return graphs.Plain(function if replayed else lambda: None)

    monkeypatch.setattr(graphs, "captured", captured)
    assert gpu.graphs(bench)["the same bits from a graph"] is same


def test_a_captured_step_has_the_kernels_of_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, attn_mask: Any = None, **settings: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    with graphs.unpacked():
        for capturing in (False, True):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda value=capturing: value)
            model(input_ids=torch.arange(8)[None], use_cache=False)
    assert masks == [None, None]


def test_turns_with_and_without_deterministic_kernels_alternate(
    bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: list[bool] = []

    def noted(self: gpu.Opened) -> None:
        kernels.append(self.workspace.deterministic)

    monkeypatch.setattr(gpu.Opened, "round", noted)
    monkeypatch.setattr(gpu, "loop", lambda *_: None)
    _, took = gpu.ours_and_plain(bench, *bench.large())
    assert list(took) == ["fedlora", "plain", "fedlora, not deterministic"]
    assert kernels[1:] == [True, False] * 3


STAND_IN = """#!/bin/sh
case "$2" in
pytest) echo "$@" > "$OUT/tests"; trap 'exit 2' INT; sleep 60 & wait;;
*) echo "$2" > "$OUT/measured";;
esac
"""


@pytest.mark.skipif(not shutil.which("timeout"), reason="no command timeout")
def test_tests_that_hang_leave_time_for_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    monkeypatch.setenv("OUT", str(tmp_path))
    words = ["make", "gpu", f"GPU_PYTHON={python}", "GPU_TESTS=1"]
    ended = subprocess.run(words, cwd=Path(__file__).parents[2], check=False, timeout=30)
    # what is printed may be cut where it is sent on
    assert f"--junitxml={tmp_path}/gpu-tests.xml" in (tmp_path / "tests").read_text()
    assert (tmp_path / "measured").read_text() == "benchmarks.gpu\n"
    assert ended.returncode == 2  # of make, for any failure
