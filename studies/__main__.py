"""python -m studies NAME tune|final|table: runs a study, or gathers what its runs left.

python -m studies newsgroups tune  --methods lora,flasc   learning rates, on a held-out part of the training data
python -m studies newsgroups final --seed 0               the runs themselves, at the chosen rates
python -m studies newsgroups table                        docs/results/newsgroups.json and its table

The data and models are those that the studies name; a stopped run goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from studies.study import Study


def main() -> None:
    """Reads the command line."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[name for name in names if name not in ("study", "picture")])
    parser.add_argument("command", choices=("tune", "final", "table"))
    parser.add_argument("--methods", default="")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    study: Study = importlib.import_module(f"studies.{given.name}").STUDY
    chosen = study.grids if given.command == "tune" else study.chosen
    labels = given.methods.split(",") if given.methods else list(chosen)
    if given.command == "tune":
        study.tune(labels)
    elif given.command == "final":
        study.final(given.seed, labels)
    else:
        study.table()


if __name__ == "__main__":
    main()
