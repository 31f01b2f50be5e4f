"""Sentences about data that can be read but may not mean what their owner thinks; each is reported once."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_MOST = 5


def near_equal(names: Sequence[str]) -> list[str]:
    """A sentence about classes whose names differ only in case, blanks, width or the zeros of a number.

    >>> [one.split(" differ")[0] for one in near_equal(["01", "1", "Red", "blue", "red"])]
    ["the classes '01' and '1'; 'Red' and 'red'"]
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_key(name), []).append(name)
    groups = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if not groups:
        return []
    return [
        f"the classes {_some(groups, '; ')} differ only in spelling, and are learnt as different classes: write them "
        "alike if they are one"
    ]


def blank(texts: Sequence[str], which: str, column: str) -> list[str]:
    """A sentence about texts that are empty or blanks alone."""
    count = sum(not text.strip() for text in texts)
    return [f"{count} of {len(texts)} {which} rows have a blank '{column}'"] if count else []


def unread(columns: Iterable[str], read: Collection[str]) -> list[str]:
    """A sentence about columns that nothing reads."""
    left = [f"'{name}'" for name in columns if name not in read]
    if not left:
        return []
    verb = "column was" if len(left) == 1 else "columns were"
    return [f"the {verb} not read: {_some(left, ', ', 20)}"]


def shared(test: Sequence[str], train: Iterable[str]) -> list[str]:
    """A sentence about test examples whose content is that of a training example.

    Args:
        test: the content of each test example.
        train: the content of each training example.
    """
    known = set(train)
    count = sum(one in known for one in test)
    if not count:
        return []
    return [
        f"{count} of {len(test)} test rows ({count / len(test):.0%}) have the content of a training row, so their "
        "metrics do not show what the model does with new rows"
    ]


def _key(name: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return f"{float(plain):g}" if _NUMBER.fullmatch(plain) and len(plain) < 16 else plain


def _some(parts: Sequence[str], between: str, most: int = _MOST) -> str:
    more = [f"{len(parts) - most} more"] if len(parts) > most else []
    return between.join([*parts[:most], *more])
