"""Tables from results alone: means, paired differences, bytes, times."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.core.errors import ConfigError
from fedlora.show.plain import paired
from fedlora.study.results import compact, read, write
from fedlora.study.tables import comma_separated, latex, markdown, summaries


def results(higher: bool = True, seeds: int = 3) -> dict[str, Any]:
    rows = []
    for number, (label, gain) in enumerate((("lora", 0.0), ("full", 0.1))):
        for seed in range(seeds):
            facts = {"stage": "final", "method": label, "setting": "alpha=0.5", "seed": seed, "seconds": 1.0}
            for step, value in enumerate((0.2, 0.5, 0.6 + gain + 0.01 * seed)):
                sizes = {"down_bytes": 10**6 * step * (1 + 9 * number), "up_bytes": 10**5 * step}
                sizes["link_seconds"] = 100.0 * step
                sign = 1 if higher else -1
                rows.append({**facts, "round": 5 * step, **sizes, "metrics": {"accuracy": sign * value}})
            rows[-1]["test"] = {"accuracy": rows[-1]["metrics"]["accuracy"] + 0.01 * seed * number}
    return {
        "version": 1,
        "name": "small",
        "metric": "accuracy",
        "higher_is_better": higher,
        "labels": ["lora", "full", "flasc"],
        "seeds": list(range(seeds)),
        "reference": "lora",
        "target": "0.9 * full" if higher else -0.65,
        "link": "down=10Mbit,up=1Mbit",
        "settings": [{"name": "alpha=0.5", "values": {"clients.partition.alpha": 0.5}}],
        "broken_gates": ["a gate does not hold"],
        "failures": [{"stage": "final", "method": "flasc", "setting": "alpha=0.5", "seed": 0, "reason": "it diverged"}],
        "tuning": [
            {
                "method": "lora", "setting": "alpha=0.5", "done": True, "rounds": [5, 10], "best": {"server.lr": 0.01},
                "value": 0.71, "ends": [], "trials": [],
            }
        ],
        "rows": rows,
    }  # fmt: skip


def test_differences_are_paired_by_seed() -> None:
    middle, half = paired({0: 0.6, 1: 0.7, 2: 0.9}, {0: 0.5, 1: 0.5, 2: 0.6, 3: 0.0}) or (0.0, 0.0)
    assert middle == pytest.approx(0.2)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert paired({0: 0.6}, {0: 0.5}) == (pytest.approx(0.1), None)
    assert paired({0: 0.6}, {1: 0.5}) is None


def test_a_summary_has_means_bytes_and_times() -> None:
    lora, full = summaries(results())
    assert (lora.method, lora.test, lora.tuned, lora.values) == (
        "lora",
        {0: 0.6, 1: pytest.approx(0.61), 2: pytest.approx(0.62)},
        0.71,
        {"server.lr": 0.01},
    )
    assert (lora.down_bytes, lora.up_bytes, full.down_bytes) == (2e6, 2e5, 20e6)
    assert lora.target == pytest.approx(0.9 * 0.71)
    assert set(lora.times.values()) == {None}
    assert set(full.times.values()) == {200.0}
    assert lora.difference is None
    assert full.difference is not None
    assert full.difference[0] == pytest.approx(0.11)
    assert full.tuned is None


def test_of_losses_less_is_better() -> None:
    lora, full = summaries(results(higher=False))
    assert (set(full.times.values()), set(lora.times.values())) == ({200.0}, {None})
    assert lora.target == -0.65


def test_a_target_is_of_finished_runs_and_may_be_reached_at_the_start() -> None:
    found = results()
    found["rows"] = [row for row in found["rows"] if (row["method"], row["seed"], row["round"]) != ("full", 2, 10)]
    assert summaries(found)[0].target == pytest.approx(0.9 * (0.70 + 0.71) / 2)
    found["target"] = 0.1
    for row in found["rows"]:
        if not row["round"]:
            del row["link_seconds"]  # as in a run over the network of its configuration
    assert set(summaries(found)[0].times.values()) == {0.0}


def test_a_target_may_be_that_of_clients_in_isolation() -> None:
    found = results()
    for row in found["rows"]:
        if row["method"] == "full":
            row["metrics"] = {}
    assert summaries(found)[0].target == pytest.approx(0.9 * 0.72)


def test_a_seed_without_times_is_not_one_that_did_not_reach_the_target() -> None:
    found = results()
    for row in found["rows"]:
        if row["seed"] == 1:
            del row["link_seconds"]
    assert summaries(found)[1].times == {}
    assert "not reached" not in markdown(found)


def test_markdown() -> None:
    found = markdown(results())
    assert "**clients.partition.alpha = 0.5**" in found
    assert (
        "| lora | 0.610 ± 0.010 | 3 |  | 2 | 0.2 | 2.2 | not reached (0 of 3 seeds) | 0.710 | server.lr 0.01 |" in found
    )
    assert "| full | 0.720 ± 0.020 | 3 | +0.110 [+0.085, +0.135] | 20 | 0.2 | 20.2 | 200 s |  |  |" in found
    assert "- flasc at alpha=0.5, final: it diverged" in found
    assert "- a gate does not hold" in found
    assert "| full | 0.700 | 1 | +0.100 |" in markdown(results(seeds=1))


def test_csv_and_latex() -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(results()))))
    assert [row["method"] for row in rows] == ["lora", "full"]
    assert rows[1]["seconds_to_target"] == "200.0"
    assert float(rows[1]["difference_half_interval"]) == pytest.approx(0.0248, abs=1e-4)
    found = latex(results())
    assert r"full & 0.720 $\pm$ 0.020 & 3 &" in found
    assert found.count(r"\\") == 4


def test_results_are_written_one_row_in_a_line_and_read_back(tmp_path: Path) -> None:
    write(tmp_path / "results.json", results())
    text = (tmp_path / "results.json").read_text()
    assert len([line for line in text.splitlines() if '"stage":"final"' in line]) == 18 + 1
    assert read(tmp_path / "results.json") == json.loads(text) == compact(results())
    shown = CliRunner().invoke(
        app, ["study", str(tmp_path / "results.json"), "--stage", "table"], catch_exceptions=False
    )
    assert "| lora | 0.610 ± 0.010 |" in shown.stdout


@pytest.mark.parametrize("option", [["--only", "lora"], ["--budget", "1h"], ["--dry-run"], ["--out", "there"]])
def test_options_for_runs_are_refused_where_there_are_only_results(tmp_path: Path, option: list[str]) -> None:
    write(tmp_path / "results.json", results())
    command = ["study", str(tmp_path / "results.json"), "--stage", "table", *option]
    refused = CliRunner().invoke(app, command, standalone_mode=False)
    assert isinstance(refused.exception, ConfigError)
    assert f"{option[0]} is for runs" in str(refused.exception)


def test_other_files_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ConfigError, match="no results of a study"):
        read(tmp_path / "results.json")
    with pytest.raises(ConfigError, match="no results of a study"):
        read(tmp_path / "nothing.json")


def test_damaged_results_are_named_with_what_they_lack(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    found = results()
    del found["failures"]
    for text, expected in (
        ('{"version": 1, "rows": [<<<<<<< HEAD', "damaged .Expecting value.*restore it; or remove it"),
        (json.dumps(found), "damaged .there is no failures"),
        (json.dumps({**results(), "rows": [{"stage": "final"}]}), r"damaged .there is no rows.method"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            read(path)


def test_cells_of_a_markdown_table_stay_in_their_columns() -> None:
    """Whatever a value that was tuned contains; and large sizes have no exponent."""
    found = results()
    found["tuning"][0]["best"] = {"targets": r".*\.(q|v)_proj"}
    for row in found["rows"]:
        row["down_bytes"] *= 10**4
    lines = [line for line in markdown(found).splitlines() if line.startswith("| lora") or line.startswith("| full")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert r"(q\|v)" in lines[0] + lines[1]
    assert "e+" not in "".join(lines)
