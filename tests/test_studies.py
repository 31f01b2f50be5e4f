"""The figures of ``docs/results``: their tables are printed from what is committed, and nothing is lost."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

from studies import study

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@pytest.mark.parametrize("name", sorted(file.stem for file in RESULTS.glob("*.json")))
def test_a_table_without_the_runs_prints_what_is_committed_and_keeps_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study, "TABLES", tmp_path)
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    importlib.import_module(f"studies.{name}").STUDY.table()
    before, after = (json.loads((folder / f"{name}.json").read_text()) for folder in (RESULTS, tmp_path))
    assert after == before
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + sum(map(len, before["final"].values()))
