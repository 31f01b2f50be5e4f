"""python -m benchmarks.handover RUN...: what low-rank adapters can take over of a sparse mask's change, by layout.

RUN is the folder of a run whose tuning is `sparse_mask`, such as the first phase of SLoRA alone:

    fedlora run warm.toml --out runs/warm    # [method] kind = "fedavg", tuning = { kind = "sparse_mask" }

All layouts send as many numbers as a LoRA of `--rank` on the default targets. `rank by energy` takes the singular
triplets of all matrices in the order of energy per number, the most that any choice of ranks could keep.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fedlora.core.tree import Tree
from fedlora.rounds.phases import close_phase
from fedlora.runs.inference import load_run
from fedlora.tuning.targets import find


def energies(delta: Tree) -> dict[str, Tensor]:
    """Squared singular values of each matrix, the largest first."""
    return {name: torch.linalg.svdvals(value.double()).square() for name, value in delta.items() if value.dim() == 2}


def kept(spectra: dict[str, Tensor], ranks: dict[str, int]) -> float:
    """Energy of the first ranks of each matrix, as a share of all."""
    total = sum(float(values.sum()) for values in spectra.values())
    return sum(float(spectra[name][:rank].sum()) for name, rank in ranks.items()) / total


def by_energy(spectra: dict[str, Tensor], sides: dict[str, int], numbers: int) -> dict[str, int]:
    """How many ranks each matrix gets out of a budget of numbers, greedily by energy per number."""
    choices = sorted(
        ((float(value) / sides[name], name) for name, values in spectra.items() for value in values), reverse=True
    )
    ranks: dict[str, int] = dict.fromkeys(spectra, 0)
    for _, name in choices:
        if numbers >= sides[name]:
            ranks[name] += 1
            numbers -= sides[name]
    return ranks


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    print(
        "| run | numbers | adapters on the default targets | on all matrices | rank by energy |\n|---|---|---|---|---|"
    )
    for run in given.runs:
        trained = load_run(run)
        state, workspace = trained.state, trained.workspace
        delta = close_phase(workspace, trained.recipe, state).delta
        spectra = energies(delta)
        sides = {name: sum(delta[name].shape) for name in spectra}
        head = frozenset(name for name, group in state.schema.groups.items() if group == "head")
        targets = {f"{name}.weight" for name in find(workspace.model, "default", head)}
        numbers = given.rank * sum(size for name, size in sides.items() if name in targets)
        everywhere = numbers // sum(sides.values())
        few = kept(spectra, {name: given.rank for name in spectra if name in targets})
        wide = kept(spectra, dict.fromkeys(spectra, everywhere))
        best = kept(spectra, by_energy(spectra, sides, numbers))
        columns = (run.name, f"{numbers:,}", f"{few:.3f} (rank {given.rank})", f"{wide:.3f} (rank {everywhere})")
        print(f"| {' | '.join(columns)} | {best:.3f} |")


if __name__ == "__main__":
    main()
