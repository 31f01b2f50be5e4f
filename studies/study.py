"""What a study is: one federation, several methods, a grid of learning rates each, and the runs at the best of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import parse
from fedlora.experiment import run
from fedlora.folder import RunFolder

RUNS, TABLES = Path("runs"), Path("docs/results")
DATA, MODELS = Path("../shared/data"), Path("../shared/models")


@dataclass(frozen=True)
class Study:
    """One federation and the methods on it.

    Args:
        name: of its folder in ``runs`` and its file in ``docs/results``.
        metric: the task's main metric.
        document: label, learning rate, rounds, seed, and whether it is for tuning -> a whole configuration.
        grids: the client learning rates tried for each label.
        chosen: the best of each grid by ``metric`` on a held-out part of the training data after ``tuning_rounds``.
        tuning_rounds: rounds of a tuning run, seed 0.
        rounds: rounds of a final run.
        shown: rounds whose figures the table shows.
    """

    name: str
    metric: str
    document: Callable[[str, float, int, int, bool], dict[str, Any]]
    grids: dict[str, tuple[float, ...]]
    chosen: dict[str, float]
    tuning_rounds: int
    rounds: int
    shown: tuple[int, ...]

    def tune(self, labels: list[str]) -> None:
        """Runs every learning rate of every grid."""
        for label in labels:
            for rate in self.grids[label]:
                document = self.document(label, rate, self.tuning_rounds, 0, True)
                value = self._run(document, RUNS / self.name / "tune" / f"{label}-{rate:g}")
                print(self.name, label, rate, f"{value:.4f}", flush=True)

    def final(self, seed: int, labels: list[str]) -> None:
        """Runs every method at its chosen learning rate."""
        for label in labels:
            document = self.document(label, self.chosen[label], self.rounds, seed, False)
            print(self.name, label, seed, f"{self._run(document, self._final(label, seed)):.4f}", flush=True)

    def _final(self, label: str, seed: int) -> Path:
        return RUNS / self.name / f"{label}-{seed}"

    def _run(self, document: dict[str, Any], folder: Path) -> float:
        """The main metric of a run, which begins, goes on, or is over already."""
        experiment = parse(document)
        if (folder / "result.json").exists():
            RunFolder(folder).claim(experiment)  # refuses a run of other settings
        else:
            run(experiment, folder)
        return float(RunFolder(folder).read_json("result.json")["after"][self.metric])

    def gather(self) -> dict[str, Any]:
        """Tuning figures, and for each final run its result and its curve; those that were told, and the runs here."""
        file = TABLES / f"{self.name}.json"
        told = json.loads(file.read_text()) if file.exists() else {"tuning": {}, "final": {}}
        gathered: dict[str, Any] = {"tuning": {}, "final": {}}
        for label in {**self.chosen, **self.grids}:
            for kind in gathered:
                if label in told[kind]:
                    gathered[kind][label] = dict(told[kind][label])
            for rate in self.grids.get(label, ()):
                folder = RUNS / self.name / "tune" / f"{label}-{rate:g}"
                if (folder / "result.json").exists():
                    value = RunFolder(folder).read_json("result.json")["after"][self.metric]
                    gathered["tuning"].setdefault(label, {})[f"{rate:g}"] = round(value, 4)
            for folder in sorted((RUNS / self.name).glob(f"{label}-[0-9]")):
                if not (folder / "result.json").exists():
                    continue
                files = RunFolder(folder)
                sent, curve = 0, {}
                for row in files.rows():
                    sent += sum(row.down_bytes.values()) + sum(row.up_bytes.values())
                    if row.metrics:
                        rounded = {name: round(value, 4) for name, value in row.metrics.items()}
                        curve[str(row.round)] = {"megabytes": round(sent / 1e6, 3), **rounded}
                result = files.read_json("result.json")
                seeds = gathered["final"].setdefault(label, {})
                seeds[str(result["seed"])] = {**result, "curve": curve}
        return gathered

    def table(self) -> None:
        """Adds the runs here to ``docs/results/<name>.json`` and prints it as Markdown."""
        gathered = self.gather()
        TABLES.mkdir(parents=True, exist_ok=True)
        (TABLES / f"{self.name}.json").write_text(json.dumps(gathered, indent=1) + "\n")
        rounds = " | ".join(f"round {number}" for number in self.shown)
        print(f"| method | seed | rate | MB down | MB up | {rounds} | all test examples |")
        print("|---" * (6 + len(self.shown)) + "|")
        for label, seeds in gathered["final"].items():
            for seed, result in seeds.items():
                down, up = (sum(result[key].values()) / 1e6 for key in ("down_bytes", "up_bytes"))
                found = (result["curve"].get(str(number)) for number in self.shown)
                cells = [f"{row[self.metric]:.3f}" if row else "" for row in found]
                cells.append(f"{result['after'][self.metric]:.3f}")
                rate = self.chosen[label]
                print(f"| {label} | {seed} | {rate:g} | {down:.2f} | {up:.2f} | {' | '.join(cells)} |")
        for label, found in gathered["tuning"].items():
            print(
                f"- {label}, rate: {self.metric}: " + ", ".join(f"{rate}: {value:.3f}" for rate, value in found.items())
            )


def method(label: str, rate: float, rounds: int, **local: Any) -> dict[str, Any]:
    """The ``[method]`` table of a label at a client learning rate: AdamW on clients, plain averaging at the server.

    ``flasc`` ranks the parameters themselves, as the paper does; ``flasc_adamw`` has the official code's server beside
    (AdamW, 5e-3). ``flasc_init`` ranks what changed since the start, and clients keep that start.

    Args:
        label: a method's name, maybe with a variant behind ``_``.
        rate: of the clients' AdamW.
        rounds: of the run.
        local: further settings of a client's turn.
    """
    settings = {"optimizer": {"kind": "adamw", "lr": rate}, "batch_size": 16, **local}
    table: dict[str, Any] = {"kind": label.split("_")[0], "rounds": rounds, "local": settings}
    if label in ("flasc", "flasc_init"):
        table["server"] = {"kind": "sgd", "lr": 1.0}
    if label == "flasc_init":
        table |= {"reference": "init", "memory": "init"}
    if label == "slora":
        table |= {"warm_rounds": max(1, rounds // 5), "warm_local": settings}
    return table
