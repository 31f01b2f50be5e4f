"""The pages in a real browser, where a headless Chromium is installed: nothing fails, everything is drawn and fits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fixtures.tiny import experiment, tiny_world
from typer.testing import CliRunner

import fedlora
from fedlora.cli.main import app

pytest.importorskip("matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
MEASURE = """<script>
const found = {errors: errors, wide: document.documentElement.scrollWidth - innerWidth, figures: {}};
for (const figure of document.querySelectorAll("figure")) {
  const drawing = figure.querySelector("svg"), place = drawing.getBoundingClientRect();
  const marks = [...drawing.querySelectorAll("path, use, image")].map(mark => mark.getBoundingClientRect());
  const texts = [...drawing.querySelectorAll("text")].map(text => text.getBoundingClientRect());
  const across = [...drawing.querySelectorAll("g[id^=xtick] text")].map(text => text.getBoundingClientRect());
  across.sort((one, other) => one.left - other.left);
  found.figures[figure.id] = {
    width: place.width, height: place.height, marks: marks.filter(mark => mark.width + mark.height > 0).length,
    smallest: Math.min(...texts.map(text => Math.max(text.width, text.height))),
    outside: texts.filter(text => text.left < place.left - 2 || text.right > place.right + 2).length,
    overlaps: across.filter((text, at) => at && text.left < across[at - 1].right - 1).length};
}
document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
document.getElementById("found").textContent = JSON.stringify(found);
</script>"""
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module")
def pages(world: Path) -> dict[str, Path]:
    every = (
        "evaluate.every=1",
        "clients.network='down=10Mbit,up=1Mbit'",
        "clients.holdout=0.25",
        "evaluate.clients=end",
    )
    folders = [
        str(fedlora.run(experiment(world, method, *every, rounds=2), world / method).folder)
        for method in ("lora", "slora")
    ]
    calls = {
        "report": ["report", *folders, "--out"],
        "partition": ["partition", folders[0], "--html"],
    }
    for name, call in calls.items():
        done = CliRunner().invoke(app, [*call, str(world / f"{name}.html")])
        assert done.exit_code == 0, done.output
    return {name: world / f"{name}.html" for name in calls}


def measured(page: Path, width: int, folder: Path) -> tuple[dict[str, Any], str]:
    """What a browser window of this width shows of a page, and the messages of its console."""
    text = page.read_text().replace(
        "<head>", "<head><script>const errors = []; onerror = e => errors.push(e);</script>"
    )
    copy = folder / "page.html"
    copy.write_text(text.replace("</body>", f"{MEASURE}</body>"))
    call = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2000", "--dump-dom"]
    done = subprocess.run([*call, copy.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    values: dict[str, Any] = json.loads(unescape(found[1]))
    return values, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize(("name", "width"), [("report", 1200), ("report", 500), ("partition", 500)])
def test_a_browser_draws_the_page(pages: dict[str, Path], name: str, width: int, tmp_path: Path) -> None:
    found, console = measured(pages[name], width, tmp_path)
    assert (found["errors"], console) == ([], "")
    assert found["wide"] <= 0, "the page scrolls sideways"
    assert len(found["figures"]) == pages[name].read_text().count("<figure") > 0
    for figure, shown in found["figures"].items():
        assert shown["width"] > 250, figure
        assert shown["height"] > 80, figure
        assert shown["marks"] > 5, figure
        assert shown["smallest"] >= 7, f"{figure} has a text of {shown['smallest']:.1f} pixels"
        assert (shown["outside"], shown["overlaps"]) == (0, 0), figure
