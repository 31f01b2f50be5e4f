"""Answers that no honest site gives, and what the server says of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fedlora.engines import letters
from fedlora.transport import wire


def reply_of(answer: bytes, **head: Any) -> bytes:
    letter = letters.read(answer)
    return letters.write({**letter.head, **head}, letter.blobs)


def with_raw(answer: bytes, change: Callable[[bytes], bytes]) -> bytes:
    letter = letters.read(answer)
    return letters.write(letter.head, {"raw": change(letter.blobs["raw"])})


def nan_inside(raw: bytes, at: int) -> bytes:
    """The message with a NaN in the eight bytes from ``at`` on, and the checksum that fits."""
    broken = bytearray(raw)
    broken[at : at + 8] = b"\xff" * 8
    template, reference = int.from_bytes(raw[5:9], "little"), raw[4]
    broken[9:17] = wire.xxh3_64_intdigest(bytes(broken[17:]), seed=wire._seed(template, reference)).to_bytes(
        8, "little"
    )
    return bytes(broken)


WRONGS: dict[str, tuple[Callable[[bytes, list[bytes]], bytes], str]] = {
    "garbage": (lambda answer, old: b"garbage" * 100, "a letter begins with"),
    "nothing": (lambda answer, old: b"", "too short"),
    "a head that lies": (lambda answer, old: answer[:4] + b"\xff\xff\xff\x7f" + answer[8:], "head is to have"),
    "damaged": (lambda answer, old: with_raw(answer, lambda raw: raw[:-9] + b"x" + raw[-8:]), "checksum"),
    "NaN in the update": (lambda answer, old: with_raw(answer, lambda raw: nan_inside(raw, len(raw) // 2)), "NaN"),
    "NaN in the report": (lambda answer, old: with_raw(answer, lambda raw: nan_inside(raw, len(raw) - 8)), "NaN"),
    "another shape": (
        lambda answer, old: with_raw(answer, lambda raw: wire.pack({"adapter": {"x": torch.zeros(3)}}, {}).raw),
        "other parts, names or shapes",
    ),
    "a stale round": (lambda answer, old: reply_of(answer, progress=[0, 3]), "another round"),
    "a replay": (lambda answer, old: old[0], "another round, or sent twice"),
    "a long story": (lambda answer, old: reply_of(answer, run="A" * 1_000_000), r"^site-\d: its run are not those"),
    "a turn of ages": (lambda answer, old: reply_of(answer, seconds=1.7e308), "it took 1.7e.308 seconds"),
    "a number of words": (
        lambda answer, old: reply_of(answer, seconds="9" * 1_000_000 + "x"),
        "^.{,700}$",
    ),
    "words for a terminal": (lambda answer, old: reply_of(answer, refused="no\x1b[2J"), r"no  ?\[2J$"),
    "another client": (lambda answer, old: reply_of(answer, client=77), "another round"),
    "ten times the size": (lambda answer, old: with_raw(answer, lambda raw: raw + bytes(9 * len(raw))), "larger than"),
}
"""What becomes of an answer, given those before as well, and what is said then."""
