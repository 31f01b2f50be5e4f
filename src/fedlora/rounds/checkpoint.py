"""Checkpoints of the server's state: written atomically, with damage detected on reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.core.digests import DIGESTS, damaged, of_file
from fedlora.core.errors import CheckpointError
from fedlora.core.files import new_folder
from fedlora.core.schema import Leaf, Schema, factor_leaf
from fedlora.core.state import ClientState, Folds, ServerState
from fedlora.core.store import Memory, Reader, Writer

FORMAT = 5
"""The version of the checkpoint format."""
READABLE = 4
"""The previous version, of which only the model can be read."""
_TENSORS, _DOCUMENT = "state.safetensors", "state.json"


def save_state(state: ServerState, folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes ``state`` into ``folder`` atomically: a reader sees all of it or nothing.

    Args:
        state: the state to save.
        folder: the target folder; replaced if it exists.
        facts: JSON values stored with it, such as the configuration's digest.

    Raises:
        OSError: writing failed; the previous checkpoint is untouched.
    """
    writer = Writer()
    document = {
        "format": FORMAT,
        "phase": state.phase,
        "round": state.round,
        "steps": state.steps,
        "schema": state.schema.as_json(),
        "params": writer.tree(state.params),
        "init": writer.tree(state.init),
        "setup_bytes": state.setup_bytes,
        "parts": writer.memory(state.parts),
        "known": {str(client): writer.memory(memory) for client, memory in state.known.items()},
        "clients": {
            str(client): [memory.has_setup, memory.kept, writer.memory(memory.parts)]
            for client, memory in state.clients.items()
        },
        "facts": dict(facts),
    }
    if state.setup:
        writer.tensors["setup"] = torch.frombuffer(bytearray(state.setup), dtype=torch.uint8)
    with new_folder(folder) as made:
        save_file(writer.tensors, made / _TENSORS)
        document["digest"] = of_file(made / _TENSORS)
        (made / _DOCUMENT).write_text(json.dumps(document))


def load_state(folder: Path) -> tuple[ServerState, dict[str, Any]]:
    """Reads a checkpoint written by ``save_state``; of the previous format, only the model.

    Returns:
        The state, and the facts saved with it.

    Raises:
        CheckpointError: a file is missing, or differs from what was written.
    """
    try:
        document = json.loads((folder / _DOCUMENT).read_text())
        if document["format"] not in (FORMAT, READABLE):
            raise ValueError(f"its format is {document['format']}, and this version reads {READABLE} and {FORMAT}")
        wrong = damaged(folder)
        if not (folder / DIGESTS).exists() and document["digest"] != of_file(folder / _TENSORS):
            wrong = _TENSORS  # a checkpoint of an older version
        if wrong:
            raise ValueError(f"{wrong} is not the file that was written")
        tensors = load_file(folder / _TENSORS)
        state = (_state if document["format"] == FORMAT else _model_of_before)(document, tensors)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read ({type(error).__name__}: {error}); "
            f"resume from the one before it, if there is one, with: fedlora run {folder.parent.parent}"
        ) from error
    return state, document["facts"]


def can_go_on(folder: Path) -> bool:
    """Whether a readable checkpoint contains everything needed to resume the run, not only the model."""
    return bool(json.loads((folder / _DOCUMENT).read_text())["format"] == FORMAT)


def _state(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> ServerState:
    reader = Reader(tensors)
    return ServerState(
        phase=document["phase"],
        round=document["round"],
        steps=document["steps"],
        schema=Schema.from_json(document["schema"]),
        params=reader.tree(document["params"]),
        init=reader.tree(document["init"]),
        setup=tensors["setup"].numpy().tobytes() if "setup" in tensors else b"",
        setup_bytes=document["setup_bytes"],
        parts=reader.memory(document["parts"]),
        known={int(client): reader.memory(memory) for client, memory in document["known"].items()},
        clients={
            int(client): ClientState(has_setup, reader.memory(parts), kept)
            for client, (has_setup, kept, parts) in document["clients"].items()
        },
    )


def _model_of_before(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> ServerState:
    """The model from a checkpoint of version 0.1.0, without the state needed to resume the run."""
    groups = dict(document["order"]["groups"])
    schema = Schema({name: Leaf(group) for name, group in groups.items()})
    for name in groups:
        if name.endswith(".lora_A"):
            other = f"{name[:-1]}B"
            schema |= {name: factor_leaf("A", other), other: factor_leaf("B", name)}
    version = document["folds"]
    prefix = f"folds/{version}/"
    total = {key.removeprefix(prefix): value for key, value in sorted(tensors.items()) if key.startswith(prefix)}
    return ServerState(
        phase=document["phase"],
        round=document["round"],
        steps=document["steps"],
        schema=schema,
        params={name: tensors[f"params/{name}"] for name in groups},
        init={name: tensors[f"init/{name}"] for name in groups},
        setup=tensors["setup"].numpy().tobytes() if "setup" in tensors else b"",
        setup_bytes=document["order"]["setup_bytes"],
        parts=Memory().having({"base": Folds(version, total).store()}),
    )
