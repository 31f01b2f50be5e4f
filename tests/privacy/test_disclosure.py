"""What may be known of clients under each setting of privacy, and that their reports say no more."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fixtures.toy import LOCAL, Federation, toy_run

from fedlora import run
from fedlora.client import turn as client
from fedlora.client.jobs import Job, Reply, empty_report
from fedlora.client.training import LocalResult, Ready
from fedlora.client.turn import run_job
from fedlora.client.workspace import Workspace
from fedlora.core.errors import TrainingError
from fedlora.engines import Serial
from fedlora.privacy import CentralGaussian, NoPrivacy
from fedlora.privacy.disclosure import Disclosure, disclosure_of
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.server.aggregate import Mean
from fedlora.transport import wire
from fedlora.tuning import LoRA

ALL = frozenset({"examples", "steps", "loss", "rank"})
NONE: frozenset[str] = frozenset()
BELOW = frozenset({"below"})


def central(**settings: Any) -> dict[str, Any]:
    return {"privacy": CentralGaussian(**{"clip_norm": 1.0, "noise_multiplier": 0.5, **settings})}


def examples(**settings: Any) -> dict[str, Any]:
    noise = ExampleNoise(**{"clip_norm": 1.0, "noise_multiplier": 0.5, **settings})
    return {"local": replace(LOCAL, example_privacy=noise)}


ADAPTIVE = {"quantile": 0.5, "count_noise": 2.0, "clip_norm": 100.0, "noise_multiplier": 1e-3}
# figures; then failures, timing, retries, attempts, absence, cohort, replays
SETTINGS: dict[str, tuple[dict[str, Any], frozenset[str], str]] = {
    "none": ({}, ALL, "1111111"),
    "central": (central(), NONE, "0110000"),
    "central, seeded": (central(seed=0), NONE, "0110011"),
    "central, to an epsilon": (central(noise_multiplier=None, target_epsilon=8.0, accountant="rdp"), NONE, "0110000"),
    "central, a clip alone": (central(noise_multiplier=0.0), NONE, "0110011"),
    "adaptive": (central(**ADAPTIVE), BELOW, "0110000"),
    "adaptive, seeded": (central(**ADAPTIVE, seed=0), BELOW, "0110011"),
    "examples": (examples(), NONE, "0000110"),
    "examples, seeded": (examples(seed=0), NONE, "0000111"),
    "examples, clipped alone": (examples(noise_multiplier=0.0), NONE, "0000110"),
    "both": (central() | examples(), NONE, "0000000"),
    "both, clients' noise seeded": (central(seed=0) | examples(), NONE, "0000010"),
    "both, seeded": (central(seed=0) | examples(seed=0), NONE, "0000011"),
    "both, adaptive": (central(**ADAPTIVE, seed=0) | examples(seed=0), BELOW, "0000011"),
}


def recipe_of(slots: dict[str, Any]) -> Recipe:
    return Recipe(**{"tuning": LoRA(rank=4), "aggregator": Mean(weighting="uniform"), "local": LOCAL, **slots})


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_each_setting_of_privacy_leaves_open(setting: str) -> None:
    slots, figures, rest = SETTINGS[setting]
    found = asdict(disclosure_of(recipe_of(slots)))
    assert found.pop("figures") == figures
    names = ("failures", "timing", "retries", "attempts", "absence", "cohort", "replays")
    assert found == {name: value == "1" for name, value in zip(names, rest, strict=True)}


def reports(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What three clients say in two rounds."""
    federation = Federation((Phase(recipe=recipe, rounds=2),))
    state, found = federation.start(), []

    def listened(job: Job, *arguments: Any) -> Reply:
        reply = run_job(job, *arguments)
        assert reply.raw is not None
        like = state.schema.split(state.params) | {"report": empty_report(job.recipe)}
        report = wire.receive(reply.raw, like).trees["report"]
        found.append({name: float(value) for name, value in report.items()})
        return reply

    monkeypatch.setattr("fedlora.engines.serial.run_job", listened)
    federation.go_on(state, 2)
    return found


