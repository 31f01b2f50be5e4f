"""Reports on runs: a well-formed page without scripts, every figure drawn, the numbers those of the runs."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from fixtures.tiny import experiment, tiny_world
from typer.testing import CliRunner

import fedlora
from fedlora.cli.main import app
from fedlora.core.errors import ConfigError
from fedlora.population.clients import Population
from fedlora.runs.result import Result
from fedlora.show.curves import by_label, over_seeds, read_run, study_figures
from fedlora.show.figures import Line, Point, curves, frontier, heat_map, pareto_front, save, shares, svg
from fedlora.show.page import Section
from fedlora.show.run_report import _events, _layer_norms, _rounds, partition_section, report

pytest.importorskip("matplotlib")
world = pytest.fixture(scope="module")(tiny_world)
EVERY = ("evaluate.every=1", "clients.network='down=10Mbit,up=1Mbit'", "clients.holdout=0.25", "evaluate.clients=end")


@pytest.fixture(scope="module")
def runs(world: Path) -> list[Result]:
    return [
        fedlora.run(experiment(world, method, f"seed={seed}", *EVERY, rounds=2), world / f"{method}-{seed}")
        for method in ("lora", "flasc")
        for seed in (0, 1)
    ]


class Tags(HTMLParser):
    """Counts elements, and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def drawn(runs: list[Result]) -> tuple[str, list[Section]]:
    return report([run.folder for run in runs])


@pytest.fixture(scope="module")
def page(drawn: tuple[str, list[Section]]) -> str:
    return drawn[0]


def test_the_page_is_well_formed_and_loads_nothing(drawn: tuple[str, list[Section]]) -> None:
    page, sections = drawn
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.count.get("script", 0) == 0
    assert all(link.startswith(("#", "data:")) for link in tags.links)  # e.g. a picture inside an SVG
    names = [name for section in sections for name in section.figures]
    assert {"metric_by_round", "metric_by_megabytes", "metric_by_seconds", "metric_by_bytes_final"} <= set(names)
    assert {"bytes", "clients", "training_loss", "update_norm", "density_up", "layers_lora", "partition"} <= set(names)
    assert tags.count["svg"] == tags.count["figure"] == len(names)


def test_the_page_says_what_differs_and_what_resulted(runs: list[Result], page: str) -> None:
    mean = np.mean([run.after["accuracy"] for run in runs[:2]])
    spread = np.std([run.after["accuracy"] for run in runs[:2]], ddof=1)
    assert f"<td>{mean:.4f} ± {spread:.4f}</td>" in page
    assert "phases.0.recipe.up.sparsify.kind" in page
    assert "phases.0.recipe.tuning.rank" not in page  # is equal in all


def test_curves_are_means_over_seeds_with_their_range(runs: list[Result]) -> None:
    groups = by_label([read_run(run.folder) for run in runs])
    (line, _) = over_seeds(groups, lambda row: row.metrics.get("accuracy"), "megabytes")
    every = np.array([[row.metrics["accuracy"] for row in run.rows] for run in runs[:2]])
    sent = [[sum(row.down_bytes.values()) + sum(row.up_bytes.values()) for row in run.rows] for run in runs[:2]]
    assert line.label == "lora"
    assert line.x == pytest.approx(np.cumsum(np.mean(sent, 0)) / 1e6)
    assert line.y == pytest.approx(every.mean(0))
    assert (line.low, line.high) == (pytest.approx(every.min(0)), pytest.approx(every.max(0)))


def test_the_norms_of_layers_add_up_to_that_of_the_update(runs: list[Result]) -> None:
    for row in runs[0].rows[1:]:
        assert len(row.update_norms) > 1
        assert row.update_norm == pytest.approx(sum(norm**2 for norm in row.update_norms.values()) ** 0.5)


def test_a_partition_is_recorded_and_drawn(runs: list[Result]) -> None:
    held = json.loads((runs[0].folder / "partition.json").read_text())
    assert np.sum(held["counts"]) == 54  # a quarter of 72 is held out
    assert len(held["counts"]) == len(held["clients"]) == held["num_clients"] == 9
    assert all(len(row) == len(held["classes"]) for row in held["counts"])
    assert "seed 0" in held["scheme"]
    assert list(partition_section([held, held]).figures) == ["partition", "partition_1"]


@pytest.mark.parametrize(("top", "marks"), [(1, "0 1"), (12, "0 1 12"), (30, "0 1 10 30"), (101, "0 1 10 101")])
def test_the_scale_of_a_heat_map_has_no_labels_on_top_of_one_another(top: int, marks: str) -> None:
    counts = np.array([[0, 1], [top, 0]])
    _, bar = heat_map(counts, ["a", "b"], ["x", "y"], "iid").axes
    assert [label.get_text() for label in bar.get_yticklabels()] == marks.split()


def test_of_many_clients_some_are_recorded(world: Path) -> None:
    from fedlora.config.federated_data import prepare
    from fedlora.runs.partition import partition_record

    chosen = experiment(world)
    data = prepare(chosen)
    rows = len(data.classes.numbers)
    many = Population(tuple(map(str, range(300))), np.arange(300) % rows, np.arange(301))
    import dataclasses

    held = partition_record(chosen, dataclasses.replace(data, population=many))
    assert (held["num_clients"], len(held["clients"])) == (300, 200)
    assert (held["clients"][0], held["clients"][-1]) == ("0", "299")


def test_the_pareto_front_keeps_what_nothing_beats() -> None:
    points = [Point("a", 1, 0.5), Point("b", 2, 0.5), Point("c", 3, 0.7), Point("d", 3, 0.6), Point("e", 9, 0.1)]
    assert [point.label for point in pareto_front(points, True)] == ["a", "c"]
    assert [point.label for point in pareto_front(points, False)] == ["a", "e"]


