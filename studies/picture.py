"""python -m studies.picture: draws accuracy against bytes of the runs in ``docs/results/wire.json``."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot

SOURCE, TARGET = Path("docs/results/wire.json"), Path("docs/results/wire.svg")
STYLES = {
    "dense": ("o", "tab:blue", "dense LoRA"),
    "flasc": ("s", "tab:orange", "FLASC"),
    "links": ("^", "tab:green", "links down and up chosen apart"),
}


def main() -> None:
    """A point per label: the mean over its seeds."""
    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "fedlora"  # the same picture from the same figures
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    points = []
    for label, seeds in json.loads(SOURCE.read_text())["final"].items():
        sent = [sum(run["down_bytes"].values()) + sum(run["up_bytes"].values()) for run in seeds.values()]
        # what clients receive, where that is not the server's own model
        accuracy = [run["after"].get("newcomer_accuracy", run["after"]["accuracy"]) for run in seeds.values()]
        points.append((label, len(seeds), sum(sent) / len(sent) / 1e6, sum(accuracy) / len(accuracy)))
    for kind, (marker, colour, name) in STYLES.items():
        for first, (label, count, x, y) in enumerate(one for one in points if one[0].split("-")[0] == kind):
            axes.plot(x, y, marker, color=colour, markersize=5 + 2 * count, label="" if first else name, linestyle="")
            # the names of those that nothing beats in both, as all of them would hide each other
            if kind == "dense" or not any(other[2] <= x and other[3] > y for other in points):
                axes.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.legend(loc="lower right")
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("megabytes in 60 rounds of 10 clients, both ways")
    axes.set_ylabel("accuracy on all test texts")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
