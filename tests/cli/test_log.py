"""What commands print beside their results: details, quiet, a log file, bars."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
import tomli_w
from fixtures.tiny import document, tiny_world
from rich.console import Console
from typer.testing import CliRunner, Result

import fedlora
from fedlora.cli import log
from fedlora.cli.log import Printing
from fedlora.cli.main import app, common_first
from fedlora.core.errors import ConfigError
from fedlora.core.progress import LOG, counted, listening

world = pytest.fixture(scope="module")(tiny_world)
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) (.*)")


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app, common_first(list(map(str, arguments))), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document(world)))
    return tmp_path / "run.toml"


def rounds(text: str) -> list[str]:
    return re.findall(r"round (\d+)/3  (?:loss|accuracy)", text)


def test_common_options_work_before_and_after_a_command() -> None:
    given = ["run", "x.toml", "--log-file", "log", "-s", "a=1", "-v", "--", "-q"]
    assert common_first(given) == ["--log-file", "log", "-v", "run", "x.toml", "-s", "a=1", "--", "-q"]
    assert common_first(["--log-file=a", "list", "--quiet"]) == ["--log-file=a", "--quiet", "list"]
    assert common_first(["run", "--log-file"]) == ["--log-file", "run"]


def test_quiet_prints_the_result_alone_and_verbose_every_round(config: Path, tmp_path: Path) -> None:
    quiet = invoke("run", config, "--out", tmp_path / "quiet", "-q")
    assert [line.split(":")[0] for line in quiet.stderr.splitlines()] == ["  round 0", "  round 3"]  # two warnings
    assert "accuracy" in quiet.stdout
    plain = invoke("run", config, "--out", tmp_path / "plain")
    assert rounds(plain.stderr) == ["0", "2", "3"]
    file = tmp_path / "log.txt"
    for _ in range(2):
        verbose = invoke("run", config, "--out", tmp_path / "verbose", "--verbose", "--log-file", file)
    assert "resuming" not in plain.stderr
    lines = [LINE.fullmatch(line) for line in file.read_text().splitlines()]
    assert all(lines)
    logged = "\n".join(line[2] for line in lines if line)
    assert rounds(logged)[:4] == ["0", "1", "2", "3"]
    assert "reading the data and the model" in logged
    # a file is appended to, and has what is printed and the stages that only a terminal shows
    log.set_up(verbose=False, quiet=False, file=None)
    printed = [line for line in verbose.stderr.splitlines() if line]
    assert printed
    assert set(printed) <= set(logged.splitlines())


def test_options_that_cannot_be_met_are_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--verbose prints more and --quiet less"):
        invoke("-v", "-q", "show", config)
    with pytest.raises(ConfigError, match=r"--log-file .*none/log cannot be written \(No such file or directory\)"):
        invoke("show", config, "--log-file", tmp_path / "none" / "log")


def test_stages_are_for_terminals_and_colours_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(terminal: bool) -> str:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        for level, text, stage in ((20, "loading", True), (30, "[odd]", False), (20, "a line", False)):
            record = logging.LogRecord("fedlora", level, "", 0, text, (), None)
            record.__dict__["stage"] = stage
            Printing(console).emit(record)
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    assert printed(False) == "[odd]\na line\n"
    assert "loading ..." in printed(True)
    assert "\x1b[33m[odd]" in printed(True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in printed(True)


def test_a_line_is_printed_once_where_a_library_logs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    console, library = Console(file=io.StringIO()), io.StringIO()
    monkeypatch.setattr(log, "ERR", console)
    handler = logging.StreamHandler(library)
    logging.getLogger().addHandler(handler)
    try:
        log.set_up(verbose=False, quiet=False, file=None)
        LOG.info("a line")
    finally:
        logging.getLogger().removeHandler(handler)
    assert (console.file.getvalue(), library.getvalue()) == ("a line\n", "")  # type: ignore[attr-defined]


def test_parts_are_counted_for_a_listener_alone(world: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with listening(lambda done, total: calls.append((done, total))):
        assert list(counted("abc")) == ["a", "b", "c"]
    assert list(counted("abc")) == ["a", "b", "c"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document(world, rounds=1)))
    invoke("run", tmp_path / "run.toml", "--out", tmp_path / "run")
    run = fedlora.load_run(tmp_path / "run")
    del calls[:]
    with listening(lambda done, total: calls.append((done, total))):
        run.predict(["red"] * 3)
    assert calls == [(1, 1)]


def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, quiet in ((False, False), (True, True), (True, False)):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80, _environ={"TERM": "xterm"})
        monkeypatch.setattr(log, "ERR", console)
        log.set_up(verbose=False, quiet=quiet, file=None)
        with log.bar("evaluating"):
            list(counted(range(4)))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("evaluating" in shown, "100%" in shown) == (terminal and not quiet,) * 2