@pytest.mark.parametrize("setting", [name for name in SETTINGS if "epsilon" not in name] + ["ranks"])
def test_a_report_says_what_may_be_known_and_nothing_else(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slots: dict[str, Any] = {"shrink": RankPruning(keep=0.5)} if setting == "ranks" else SETTINGS[setting][0]
    recipe = recipe_of(slots)
    known = disclosure_of(recipe).figures
    found = reports(recipe, monkeypatch)
    assert len(found) == 6
    assert [name for report in found for name, value in report.items() if value and name not in known] == []
    for name in (known - {"rank"}) | set(recipe.rank_pruning.reports):
        assert any(report[name] for report in found), name


def test_a_report_that_said_more_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loose = Disclosure(ALL, **dict.fromkeys(("failures", "timing", "retries", "attempts"), True), absence=True,
                       cohort=True, replays=True)  # fmt: skip
    monkeypatch.setattr("fedlora.client.jobs.disclosure_of", lambda recipe: loose)
    assert any(report["loss"] for report in reports(recipe_of(central(seed=0)), monkeypatch))


# ---- what a run writes, says and sends

MARKS = {"loss": 12345.625, "examples": 7777777, "steps": 5555555}


class Heard(Callback):
    def __init__(self) -> None:
        self.rows: list[RoundRecord] = []
        self.texts: list[str] = []

    def row_recorded(self, row: RoundRecord) -> None:
        self.rows.append(row)

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_tells_nobody_more(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients report figures that occur nowhere else; they are looked for in all that leaves a run."""
    slots, figures, open_ = SETTINGS[setting]
    recipe = recipe_of(slots)
    if isinstance(recipe.privacy, CentralGaussian):
        recipe = replace(recipe, privacy=replace(recipe.privacy, delta=1e-3))
    experiment, data = toy_run((Phase(recipe=recipe, rounds=1),), clients=3)
    trained, sent, heard = client.train, [], Heard()

    def marked(workspace: Workspace, turns: list[Ready]) -> list[LocalResult]:
        return [one._replace(**MARKS) for one in trained(workspace, turns)]

    def watched(engine: Serial, jobs: list[Job]) -> Iterator[Reply]:
        for job in jobs:
            reply = run_job(job, engine.workspace, engine.population.rows_of(job.client))
            sent.append(reply.raw or b"")
            yield reply

    monkeypatch.setattr(client, "train", marked)
    monkeypatch.setattr(Serial, "run", watched)
    with caplog.at_level(logging.DEBUG):
        run(experiment, tmp_path / "run", data=data, callbacks=[heard], until=1)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    written = "".join(path.read_text(errors="replace") for path in files)
    texts = "".join([written, caplog.text, repr(heard.rows), *heard.texts])
    for name, mark in MARKS.items():
        raw = struct.pack("<f", mark)
        told = any(f"{number:.10g}" in texts for number in (mark, 2 * mark, 3 * mark))
        found = told or any(raw in each for each in sent)
        assert found == (name in figures), name
    cohort = open_[5] == "1"
    assert all((row.cohort != ()) == cohort for row in heard.rows[1:])
    assert files
    assert len(sent) == 3


@pytest.mark.parametrize("noisy", [True, False])
def test_a_client_that_cannot_train_counts_as_zeros_under_noise(tmp_path: Path, noisy: bool) -> None:
    """Whether a batch can be trained on depends on the data, so nobody may be told."""
    privacy = CentralGaussian(clip_norm=0.5, noise_multiplier=1.0, delta=1e-3) if noisy else NoPrivacy()
    chosen, data = toy_run((Phase(recipe=Recipe(local=LOCAL, privacy=privacy), rounds=2),))
    loss = data.task.loss

    def masked(model: Any, batch: Any) -> Any:
        if bool((batch["labels"] == 0).sum() >= 2):
            raise TrainingError("every label is masked")
        return loss(model, batch)

    data.task.loss = masked  # type: ignore[method-assign]
    if not noisy:
        with pytest.raises(TrainingError, match="every label is masked"):
            run(chosen, tmp_path / "run", data=data)
        return
    result = run(chosen, tmp_path / "run", data=data)
    assert result.rounds == 2
    assert "masked" not in (tmp_path / "run" / "ledger.jsonl").read_text()
