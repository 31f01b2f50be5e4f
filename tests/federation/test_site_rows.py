"""Rows on sites get the refusals and notes of rows here; both stay in the site's log."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from fixtures.fake_transport import Post
from fixtures.tiny import experiment, make_rows, tiny_world, write_rows

from fedlora.config import Experiment
from fedlora.core.errors import QuorumError
from fedlora.federation.deploy.federate import federate
from fedlora.federation.protocol.policies import ServerPolicy, SiteConfig, parse_as
from fedlora.federation.server import remote
from fedlora.federation.site.local_paths import without_paths
from fedlora.federation.site.site import Site

world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL", 0.001)


def one_site(world: Path, folder: Path, rows: Path, **settings: Any) -> Post:
    given = {
        "name": "clinic",
        "rows": str(rows),
        "state": str(folder / "state"),
        "model": {"path": str(world / "bert")},
    }
    return Post({"clinic": Site(parse_as(SiteConfig, {**given, **settings}, Path("site.toml")))})


def chosen(world: Path) -> Experiment:
    data = f"data={{kind='sites', test='{world / 'test.jsonl'}'}}"
    return experiment(world, "head_only", data, "clients.num=1", "clients.per_round=1", rounds=1)


def test_notes_on_a_sites_rows_are_in_its_log_and_are_not_sent(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "secret": "s"} for row in make_rows(12, 0)]
    rows[3]["text"] = " "
    post = one_site(world, tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    federate(chosen(world), tmp_path / "run", post, ServerPolicy(), names=["clinic"])
    assert "1 of 12 train rows have a blank 'text'" in caplog.text
    assert "the columns were not read: 'user', 'secret'" in caplog.text
    assert "blank" not in (tmp_path / "run" / "ledger.jsonl").read_text()
    assert not any(b"secret" in answer for answer in post.answers.values() if answer)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"label": None}, "column 'label' has no value in 1 of 12"),
        ({"label": " "}, "column 'label' is blank in 1 of the"),
        ({"label": "purple"}, "have labels that the model lacks: purple"),
        ({"text": None}, "column 'text' has no value in 1 of 12"),
        ({"text": 7}, "column 'text' of .* holds text in row 0 and a number in row 3"),
    ],
)
def test_rows_that_would_be_refused_here_are_refused_there(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], why: str
) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in make_rows(12, 0)]
    rows[3] |= change
    post = one_site(world, tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(QuorumError, match="its rows do not fit the task; see its own"),
    ):
        federate(chosen(world), tmp_path / "run", post, ServerPolicy(round_timeout=0.2), names=["clinic"])
    assert re.search(why, caplog.text), caplog.text


def test_a_site_names_the_format_of_its_file(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("text;label\n" + "".join(f"{row['text']};{row['label']}\n" for row in make_rows(12, 0)))
    post = one_site(world, tmp_path, file, format="csv", delimiter=";")
    federate(chosen(world), tmp_path / "run", post, ServerPolicy(), names=["clinic"])
    assert json.loads((tmp_path / "run" / "federation.json").read_text())["sites"]["clinic"][0] == 12


@pytest.mark.parametrize("broken", ["usage.json", "bert"])
def test_a_refusal_names_no_path_of_the_site(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    home = tmp_path / "Ann Lee"
    settings: dict[str, Any] = {"limits": {"max_runs": 1}}
    (home / "state").mkdir(parents=True)
    if broken == "bert":
        settings["model"] = {"path": str(home / "models" / "bert")}
    else:
        (home / "state" / broken).write_text("{")
    post = one_site(world, home, write_rows(tmp_path / "rows.jsonl", make_rows(12, 0)), **settings)
    with pytest.raises(QuorumError, match=broken):
        federate(chosen(world), tmp_path / "run", post, ServerPolicy(round_timeout=0.2), names=["clinic"])
    (sent,) = [answer for answer in post.answers.values() if answer]
    assert str(tmp_path).encode() not in sent
    assert b"Lee" not in sent
    assert str(home) in caplog.text


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("No such file: '/a b/c d.txt'", "No such file: 'c d.txt'"),
        ('"/a/b/" is empty, ~/x/y. is not, nor ../z/w', '"b" is empty, y. is not, nor w'),
        ("cannot import name x from y (/usr/lib/y.py)", "cannot import name x from y (y.py)"),
        ("/my data/site/state/x cannot be read", "x cannot be read"),
        ("org/model and https://hub.org/x/y, </s>, and/or, 20 MB/s, a / b", None),
    ],
)
def test_paths_are_told_from_other_slashes(text: str, sent: str | None) -> None:
    assert without_paths(text, [Path("/my data/site")]) == (text if sent is None else sent)
