"""The site of ``make docs``: it builds without a warning, needs no network to be read, and has every public name."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_public_surface import MODULES

import fedlora

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of any plugin fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def sources(text: str) -> Iterator[str]:
    """What a browser fetches to show a page: scripts, styles, pictures, fonts."""
    for tag, rest in re.findall(r"<(script|img|link|iframe|source|video|audio)\b([^>]*)>", text):
        if tag != "link" or not re.search(r'rel="?(canonical|next|prev|alternate)\b', rest):
            yield from re.findall(r'(?:src|href|srcset)="?([^"\s>]+)', rest)
    yield from re.findall(r"url\(['\"]?([^'\")]+)", text)
    yield from re.findall(r"@import ['\"]([^'\"]+)", text)


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 70
    fetched = {(file.name, one) for file in files for one in sources(file.read_text(encoding="utf-8"))}
    assert {one for one in fetched if re.match(r"(https?:)?//", one[1])} == set()
    assert {"bytes.svg", "update.svg"} <= {one.split("/")[-1] for _, one in fetched}


def test_sources_are_found() -> None:
    text = '<script src="https://a.org/x.js"></script><link rel="canonical" href="https://b.org">'
    assert list(sources(text + "<link href=//c.org/y.css><style>a { src: url('https://d.org/z.woff') }</style>")) == [
        "https://a.org/x.js",
        "//c.org/y.css",
        "https://d.org/z.woff",
    ]


def test_every_link_within_the_site_has_a_target(site: Path) -> None:
    pages = {
        file.resolve(): file.read_text(encoding="utf-8") for file in site.rglob("*.html") if file.name != "404.html"
    }
    ids = {file: set(re.findall(r'\bid="?([^"\s>]+)', text)) | {""} for file, text in pages.items()}
    broken = []
    for file, text in pages.items():
        for link in map(html.unescape, re.findall(r'<a\b[^>]*?href="([^"]+)"', text)):
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            aim = (file.parent / target).resolve() if target else file
            if not aim.exists() or (aim in ids and html.unescape(anchor) not in ids[aim]):
                broken.append((file.name, link))
    assert broken == []


def test_every_public_name_has_an_entry_with_its_docstring(site: Path) -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in site.glob("api/*.html"))
    names = [f"fedlora.{name}" for name in fedlora.__all__ if not name.startswith("_")]
    names += [f"{module}.{name}" for module, names in MODULES.items() for name in names]
    assert [name for name in names if f'id="{name}"' not in text] == []
    assert "rank of every adapter" in text  # a setting, in a dataclass of pydantic


def test_links_to_other_files_of_the_repository_lead_into_it(site: Path) -> None:
    text = (site / "tasks" / "instruction.html").read_text(encoding="utf-8")
    assert "/blob/main/examples/instruction.toml" in text
