"""python -m studies.picture: draws accuracy against bytes (``wire.json``) and against rounds (``banking77.json``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from studies.banking77 import ALPHAS

TABLES = Path("docs/results")
STYLES = {
    "dense": ("o", "tab:blue", "dense LoRA"),
    "flasc": ("s", "tab:orange", "FLASC"),
    "links": ("^", "tab:green", "links down and up chosen apart"),
}


NAMES = {
    "full": "full fine-tuning",
    "ffa": "FFA-LoRA",
    "primed_lora": "Primed-LoRA",
    "federa": "FeDeRA",
    "lora": "LoRA",
    "slora": "SLoRA",
    "fedex": "FedEx-LoRA",
    "rolora": "RoLoRA",
    "flexlora": "FlexLoRA",
    "flora": "FLoRA",
}


def main() -> None:
    """Both pictures, the same from the same figures."""
    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "fedlora"
    _bytes()
    _rounds()


def _runs(study: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((TABLES / f"{study}.json").read_text())["final"]
    return found


def _bytes() -> None:
    """A point per label: the mean over its seeds."""
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    points = []
    for label, seeds in _runs("wire").items():
        sent = [sum(run["down_bytes"].values()) + sum(run["up_bytes"].values()) for run in seeds.values()]
        # what clients receive, where that is not the server's own model
        accuracy = [run["after"].get("newcomer_accuracy", run["after"]["accuracy"]) for run in seeds.values()]
        points.append((label, len(seeds), sum(sent) / len(sent) / 1e6, sum(accuracy) / len(accuracy)))
    for kind, (marker, colour, name) in STYLES.items():
        for first, (label, count, x, y) in enumerate(one for one in points if one[0].split("-")[0] == kind):
            axes.plot(x, y, marker, color=colour, markersize=5 + 2 * count, label="" if first else name, linestyle="")
            # the names of those that nothing beats in both, as all of them would hide each other
            if kind == "dense" or not any(other[2] <= x and other[3] > y for other in points):
                # left of the links and right of all else, as they lie close to FLASC's
                left = kind == "links"
                place = {"xytext": (-7 if left else 8, -3), "ha": "right" if left else "left"}
                axes.annotate(label, (x, y), **place, textcoords="offset points", fontsize=8)
    axes.legend(loc="lower right")
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("megabytes in 60 rounds of 10 clients, both ways")
    axes.set_ylabel("accuracy on all test texts")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(TABLES / "wire.svg", metadata={"Date": None})


def _rounds() -> None:
    """A line per method and a panel per concentration: the mean over seeds."""
    runs = _runs("banking77")
    figure, panels = pyplot.subplots(1, len(ALPHAS), figsize=(12, 5), sharey=True)
    for axes, alpha in zip(panels, ALPHAS, strict=True):
        for place, (method, name) in enumerate(NAMES.items()):
            curves = [run["curve"] for run in runs[f"{method}_{alpha}"].values()]
            rounds = sorted(int(number) for number in curves[0])
            means = [sum(curve[str(number)]["accuracy"] for curve in curves) / len(curves) for number in rounds]
            axes.plot(rounds, means, color=f"C{place}", marker="os^vD"[place % 5], markersize=4, label=name)
        axes.set_title(f"alpha {alpha}")
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on 1,000 test texts, mean of seeds")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(TABLES / "banking77.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
