"""Tables for people: units, comparisons over seeds, live progress."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.tiny import experiment, tiny_world
from rich.console import Console

import fedlora
from fedlora.cli.log import Printing
from fedlora.core.errors import ConfigError
from fedlora.core.progress import LOG
from fedlora.population.clients import Population
from fedlora.runs.partition import label_counts
from fedlora.runs.result import Result
from fedlora.runs.services import numbers
from fedlora.show.compare import comparison, comparison_csv, comparison_latex, comparison_table, load_result
from fedlora.show.plots import partition_bars
from fedlora.show.report import Live, as_dict, human_bytes, human_seconds, result_table
from fedlora.tasks.scores import ONE_CLASS

world = pytest.fixture(scope="module")(tiny_world)
THREE = Population(("a", "b", "c"), np.array([0, 1, 2, 3, 4, 5]), np.array([0, 3, 4, 6]))


def shown(value: Any, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(value)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def result(label: str, seed: int, after: float, down: int = 100, up: int = 50) -> dict[str, Any]:
    return {
        "label": label,
        "seed": seed,
        "rounds": 2,
        "main_metric": "accuracy",
        "before": {"accuracy": 0.25},
        "after": {"accuracy": after},
        "down_bytes": {"adapter": down - 10, "head": 10} if down else {},
        "up_bytes": {"adapter": up} if up else {},
        "seconds": 2.0,
        "folder": f"runs/{label}-{seed}",
        "adapter": None,
    }


@pytest.fixture
def printing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Console], Console]:
    """Has what is logged printed on a console."""

    def on(console: Console) -> Console:
        monkeypatch.setattr(LOG, "handlers", [Printing(console)])
        monkeypatch.setattr(LOG, "level", logging.INFO)
        return console

    return on


@pytest.fixture(scope="module")
def done(world: Path) -> Result:
    return fedlora.run(experiment(world, "lora", rounds=1), world / "run")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (98_765_432_100, "98.8 GB"),
        (999_499, "999 kB"),
        (999_700, "1 MB"),
        (999_999_999, "1 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_have_decimal_units(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (42, "42 s"), (99.4, "99 s"), (200, "3 min 20 s")])
def test_seconds_become_minutes(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_seeds_of_a_method_are_averaged() -> None:
    (row,) = comparison([result("lora", 1, 0.6), result("lora", 0, 0.8)])
    assert (row["label"], row["seeds"], row["after"]) == ("lora", [0, 1], pytest.approx(0.7))
    # the sample's standard deviation: sqrt((0.1^2 + 0.1^2) / 1)
    assert row["spread"] == pytest.approx(0.02**0.5)
    assert row["folders"] == ["runs/lora-1", "runs/lora-0"]


def test_bytes_are_compared_with_dense_lora_wherever_it_stands() -> None:
    rows = comparison([result("flasc", 0, 0.5, down=20, up=10), result("lora", 0, 0.5)])
    assert [(row["ratio"], row["reference"]) for row in rows] == [(5.0, "lora"), (1.0, "lora")]


def test_without_dense_lora_the_first_method_is_compared_with() -> None:
    rows = comparison([result("full", 0, 0.5), result("flasc", 0, 0.5, down=20, up=10)])
    assert [(row["ratio"], row["reference"]) for row in rows] == [(1.0, "full"), (5.0, "full")]


def test_runs_of_one_name_that_are_no_seeds_of_each_other_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="have the seed 0: give them different labels"):
        comparison([result("lora", 0, 0.5), result("lora", 0, 0.5)])
    with pytest.raises(ConfigError, match="different main metrics, accuracy and f1"):
        comparison([result("lora", 0, 0.5), result("other", 0, 0.5) | {"main_metric": "f1"}])
    runs = []
    for seed, density in ((0, 0.25), (1, 0.25), (2, 0.5)):
        chosen = experiment(world, "flasc", f"seed={seed}", f"method.up={density}", rounds=1)
        runs.append(as_dict(fedlora.run(chosen, tmp_path / str(seed))))
    assert comparison(runs[:2])[0]["seeds"] == [0, 1]
    with pytest.raises(ConfigError, match=r"differ in phases\.0\.recipe\.up\.sparsify\.density: 0\.25 against 0\.5"):
        comparison(runs)


def test_runs_on_different_rows_are_compared_with_a_warning(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "few.jsonl").write_text("".join((world / "test.jsonl").read_text().splitlines(keepends=True)[:-3]))
    runs = [
        as_dict(fedlora.run(experiment(world, method, *more, rounds=1), tmp_path / method))
        for method, *more in (("lora",), ("flasc",), ("full", f"data.test='{tmp_path / 'few.jsonl'}'"))
    ]
    comparison(runs[:2])
    assert "different rows" not in caplog.text
    comparison(runs)
    assert "lora and" in caplog.text
    assert "full were trained or tested on different rows" in caplog.text


@pytest.mark.parametrize(
    ("made", "mend"),
    [
        ([], "there is no such folder"),
        (["config.toml"], "finish it with: fedlora run"),
        (["config.toml", "result.json"], "its result.json is damaged; write it anew with: fedlora run"),
        (["notes.txt"], "there is no result.json in it"),
    ],
)
def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path, made: list[str], mend: str) -> None:
    folder = tmp_path / "run"
    for name in made:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{")
    with pytest.raises(ConfigError, match=mend):
        load_result(folder)


def test_what_sends_nothing_has_no_ratio() -> None:
    rows = comparison([result("lora", 0, 0.5), result("alone", 0, 0.5, down=0, up=0)])
    assert rows[1]["ratio"] is None
    assert "nothing sent" in shown(comparison_table(rows))


def test_the_table_shows_every_method_with_its_figures() -> None:
    text = shown(comparison_table(comparison([result("lora", 0, 0.6), result("lora", 1, 0.8), result("[b]x", 0, 0.5)])))
    assert "0.700 ± 0.141" in text
    assert "[b]x" in text
    assert "fewer than lora" in text
    assert "fewer than [b]x" in shown(comparison_table(comparison([result("[b]x", 0, 0.5)])))


def test_a_result_is_the_same_from_memory_and_from_disk(done: Result) -> None:
    assert as_dict(done) | {"adapter": "adapter"} == load_result(done.folder)


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a finished run"):
        load_result(tmp_path)


def test_the_table_of_a_run_splits_its_bytes(done: Result) -> None:
    text = shown(result_table(done))
    assert f"{done.before['accuracy']:.4f} -> {done.after['accuracy']:.4f}" in text
    assert f"adapter {human_bytes(done.up_bytes['adapter'])}" in text


def test_without_a_terminal_evaluations_are_lines(
    world: Path, tmp_path: Path, printing: Callable[[Console], Console]
) -> None:
    console = printing(Console(file=io.StringIO(), width=200))
    found = fedlora.run(experiment(world, "lora", "label='[x]'"), tmp_path / "run", callbacks=[Live(console)])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("[x]: 9 clients with 8 to 8 examples, 3 per round, 3 rounds on cpu\n")
    assert [line.split()[1] for line in text.splitlines() if " sent " in line] == ["0/3", "2/3", "3/3"]
    assert ["left" in line for line in text.splitlines() if " sent " in line] == [False, True, True]
    total = sum(found.down_bytes.values()) + sum(found.up_bytes.values())
    assert f"accuracy {found.after['accuracy']:.3f}  sent {human_bytes(total)}  left 0 s" in text


@pytest.mark.parametrize(("number", "said"), [(10, "on 10 examples"), (24, "accuracy")])
def test_a_metric_of_a_part_of_the_test_data_says_so(
    world: Path, tmp_path: Path, printing: Callable[[Console], Console], number: int, said: str
) -> None:
    console = printing(Console(file=io.StringIO(), width=200))
    chosen = experiment(world, "lora", f"evaluate.num_examples={number}", rounds=1)
    fedlora.run(chosen, tmp_path / "run", callbacks=[Live(console)])
    lines = [line for line in console.file.getvalue().splitlines() if " sent " in line]  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert all(said in line and ("examples" in line) == (number < 24) for line in lines)


def test_no_loss_is_shown_where_clients_report_none(
    world: Path, tmp_path: Path, printing: Callable[[Console], Console]
) -> None:
    console = printing(Console(file=io.StringIO(), width=200))
    noise = "privacy={kind='central_gaussian', clip_norm=1.0, noise_multiplier=1.0, delta=1e-3}"
    found = fedlora.run(experiment(world, "lora", noise, rounds=1), tmp_path / "run", callbacks=[Live(console)])
    assert "round 1/1  accuracy" in console.file.getvalue()  # type: ignore[attr-defined]
    assert found.frame()["loss"].isna().all()
    assert "loss" not in numbers(found.rows[1])


def test_on_a_terminal_there_is_a_bar_that_goes_away(
    world: Path, tmp_path: Path, printing: Callable[[Console], Console]
) -> None:
    console = printing(Console(file=io.StringIO(), width=120, force_terminal=True))
    live = Live(console)
    fedlora.run(experiment(world), tmp_path / "run", callbacks=[live])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in text
    # one line is kept for each evaluation, above the bar
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert [number for number in range(4) if f"  round {number}/3  " in plain] == [0, 2, 3]
    live.close()


def test_a_warning_is_shown_once_and_phases_are_named(
    world: Path, tmp_path: Path, printing: Callable[[Console], Console]
) -> None:
    console = printing(Console(file=io.StringIO(), width=200))
    live = Live(console)
    found = fedlora.run(experiment(world, "slora", rounds=2), tmp_path / "run", callbacks=[live])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round 0/2  phase 0 sparse_mask  accuracy" in text
    assert "round 2/2  phase 1 lora  loss" in text
    for number, words in ((0, ONE_CLASS), (1, "odd"), (2, "odd"), (2, ONE_CLASS)):
        live.row_recorded(dataclasses.replace(found.rows[0], round=number, metrics={}, warnings=(words,)))
    said = console.file.getvalue().removeprefix(text).splitlines()  # type: ignore[attr-defined]
    assert said == ["  round 1: odd", f"  round 2: {ONE_CLASS}"]


def test_labels_are_counted_per_client() -> None:
    counts = label_counts(THREE, np.array([0, 0, 1, 1, 0, 0]), 2)
    assert counts.tolist() == [[2, 1], [0, 1], [2, 0]]


def test_a_bar_is_as_long_as_its_client_is_large() -> None:
    text = partition_bars(THREE, np.array([0, 0, 1, 1, 0, 0]), ["no", "yes"], width=30).plain.splitlines()
    assert [line.strip() for line in text[:3]] == [
        f"a {'a' * 20}{'b' * 10} 3",
        f"b {'b' * 10} 1",
        f"c {'a' * 20} 2",
    ]
    assert text[3].split() == ["a", "no", "b", "yes"]


def test_all_metrics_and_paired_differences_are_compared() -> None:
    runs = [
        result("lora", seed, 0.5 + seed / 10) | {"after": {"accuracy": 0.5 + seed / 10, "loss": 1.0}} for seed in (0, 1)
    ]
    runs += [result("full", seed, 0.0) | {"after": {"accuracy": 0.6 + seed / 5, "loss": 2.0 + seed}} for seed in (0, 1)]
    lora, full = comparison(runs)
    assert lora["difference"] is None
    # differences 0.1 and 0.2; t(0.975, 1) = 12.706, s = 0.0707
    assert full["difference"] == (pytest.approx(0.15), pytest.approx(12.7062 * 0.0707107 / 2**0.5, rel=1e-4))
    assert full["metrics"]["loss"] == {"mean": 2.5, "spread": pytest.approx(0.5**0.5)}
    (_, by_loss) = comparison(runs, metric="loss")
    assert (by_loss["metric"], by_loss["after"], by_loss["before"]) == ("loss", 2.5, None)
    with pytest.raises(ConfigError, match="no metric 'f1'; it has accuracy, loss"):
        comparison(runs, metric="f1")
    text = comparison_csv([lora, full]).splitlines()
    assert text[0].startswith("method,seeds,metric,mean,sd,difference,difference_half_interval,reference")
    assert len(text) == 5
    assert text[3].startswith("full,0 1,accuracy,0.7,0.141")
    written = comparison_latex([lora, full])
    assert written.startswith(r"\begin{tabular}")
    assert r"0.700 $\pm$ 0.141" in written


def test_latex_shows_each_character_of_a_label() -> None:
    label = r"a_{b} $5 ^~\ 50% & #1"
    written = comparison_latex(comparison([result(label, 0, 0.5)]))
    shown = r"a\_\{b\} \$5 \textasciicircum{}\textasciitilde{}\textbackslash{} 50\% \& \#1"
    assert f"\n{shown} & 0 &" in written


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("[a]", "{}[a]"),
        ("*", "{}*"),
        ("a*b", "a*b"),
        ("<a|b>", r"\textless{}a\textbar{}b\textgreater{}"),
        ("0.9 * full", r"0.9 $\times$ full"),
    ],
)
def test_latex_takes_no_label_for_a_command(label: str, shown: str) -> None:
    assert f"\n{shown} & 0 &" in comparison_latex(comparison([result("lora", 0, 0.5), result(label, 0, 0.5)]))
