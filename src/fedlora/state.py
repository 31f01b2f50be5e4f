"""The values that change from round to round, the seeds they are drawn with, and how they are kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from xxhash import xxh3_64

from fedlora.errors import CheckpointError
from fedlora.files import new_folder
from fedlora.tree import Tree

SEED_BITS = 48

FORMAT = 4
"""The version of the checkpoint format."""

_MEMORY = ("optimizer", "feedback", "held")


def named_seed(run_seed: int, purpose: str, *numbers: int) -> int:
    """A seed of its own for every purpose, so that one more draw here never moves a draw there.

    Args:
        run_seed: the seed of the run.
        purpose: what the draw is for (``"cohort"``, ``"client"``, ``"noise"``).
        numbers: round, client, and whatever else tells two draws apart.

    Returns:
        An integer in ``[0, 2**48)``.
    """
    text = "/".join([str(run_seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=SEED_BITS // 8).digest(), "little")


def generator(seed: int) -> torch.Generator:
    """A CPU generator that starts at ``seed``."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Fold:
    """An edit of frozen weights: ``W[m] += scale * B @ A``, or ``W[m] += D``.

    Args:
        factors: module name to ``(B, A)`` of shapes ``(out, r)`` and ``(r, in)``, the same ``r`` for all; the layer
            knows its scale.
        dense: parameter name to a tensor of the parameter's own shape.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dense: Tree = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.factors or self.dense)


@dataclass(frozen=True)
class Folds:
    """All folds of a phase's rounds together, as the server or a client holds them.

    Args:
        version: how many there were.
        total: module name to the sum of ``B @ A``, ``(out, in)``; nothing before the first.
        recent: the last of them, as long as they are smaller than their sum: module name and ``.B`` or ``.A`` to a
            factor. The server's alone.
    """

    version: int = 0
    total: Tree = field(default_factory=dict)
    recent: tuple[Tree, ...] = ()


class Update(NamedTuple):
    """What one client answered: where it started, what it changed, and how much its word weighs."""

    start: Tree
    delta: Tree
    weight: float


class Change(NamedTuple):
    """What a cohort's updates become: a step of the trained parameters, and an edit of the frozen ones."""

    delta: Tree
    fold: Fold


class Carry(NamedTuple):
    """What a phase hands to the next one.

    Args:
        delta: name of a pre-trained parameter to its accumulated change, dense, in the parameter's shape.
        head: the task head's trained values.
    """

    delta: Tree
    head: Tree


@dataclass(frozen=True)
class ClientState:
    """What a client remembers between rounds.

    Args:
        has_setup: whether it holds this phase's setup.
        optimizer: its optimiser's state.
        feedback: what its last message lost, to be added to the next one.
        held: the parameters that it got last.
        folds: the edits of frozen weights that it made.
        kept: what a site calls the rest, where the client's memory is on a site; the server then knows ``has_setup``
            and how many folds there are, and no more.
    """

    has_setup: bool = False
    optimizer: Tree = field(default_factory=dict)
    feedback: Tree = field(default_factory=dict)
    held: Tree = field(default_factory=dict)
    folds: Folds = Folds()
    kept: str = ""


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows between two rounds; saving it and loading it changes nothing.

    Args:
        phase: index of the running phase.
        round: rounds finished in all phases together.
        params: the trained parameters, dense, float32.
        init: where this phase started; public.
        groups: ``adapter`` or ``head`` for each parameter.
        setup: the message that tells a client of the frozen part (residual, fold, mask seed).
        setup_bytes: its size by kind.
        slots: the server optimiser's state, a tree per slot.
        steps: server steps taken in this phase.
        feedback: what the last message to clients lost.
        held: the parameters that each client got last, by client number; the server's own copy.
        folds: the edits of frozen weights in this phase's rounds.
        ranks: of clients that gave up some, by client number.
        clip_norm: what updates are clipped to in the next round, where that adapts.
        clients: what clients remember, by client number; a simulation keeps it for them.
    """

    phase: int
    round: int
    params: Tree
    init: Tree
    groups: dict[str, str]
    setup: bytes = b""
    setup_bytes: dict[str, int] = field(default_factory=dict)
    slots: dict[str, Tree] = field(default_factory=dict)
    steps: int = 0
    feedback: Tree = field(default_factory=dict)
    held: Mapping[int, Tree] = field(default_factory=dict)
    folds: Folds = Folds()
    clip_norm: float | None = None
    ranks: Mapping[int, int] = field(default_factory=dict)
    clients: Mapping[int, ClientState] = field(default_factory=dict)


def save_state(state: ServerState, folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes ``state`` into ``folder`` so that a reader sees all of it or nothing.

    The tensors go to ``state.safetensors`` and the rest to ``state.json`` in a new folder beside it, which is flushed
    to the disk and then renamed.

    Args:
        state: what to save.
        folder: where to; replaced if it exists.
        facts: JSON values to keep with it, such as the configuration's digest.

    Raises:
        OSError: the disk refused; what was saved before is untouched.
    """
    tensors: Tree = {}
    # a phase starts at its init, and safetensors refuses tensors that share memory
    init = {name: value.clone() for name, value in state.init.items()}
    for part, tree in {"params": state.params, "init": init, **_prefixed("slots", state.slots)}.items():
        tensors.update({f"{part}/{name}": value for name, value in tree.items()})
    tensors.update({f"feedback/{name}": value for name, value in state.feedback.items()})
    trees = {f"held/{client}": held for client, held in state.held.items()}
    for client, memory in state.clients.items():
        for part in _MEMORY:
            trees[f"clients/{client}/{part}"] = getattr(memory, part)
    # clients that know of the same folds have the same sum
    for folds in (*(memory.folds for memory in state.clients.values()), state.folds):
        if folds.total:  # a site keeps the sum of its clients
            trees[f"folds/{folds.version}"] = folds.total
    trees |= {f"recent/{place}": fold for place, fold in enumerate(state.folds.recent)}
    # a message to several clients is one tree to the server
    tensors.update(
        {f"{prefix}/{name}": value.clone() for prefix, tree in trees.items() for name, value in tree.items()}
    )
    if state.setup:
        tensors["setup"] = torch.frombuffer(bytearray(state.setup), dtype=torch.uint8)
    numbers = {
        "phase": state.phase,
        "round": state.round,
        "steps": state.steps,
        "folds": state.folds.version,
        "clip_norm": state.clip_norm,
        "ranks": {str(client): rank for client, rank in state.ranks.items()},
    }
    order = {"groups": list(state.groups.items()), "slots": list(state.slots), "setup_bytes": state.setup_bytes}
    clients = {
        str(client): [memory.has_setup, memory.folds.version, memory.kept] for client, memory in state.clients.items()
    }
    document: dict[str, Any] = {"format": FORMAT, **numbers, "order": order, "clients": clients, "facts": dict(facts)}
    with new_folder(folder) as place:
        try:
            # safetensors reports a full disk as an error of its own
            save_file({name: value.contiguous() for name, value in tensors.items()}, place / "state.safetensors")
        except SafetensorError as error:
            raise OSError(f"could not write {place}: {error}") from error
        document["digest"] = _digest(place / "state.safetensors")
        (place / "state.json").write_text(json.dumps(document, indent=1))


