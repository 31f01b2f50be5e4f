"""Do two versions of fedlora give the same bits? Every pair of choices of a recipe, with unequal and few clients.

    python scripts/same_bits.py OLD NEW [--only WORDS]

OLD and NEW are checkouts, and each is recorded by its own copy of this script. It runs the recipes of its own
``tests/contracts/test_pairs.py`` for four rounds and goes on from a checkpoint after the second: in turn as they are,
with tiers of densities over networks, with tiers of ranks, with Poisson cohorts, and after a phase of a sparse mask;
and two runs without a federation. Compared are the whole state after each half (parameters, optimisers, memories,
folds, clips, ranks) and each row of the ledger without its times. A record is kept in ``build/same_bits`` by commit
where nothing is uncommitted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

RECORDS = Path("build/same_bits")
TIMES = ("seconds", "slowest_seconds", "tier_seconds", "network_seconds", "digest")
VARIANTS = ("plain", "densities", "ranks", "poisson", "phases")
HALF, ROUNDS = 2, 4


def main() -> int:
    """Compares two checkouts; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="of recipes with this in their names")
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.record:
        print(json.dumps(record(asked.only)))
        return 0
    old, new = (recorded(tree.resolve(), asked.only) for tree in (asked.old, asked.new))
    wrong = [name for name in old | new if old.get(name) != new.get(name)]
    for name in wrong:
        parts = sorted(
            part for part in old.get(name, {}) | new.get(name, {}) if _of(old, name, part) != _of(new, name, part)
        )
        print(f"{name}: {', '.join(parts)}")
    print(f"{len(old | new) - len(wrong)} of {len(old | new)} recipes have the same bits")
    return bool(wrong)


def _of(found: Mapping[str, Mapping[str, str]], name: str, part: str) -> str | None:
    return found.get(name, {}).get(part)


