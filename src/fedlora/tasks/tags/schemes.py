"""The schemes in which tags mark entities, recognised by the prefixes and their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
"""The tag of a word outside any entity."""

_TAG = re.compile(r"([BIESLUM])(?:-(.+))?")
_AS = {"L": "E", "U": "S", "M": "I"}
_LAST = {"E": "BIOES", "S": "BIOES", "L": "BILOU", "U": "BILOU", "M": "BMES"}

FORM = (
    "a tag of entities is O, or B-type, I-type and so on in IOB1, IOB2, IOE, BIOES, BMES or BILOU: correct the tag; "
    'for tags that mark no entities, such as parts of speech, set task.scheme = "plain", which scores single words'
)
"""What a tag may be, for messages."""


def is_tag(tag: str) -> bool:
    """Whether a tag is one of some scheme.

    >>> [is_tag(tag) for tag in ("O", "B-per", "S", "U-x", "B-", "PER")]
    [True, True, True, True, False, False]
    """
    return tag == OUTSIDE or _TAG.fullmatch(tag) is not None


def entity_tag(tag: str) -> str:
    """A tag with the prefixes that ``seqeval`` reads, B, I, E and S; a tag without a type has the type ``_``.

    >>> [entity_tag(tag) for tag in ("O", "B-per", "L-per", "U-per", "M-per", "I")]
    ['O', 'B-per', 'E-per', 'S-per', 'I-per', 'I-_']
    """
    if tag == OUTSIDE:
        return tag
    found = _TAG.fullmatch(tag)
    assert found
    return f"{_AS.get(found[1], found[1])}-{found[2] or '_'}"


def mixed(tags: Iterable[str]) -> tuple[str, str] | None:
    """Two tags that no scheme has together, such as those of BIOES and BILOU; None if there are none."""
    of: dict[str, str] = {}
    for tag in sorted(tags):
        if tag[0] in "ESLUM":
            of.setdefault("BILOU" if tag[0] in "LU" else "BIOES", tag)
    return (of["BIOES"], of["BILOU"]) if len(of) == 2 else None


def scheme_of(names: Iterable[str], sentences: Iterable[Sequence[str]]) -> str:
    """The scheme of tags.

    Args:
        names: all tags that there are.
        sentences: tags of the words of each sentence.

    Returns:
        ``IOB2`` unless a prefix, or an ``I-`` that begins entities where no ``B-`` does, says otherwise.

    >>> scheme_of(["O", "B-x", "E-x"], []), scheme_of(["O", "I-x", "U-x"], [])
    ('BIOES', 'BILOU')
    >>> scheme_of(["O", "I-x", "B-x"], [["I-x", "B-x", "O"]]), scheme_of(["O", "I-x", "B-x"], [["B-x", "I-x", "O"]])
    ('IOB1', 'IOB2')
    """
    prefixes = {tag[0] for tag in names} - {OUTSIDE}
    if "M" in prefixes:
        return "BMES"
    if prefixes == {"I", "E"}:
        return "IOE"
    if last := [_LAST[one] for one in sorted(prefixes) if one in _LAST]:
        return last[0]
    begins = {"B": 0, "I": 0}
    for tags in sentences:
        for before, tag in zip((OUTSIDE, *tags), tags, strict=False):
            # in IOB1 a B- only separates an entity from one of its type before it
            if tag != OUTSIDE and (before == OUTSIDE or before[1:] != tag[1:]):
                begins[tag[0]] += 1
    return "IOB1" if begins["I"] and not begins["B"] else "IOB2"
