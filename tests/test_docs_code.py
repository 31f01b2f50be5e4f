"""Code on pages: configurations are read as what they configure, and calls of ``fedlora`` are ones it accepts."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_docs import PAGES, name_of

from fedlora.cli.main import app
from fedlora.config import parse
from fedlora.config.reading import override
from fedlora.core.errors import FedloraError
from fedlora.federation.protocol.policies import ServerPolicy, SiteConfig
from fedlora.study.plan import parse_study

COMMANDS = typer.main.get_command(app)
PAGES = [path for path in PAGES if path.name != "CHANGELOG.md"]


def blocks(path: Path) -> list[tuple[str, str]]:
    """The fenced code of a page: language and text, without the indentation of the list that it stands in."""
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def read(document: dict[str, Any]) -> None:
    """Reads a document as a study, a site, a server's rules, a link or a configuration, as its keys say."""
    document.pop("extends", None)  # a file that is not on the page
    if "base" in document:
        parse_study(document)
    elif {"limits", "rows"} & document.keys():
        SiteConfig(**{"name": "site", "rows": "rows.jsonl", **document})
    elif "rules" in document:
        ServerPolicy(**document["rules"])
    elif "stages" in document:
        parse({"method": {"kind": "fedavg", "down": document}})
    else:
        if "method" in document:  # a part of [method] is one of any method
            document["method"] = {"kind": "fedavg", **document["method"]}
        parse(document)


def calls(text: str) -> list[list[str]]:
    """The arguments of each call of ``fedlora`` in shell lines; of a session, of the lines after ``$``."""
    text = text.replace("\\\n", " ")
    lines = text.splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        if line.lstrip().startswith("fedlora "):
            words = shlex.split(line.replace(">", " > "), comments=True)
            end = next((at for at, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
            found.append(words[1:end])
    return found


def refused(words: list[str]) -> str:
    """Why the command line does not accept a call; empty if it does."""
    command, rest, context = COMMANDS, words, typer.Context(COMMANDS)
    try:
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            command, rest = command.commands[rest[0]], rest[1:]
        context = command.make_context("fedlora", list(rest))
    except KeyError as error:
        return f"there is no command {error}"
    except Exception as error:
        return f"{error}"
    document: dict[str, Any] = {"method": {"kind": "flasc"}}
    try:
        for assignment in context.params.get("set_") or ():
            override(document, assignment)
        parse(document)
    except FedloraError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_configuration_on_a_page_is_read(path: Path) -> None:
    for language, text in blocks(path):
        if language == "toml":
            read(tomllib.loads(text))
        elif language == "yaml":
            read(yaml.safe_load(text))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_calls_on_a_page_are_accepted(path: Path) -> None:
    shell = [text for language, text in blocks(path) if language in ("", "sh", "bash", "shell", "console")]
    assert [(words, why) for text in shell for words in calls(text) if (why := refused(words))] == []


def test_code_that_does_not_work_is_found() -> None:
    good = "make demo\nfedlora show run.toml | tail -3\nfedlora run run.toml -s seed=1 --out runs/a   # trains\n"
    assert calls(good) == [["show", "run.toml"], ["run", "run.toml", "-s", "seed=1", "--out", "runs/a"]]
    assert calls("$ fedlora list\nfedlora is output\n") == [["list"]]
    assert [refused(words) for words in calls(good)] == ["", ""]
    bad = "fedlora runs x\nfedlora run x.toml --no\nfedlora run\nfedlora run x.toml -s sed=1\nfedlora federation x\n"
    assert all(refused(words) for words in calls(bad))
    for text in ("kind = 1", "[method]\nkind = 'flask'", "[clients]\nnumber = 3", "[limits]\nmax_rows = 3"):
        with pytest.raises((FedloraError, ValueError)):
            read(tomllib.loads(text))
