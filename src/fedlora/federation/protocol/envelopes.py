"""Jobs and replies as bytes, for clients in other processes; no pickle, every size bounded.

A message is ``FLL``, a version, the length of a JSON head, the head, and the blobs, whose lengths are in the head.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from fedlora.client.jobs import Job, Reply
from fedlora.core.errors import WireError, plain
from fedlora.core.state import ClientState, Folds
from fedlora.core.store import Memory, Reader, Writer
from fedlora.recipe import Recipe
from fedlora.transport.base_updates import FoldMessage

MAGIC = b"FLL"
VERSION = 2
LARGEST_HEAD = 1 << 22
LARGEST_SECONDS = 1e7
"""Upper bound on a reported turn duration in seconds; longer than any round waits."""
_START = struct.Struct("<3sBI")
_RECIPES = TypeAdapter(Recipe)


class Envelope(NamedTuple):
    """A message between a server and a site.

    Args:
        head: JSON values; ``kind`` is the type of message, ``run`` names the run, ``ticket`` links a reply to it.
        blobs: bytes by name.
    """

    head: dict[str, Any]
    blobs: dict[str, bytes]


def write(head: Mapping[str, Any], blobs: Mapping[str, bytes]) -> bytes:
    """Serialises a message."""
    lengths = {name: len(blob) for name, blob in blobs.items()}
    text = json.dumps({**head, "blobs": lengths}, allow_nan=False).encode()
    return b"".join([_START.pack(MAGIC, VERSION, len(text)), text, *blobs.values()])


def read(raw: bytes) -> Envelope:
    """The inverse of ``write``.

    Raises:
        WireError: the bytes are not an envelope of this version, or do not have the stated length.
    """
    if len(raw) < _START.size:
        raise WireError(f"a message of {len(raw)} bytes is shorter than an envelope")
    magic, version, length = _START.unpack_from(raw)
    if magic != MAGIC or version != VERSION:
        raise WireError(
            f"a message begins with {magic!r}, version {version}, where {MAGIC!r} and {VERSION} are expected; use one "
            "version of fedlora everywhere"
        )
    if length > min(LARGEST_HEAD, len(raw) - _START.size):
        raise WireError(f"a message's head has {length} bytes, but {len(raw) - _START.size} are left")
    at = _START.size + length
    try:
        head = json.loads(raw[_START.size : at].decode("utf-8"), object_pairs_hook=_once)
        lengths = {str(name): int(size) for name, size in head.pop("blobs").items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OverflowError) as error:
        raise WireError(f"a message's head cannot be read ({type(error).__name__})") from error
    if min(lengths.values(), default=0) < 0 or sum(lengths.values()) != len(raw) - at:
        raise WireError(f"a message has {len(raw) - at} bytes after its head, which declares {sum(lengths.values())}")
    blobs = {}
    for name, size in lengths.items():
        blobs[name] = raw[at : at + size]
        at += size
    return Envelope(head, blobs)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: readers of one message must not disagree on its content."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise WireError(f"a message has the key {plain(twice, 60)!r} twice; one value for each key is expected")
    return table


_KEYS = {
    "open": ("run", "ticket", "experiment", "label_names", "base", "client"),
    "opened": ("run", "ticket", "tier", "refused", "sizes"),
    "job": (
        *("run", "ticket", "seconds", "recipe", "client", "phase", "round", "progress", "seed", "base", "memory"),
        "fold",
    ),
    "reply": ("run", "ticket", "client", "progress", "seconds", "refused", "failed", "lost", "kept", "unmoved"),
}
_BLOBS = {"job": ("payload", "setup", "fold"), "reply": ("raw",)}


def check_keys(envelope: Envelope, kind: str) -> None:
    """Refuses a message with parts that this version does not read.

    Args:
        envelope: the message.
        kind: its kind.

    Raises:
        WireError: naming an unknown key.
    """
    head, blobs = envelope
    unknown = [*(key for key in head if key not in ("kind", *_KEYS[kind]))]
    unknown += [name for name in blobs if name not in _BLOBS.get(kind, ())]
    if unknown:
        raise WireError(
            f"a message of the kind {kind!r} has the unknown key {plain(unknown[0], 60)!r}; use one version of fedlora "
            "everywhere"
        )


def of_job(job: Job, run: str, ticket: str, seconds: float | None) -> bytes:
    """Serialises a job as a message.

    Args:
        job: the job; of the state stored on the client only its name is included, see ``ClientState.kept``.
        run: name of the run.
        ticket: returned with the reply.
        seconds: how long the server waits; None for no limit.
    """
    blobs = {"payload": job.payload}
    if job.setup is not None:
        blobs["setup"] = job.setup
    head: dict[str, Any] = {
        "kind": "job",
        "run": run,
        "ticket": ticket,
        "seconds": seconds,
        "recipe": _RECIPES.dump_python(job.recipe, mode="json", exclude_none=True),
        "client": job.client,
        "phase": job.phase,
        "round": job.round,
        "progress": list(job.progress),
        "seed": job.seed,
        "base": job.base,
        "memory": [job.memory.has_setup, job.memory.kept, Writer().memory(job.memory.parts.without_trees())],
    }
    if job.fold is not None:
        blobs["fold"] = job.fold.raw
        head["fold"] = [job.fold.version, list(job.fold.ranks)]
    return write(head, blobs)


def to_job(envelope: Envelope) -> Job:
    """Parses the job of a message; of the client's state it has only the part known to the server.

    Raises:
        WireError: it is not of that form.
    """
    head, blobs = envelope
    try:
        fold = None
        if "fold" in head:
            version, ranks = head["fold"]
            fold = FoldMessage(blobs["fold"], {}, int(version), tuple(int(rank) for rank in ranks))
        has_setup, kept, parts = head["memory"]
        first, rounds = head["progress"]
        if head["base"] not in ("fp32", "bf16"):
            raise ValueError(head["base"])
        return Job(
            recipe=_RECIPES.validate_python(head["recipe"]),
            client=int(head["client"]),
            phase=int(head["phase"]),
            round=int(head["round"]),
            progress=(int(first), int(rounds)),
            seed=int(head["seed"]),
            base=head["base"],
            payload=blobs["payload"],
            setup=blobs.get("setup"),
            fold=fold,
            memory=ClientState(bool(has_setup), Reader({}).memory(parts), str(kept)),
        )
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, ValidationError) as error:
        raise WireError(f"a job cannot be read ({type(error).__name__}: {error})") from error


def of_reply(reply: Reply, job: Envelope, lost: bool = False) -> bytes:
    """Serialises a reply as a message; of the state stored on the client only its name is included.

    Args:
        reply: the client's reply.
        job: the message with the job.
        lost: whether the site has lost the state of the run.
    """
    head = {
        "kind": "reply",
        **{key: job.head.get(key) for key in ("run", "ticket", "client", "progress")},
        "seconds": reply.seconds,
        "refused": reply.refused,
        "failed": reply.failed,
        "lost": lost,
        "kept": reply.memory.kept,
        **({"unmoved": list(reply.unmoved)} if reply.unmoved else {}),
    }
    return write(head, {} if reply.raw is None else {"raw": reply.raw})


def to_reply(envelope: Envelope, job: Job, run: str, ticket: str) -> Reply:
    """Parses the reply to a job.

    Raises:
        WireError: it is the reply to another message, or not a reply.
    """
    head, blobs = envelope
    expected = {"kind": "reply", "run": run, "ticket": ticket, "client": job.client, "progress": list(job.progress)}
    found = {key: head.get(key) for key in expected}
    if found != expected:
        other = ", ".join(key for key in expected if found[key] != expected[key])
        raise WireError(f"its {other} are not those of the job: a reply of another round, or sent twice")
    check_keys(envelope, "reply")
    try:
        seconds, refused, kept = float(head["seconds"]), plain(head["refused"]), str(head["kept"])[:100]
        if not 0 <= seconds <= LARGEST_SECONDS:
            raise ValueError(f"it took {seconds} seconds")
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise WireError(f"a reply cannot be read ({type(error).__name__}: {plain(error)})") from error
    if refused:
        failed = head.get("failed") is True
        return Reply(None, ClientState(), seconds, refused, delivered=False, failed=failed)
    remembers = job.recipe.memory != "none"
    version = job.fold.version if job.fold else job.memory.folds.version
    parts = Memory().having({"base": Folds(version if remembers else 0).store()})
    memory = ClientState(remembers, parts, kept)
    said = head.get("unmoved")
    unmoved = tuple(group for group in ("adapter", "head") if isinstance(said, list) and group in said)
    return Reply(blobs.get("raw"), memory, seconds, unmoved=unmoved)
