"""``benchmarks/gpu.py`` keeps what it has measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks import gpu


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