def recorded(tree: Path, only: str) -> dict[str, dict[str, str]]:
    """The record of a checkout, made now or before."""
    state = [["rev-parse", "HEAD"], ["status", "--porcelain", "src", "tests"]]
    commit, changed = (subprocess.check_output(["git", *words], cwd=tree, text=True).strip() for words in state)
    kept = RECORDS / f"{commit}-{only}.json"
    if not changed and kept.exists():
        return json.loads(kept.read_text())
    places = [str(tree / place) for place in ("src", "tests", "tests/contracts")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    out = subprocess.check_output(
        [sys.executable, str(tree / "scripts" / "same_bits.py"), str(tree), "--record", "--only", only],
        env=env,
        text=True,
    )
    if not changed:
        RECORDS.mkdir(parents=True, exist_ok=True)
        kept.write_text(out)
    return json.loads(out)


def record(only: str) -> dict[str, dict[str, str]]:
    """Hashes by recipe and part, of the fedlora that is imported."""
    os.fsync = lambda handle: None  # no power cut is to be borne here
    import warnings

    warnings.simplefilter("ignore")
    found: dict[str, dict[str, str]] = {}
    for name, experiment, data in runs():
        if only in name:
            found[name] = parts_of(experiment, data)
            print(len(found), name, file=sys.stderr)
    return found


def runs() -> Iterator[tuple[str, Any, Any]]:
    """A name, an experiment and its data for each run."""
    import test_pairs

    from fedlora.core.errors import ConfigError

    for number, names in enumerate(test_pairs.covering()):
        phases = test_pairs.phases_of(*names)
        for turn in range(len(VARIANTS)):
            variant = VARIANTS[(number + turn) % len(VARIANTS)]
            try:
                experiment, data = federation(phases, variant)
            except ConfigError:
                continue
            yield f"{' + '.join(names)} ({variant})", experiment, data
            break
    for mode in ("centralised", "local"):
        experiment, data = federation(test_pairs.phases_of("client sgd"), "plain", mode)
        yield mode, experiment, data


def federation(phases: Any, variant: str, mode: str = "federated") -> tuple[Any, Any]:
    """Six clients of eight examples, three in a round.

    Raises:
        ConfigError: the recipe cannot go with the variant.
    """
    import numpy as np
    import torch

    from fedlora.config import Evaluate, Experiment
    from fedlora.config.federated_data import FederatedData, in_mode
    from fedlora.population.clients import Clients
    from fedlora.population.skew import Classes
    from fedlora.population.tiers import Tier, assign_tiers
    from fedlora.recipe import Phase
    from fedlora.testing import equal_population, toy_task
    from fedlora.transport import TopK
    from fedlora.tuning import SparseMask

    network, tiers, sampling = "", (), "fixed"
    recipe = phases[0].recipe
    if variant == "densities":
        thin = replace(recipe.up, sparsify=TopK(density=0.25))
        tiers = (
            Tier(name="weak", share=0.5, up=thin, max_steps=1, network="down=1Mbit,up=1Mbit"),
            Tier(name="strong", share=0.5),
        )
        network = "down=10Mbit,up=1Mbit"
    if variant == "ranks":
        tiers = (Tier(name="low", share=0.5, rank=2), Tier(name="high", share=0.5))
    if variant == "poisson":
        sampling = "poisson"
    if variant == "phases":
        phases = (Phase(recipe=replace(recipe, tuning=SparseMask(density=0.1)), rounds=1), phases[0])
    clients = Clients(num=6, per_round=3, sampling=sampling, tiers=tiers, network=network)
    experiment = Experiment(mode=mode, num_local=2, clients=clients, phases=phases, evaluate=Evaluate(every=2))
    task = toy_task(num_examples=48)
    population = equal_population(48, 6 if mode != "centralised" else 1)
    rows = np.arange(48)
    data = FederatedData(
        task, population, rows, "train", torch.device("cpu"), Classes(np.asarray(task.labels), ("a", "b", "c"))
    )
    if mode == "federated" and tiers:
        data = replace(
            data, tiers=assign_tiers(tiers, population.names, [population.rows_of(k) for k in range(6)], None)
        )
    in_mode(experiment)
    return experiment, data


def parts_of(experiment: Any, data: Any) -> dict[str, str]:
    """Hashes of the state after each half, and of each row."""
    from fedlora import run
    from fedlora.core.errors import FedloraError

    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        for until in (HALF, ROUNDS):
            try:
                run(experiment, Path(place) / "run", data=data, until=until)
            except FedloraError as error:
                found[f"error of round {until}"] = str(error)
            for number, folder in enumerate(sorted(Path(place).rglob("round-*"))[-1:]):
                found |= {f"{until}/{number}/{part}": digest for part, digest in state_of(folder).items()}
        for number, ledger in enumerate(sorted(Path(place).rglob("ledger.jsonl"))):
            for line in ledger.read_text().splitlines():
                row = json.loads(line)
                row["networks"] = row.get("network_seconds") is not None
                text = json.dumps({key: value for key, value in row.items() if key not in TIMES}, sort_keys=True)
                found[f"ledger {number} row {row['round']}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def state_of(folder: Path) -> dict[str, str]:
    """Hashes of a checkpoint by part."""
    from fedlora.rounds.checkpoint import load_state

    return {part: _digest(value) for part, value in _parts(load_state(folder)[0]).items()}


def _parts(state: Any) -> dict[str, Any]:
    """What a state holds, by part."""
    known = dict(sorted(state.known.items()))
    ranks = [(client, memory.value("rank", "rank")) for client, memory in known.items() if "rank" in memory]
    held = {client: memory.tree("down", "held") for client, memory in known.items() if "down" in memory}
    return {
        "numbers": [state.phase, state.round, state.steps, state.parts.value("clip", "norm"), ranks],
        "groups": list(state.schema.groups.items()),
        "setup": [state.setup, sorted(state.setup_bytes.items())],
        "params": state.params,
        "init": state.init,
        "slots": state.parts.store("server").trees,
        "feedback": state.parts.tree("down", "lost"),
        "held": held,
        "folds": [state.folds.version, state.folds.total, list(state.folds.recent)],
        "clients": {client: _memory(one) for client, one in sorted(state.clients.items())},
    }


def _memory(one: Any) -> list[Any]:
    optimizer = sorted(one.parts.tree("optimizer", "state").items())  # it is looked up by name, and has no order
    lost, held = (one.parts.tree(*place) for place in (("residual", "lost"), ("down", "held")))
    return [one.has_setup, one.folds.version, one.folds.total, optimizer, lost, held]


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(value: Any) -> Iterator[bytes]:
    import torch

    if isinstance(value, torch.Tensor):
        yield str((tuple(value.shape), value.dtype)).encode()
        yield value.detach().contiguous().numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key).encode()
            yield from _pieces(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _pieces(one)
    else:
        yield repr(value).encode()


if __name__ == "__main__":
    sys.exit(main())