def load_state(folder: Path) -> tuple[ServerState, dict[str, Any]]:
    """Reads what ``save_state`` wrote.

    Returns:
        The state, and the facts saved with it.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    try:
        document = json.loads((folder / "state.json").read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, and this version reads {FORMAT}")
        if document["digest"] != _digest(folder / "state.safetensors"):
            raise ValueError("state.safetensors is not the file that was written")
        tensors = load_file(folder / "state.safetensors")
        groups = dict(document["order"]["groups"])
        names = list(groups)
        clients: dict[int, dict[str, Tree]] = {int(client): {} for client in document["clients"]}
        held: dict[int, Tree] = {}
        totals: dict[int, Tree] = {}
        recent: dict[int, Tree] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "clients":
                client, part, name = rest.split("/", 2)
                clients[int(client)].setdefault(part, {})[name] = value
            elif kind in ("held", "folds", "recent"):
                number, name = rest.split("/", 1)
                {"held": held, "folds": totals, "recent": recent}[kind].setdefault(int(number), {})[name] = value
        known = {version: Folds(version, dict(sorted(total.items()))) for version, total in totals.items()}
        memories = {int(client): told for client, told in document["clients"].items()}
        for version in (document["folds"], *(version for _, version, _ in memories.values())):
            known.setdefault(version, Folds(version))
        state = ServerState(
            phase=document["phase"],
            round=document["round"],
            steps=document["steps"],
            clip_norm=document["clip_norm"],
            ranks={int(client): rank for client, rank in document["ranks"].items()},
            params={name: tensors[f"params/{name}"] for name in names},
            init={name: tensors[f"init/{name}"] for name in names},
            groups=groups,
            setup_bytes=document["order"]["setup_bytes"],
            setup=tensors["setup"].numpy().tobytes() if "setup" in tensors else b"",
            slots={
                slot: {name: tensors[f"slots/{slot}/{name}"] for name in names} for slot in document["order"]["slots"]
            },
            feedback={name: tensors[f"feedback/{name}"] for name in names if f"feedback/{name}" in tensors},
            folds=replace(
                known[document["folds"]], recent=tuple(dict(sorted(recent[place].items())) for place in sorted(recent))
            ),
            held={client: {name: tree[name] for name in names} for client, tree in sorted(held.items())},
            clients={
                client: ClientState(
                    has_setup=memories[client][0],
                    folds=known[memories[client][1]],
                    kept=memories[client][2],
                    optimizer=memory.get("optimizer", {}),
                    **{part: _ordered(memory.get(part, {}), names) for part in ("feedback", "held")},
                )
                for client, memory in clients.items()
            },
        )
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read ({type(error).__name__}: {error}); "
            "remove that folder to go on from the one before it"
        ) from error
    return state, document["facts"]


def _ordered(tree: Tree, names: list[str]) -> Tree:
    """``tree`` in the order of ``names``: sums must not depend on a file's order."""
    return {name: tree[name] for name in names} if tree else {}


def _prefixed(prefix: str, trees: Mapping[str, Tree]) -> dict[str, Tree]:
    return {f"{prefix}/{name}": tree for name, tree in trees.items()}


def _digest(path: Path) -> str:
    digest = xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
