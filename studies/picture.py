"""python -m studies.picture: draws accuracy against bytes of the runs in ``docs/results/wire.json``."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot

SOURCE, TARGET = Path("docs/results/wire.json"), Path("docs/results/wire.svg")
STYLES = {
    "dense": ("o", "tab:blue"),
    "flasc": ("s", "tab:orange"),
    "links": ("^", "tab:green"),
    "ffa": ("v", "tab:red"),
}


def main() -> None:
    """A point per label: the mean over its seeds."""
    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "fedlora"  # the same picture from the same figures
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for label, seeds in json.loads(SOURCE.read_text())["final"].items():
        sent = [sum(run["down_bytes"].values()) + sum(run["up_bytes"].values()) for run in seeds.values()]
        # what clients receive, where that is not the server's own model
        accuracy = [run["after"].get("newcomer_accuracy", run["after"]["accuracy"]) for run in seeds.values()]
        x, y = sum(sent) / len(sent) / 1e6, sum(accuracy) / len(accuracy)
        marker, colour = STYLES[label.split("-")[0]]
        axes.plot(x, y, marker, color=colour, markersize=5 + 2 * len(seeds))
        axes.annotate(label, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("megabytes in 60 rounds of 10 clients, both ways")
    axes.set_ylabel("accuracy on all test texts")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
