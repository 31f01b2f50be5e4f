"""Sentences about data that can be read but may not mean what their owner thinks; each is reported once."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_MISSING = frozenset(
    ("nan", "NaN", "NAN", "NA", "<NA>", "N/A", "n/a", "#N/A", "NaT", "null", "Null", "NULL", "None", "undefined")
)
"""How programs write that there is no value; words that people choose for a class are not among them."""
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


def doubtful(names: Sequence[str]) -> list[str]:
    """Sentences about classes whose names are usually no classes.

    >>> doubtful(["red", "None"])[0].split(",")[0]
    "the class 'None' looks like a missing value"
    >>> [one.split(":")[0] for one in doubtful(["1.5", "2", "3.25"])]
    ['the classes are numbers with fractions, and are learnt as different classes without an order']
    """
    notes = []
    if missing := [name for name in names if name in _MISSING]:
        looks = "class {} looks" if len(missing) == 1 else "classes {} look"
        notes.append(
            f"the {looks.format(' and '.join(map(repr, missing)))} like a missing value, and is learnt as a class: "
            "remove its rows if it is none"
        )
    if any("." in name for name in names) and all(map(_NUMBER.fullmatch, names)):
        notes.append(
            "the classes are numbers with fractions, and are learnt as different classes without an order: set "
            'task.problem = "regression" to learn numbers'
        )
    return notes


def rare(labels: Iterable[int], names: Sequence[str]) -> list[str]:
    """Sentences about classes that training rows have seldom.

    Args:
        labels: the class of each training row.
        names: the classes.

    >>> [one.split(":")[0] for one in rare([0, 0, 0, 1], ["a", "b", "c"])]
    ["no training row has the class 'c', which cannot be learnt", '2 of 3 classes have one training row at most']
    """
    counts = Counter(labels)
    notes = []
    if absent := [repr(name) for number, name in enumerate(names) if not counts[number]]:
        kind = "class" if len(absent) == 1 else "classes"
        notes.append(f"no training row has the {kind} {_some(absent, ', ')}, which cannot be learnt: add such rows")
    single = sum(counts[number] <= 1 for number in range(len(names)))
    if 2 * single >= len(names) > len(absent):
        notes.append(
            f"{single} of {len(names)} classes have one training row at most: check that the column of labels is one"
        )
    return notes


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


def contradictory(contents: Sequence[str], labels: Sequence[int]) -> list[str]:
    """A sentence about training examples of equal content and different classes.

    >>> contradictory(["a", "a", "b", "b"], [0, 1, 1, 1])[0].split(" but")[0]
    '2 of 4 training rows have the content of another row'
    """
    known: dict[str, set[int]] = {}
    for content, label in zip(contents, labels, strict=True):
        known.setdefault(content, set()).add(label)
    count = sum(len(known[content]) > 1 for content in contents)
    if not count:
        return []
    return [
        f"{count} of {len(contents)} training rows have the content of another row but not its class: correct or "
        "remove them if a content has one class"
    ]


def _key(name: str) -> str:
    # characters of the category Cf, such as a zero-width space, are not seen
    seen = "".join(one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) != "Cf")
    plain = " ".join(seen.casefold().split())
    return f"{float(plain):g}" if _NUMBER.fullmatch(plain) and len(plain) < 16 else plain


def _some(parts: Sequence[str], between: str, most: int = _MOST) -> str:
    more = [f"{len(parts) - most} more"] if len(parts) > most else []
    return between.join([*parts[:most], *more])