def test_figures_are_the_same_bytes_each_time_and_have_own_identifiers(tmp_path: Path) -> None:
    def figure() -> object:
        return curves([Line("a", [0, 1], [1, 2], [0, 1], [2, 3])], "round", "loss", log_x=True)

    first = svg(figure(), "one")  # type: ignore[arg-type]
    assert first == svg(figure(), "one")  # type: ignore[arg-type]
    ids = {element.get("id") for element in ElementTree.fromstring(first).iter() if "clip" in element.tag.lower()}
    other = ElementTree.fromstring(svg(figure(), "two")).iter()  # type: ignore[arg-type]
    assert not (ids - {None}) & {element.get("id") for element in other if "clip" in element.tag.lower()}
    written = [save(figure(), tmp_path / name, "figure") for name in ("x", "y")]  # type: ignore[arg-type]
    for mine, other_file in zip(*written, strict=True):
        assert mine.read_bytes() == other_file.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name another folder"):
        save(figure(), tmp_path / "file", "figure")  # type: ignore[arg-type]


def test_a_method_that_sends_nothing_is_left_out_of_the_frontier() -> None:
    drawing = svg(frontier([Point("alone", 0, 0.9), Point("lora", 2, 0.8)], "accuracy", True), "x")
    assert "lora" in drawing
    assert "alone" not in drawing


@pytest.mark.parametrize("text", ["a $x_$ b", "$", r"\$5 to $9", "_hidden"])
def test_the_users_text_is_drawn_as_it_stands(text: str) -> None:
    line, point = Line(text, [1, 2], [1, 2], [1, 2], [1, 2]), Point(text, 1, 0.5)
    drawings = [
        curves([line, line], text, text),
        frontier([point], text, True),
        shares([text], {text: [1.0], "other": [2.0]}, text),
        heat_map(np.ones((1, 1), int), [text], [text], text),
    ]
    for figure, times in zip(drawings, (4, 2, 3, 3), strict=True):
        parts = ElementTree.fromstring(svg(figure, "x")).iter("{http://www.w3.org/2000/svg}text")
        assert ["".join(part.itertext()).strip() for part in parts].count(text) == times


def test_refusals_late_clients_and_warnings_are_listed_and_drawn_by_round(runs: list[Result]) -> None:
    run = read_run(runs[0].folder)
    changes = ({}, {"refused": {"3": "a loss of NaN"}, "warnings": ["slow"]}, {"late": ["4"], "warnings": ["slow"]})
    rows = [replace(row, **{"warnings": []} | change) for row, change in zip(run.rows, changes, strict=True)]
    section = _events([replace(run, rows=rows), replace(run, seed=1, rows=rows[:1])])
    assert list(section.tables[0].rows) == [
        ["lora, seed 0", "1", "refused client 3: a loss of NaN"],
        ["lora, seed 0", "1-2", "slow"],
        ["lora, seed 0", "2", "client 4 timed out"],
    ]
    drawn = {line.get_label(): [*line.get_xdata()] for line in section.figures["events"].axes[0].lines}
    assert drawn == {"refused": [1], "warning": [1, 2], "timed out": [2]}
    assert _events([replace(run, rows=rows[:1])]).figures == {}


def test_rounds_become_spans() -> None:
    assert _rounds([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"


def test_labels_become_names_of_files(runs: list[Result]) -> None:
    named = [replace(read_run(runs[0].folder), label=label) for label in ("lora r/8", "lora_r_8", "../x")]
    found = _layer_norms({run.label: [run] for run in named})
    assert {name: label for name, (label, _) in found.items()} == {
        "layers_lora_r_8": "lora r/8", "layers_lora_r_8_2": "lora_r_8", "layers_.._x": "../x",
    }  # fmt: skip


def test_the_command_writes_page_and_figures(runs: list[Result], tmp_path: Path) -> None:
    made = CliRunner().invoke(
        app, ["report", str(runs[0].folder), "--out", str(tmp_path / "r.html"), "--figures", str(tmp_path / "f")]
    )
    assert made.exit_code == 0, made.output
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == page.count("<figure") > 0
    written = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert {"metric_by_round.svg", "metric_by_round.pdf", "partition.svg"} <= set(written)
    assert len(written) % 2 == 0


def test_a_studys_results_are_drawn_for_each_setting() -> None:
    rows = [
        {
            **{"stage": "final", "method": method, "setting": setting, "seed": seed, "round": number},
            **{"down_bytes": 1000 * number, "up_bytes": 10, "metrics": {"accuracy": number / 10}},
            **({"test": {"accuracy": 0.3}} if number == 2 else {}),
        }
        for method in ("a", "b") for setting in ("x=1", "x=2") for seed in (0, 1) for number in (1, 2)
    ]  # fmt: skip
    results = {
        "metric": "accuracy", "higher_is_better": True, "labels": ["a", "b", "c"], "rows": rows,
        "settings": [{"name": "x=1"}, {"name": "x=2"}],
    }  # fmt: skip
    assert list(study_figures(results)) == [
        f"accuracy_by_{axis}_x_{number}" for number in (1, 2) for axis in ("bytes", "round")
    ]


def test_nothing_is_drawn_against_bytes_where_none_were_sent() -> None:
    row = {"stage": "final", "method": "centralised_a", "setting": "all", "seed": 0, "round": 2}
    row |= {"down_bytes": 0, "up_bytes": 0, "metrics": {"accuracy": 0.3}, "test": {"accuracy": 0.3}}
    results = {"metric": "accuracy", "higher_is_better": True, "labels": ["centralised_a"], "rows": [row]}
    assert list(study_figures({**results, "settings": [{"name": "all"}]})) == ["accuracy_by_round_all"]
