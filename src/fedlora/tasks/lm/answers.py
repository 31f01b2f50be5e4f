"""Extracts the answer from a text: all of it, the final number, or a regular expression's match."""

from __future__ import annotations

import re

from fedlora.core.errors import ConfigError

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def check_pattern(pattern: str) -> None:
    """Refuses patterns that ``extract`` cannot use.

    Raises:
        ConfigError: neither a known name nor a regular expression with one group.
    """
    if pattern in ("exact", "gsm8k"):
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(
            f"task.answer_pattern = {pattern!r} is not a regular expression ({error}): correct it, or use exact "
            "or gsm8k"
        ) from error
    if groups != 1:
        raise ConfigError(
            f"task.answer_pattern = {pattern!r} has {groups} groups, but the answer is the match of one group: "
            "put it in one pair of brackets, or use exact or gsm8k"
        )


def extract(pattern: str, text: str) -> str | None:
    r"""The answer in ``text``, or None.

    Args:
        pattern: ``exact`` for the whole text without space around it; ``gsm8k`` for the first number after ``####``,
            else the last number, without commas, a trailing dot or trailing zeros, with a zero before a leading dot;
            or a regular expression whose one group it is.
        text: where to look.

    >>> extract("gsm8k", "so 2 * 600 = 1,200.\n#### 1,200"), extract("gsm8k", "It is $18.00."), extract("gsm8k", "?")
    ('1200', '18', None)
    >>> extract("gsm8k", "5-3"), extract("gsm8k", "#### -3 apples of 7"), extract(r"is (\w+)", "it is red")
    ('3', '-3', 'red')
    """
    if pattern == "exact":
        return text.strip()
    if pattern == "gsm8k":
        after = _NUMBER.search(text.partition("####")[2])
        numbers = [after[0]] if after else _NUMBER.findall(text)
        return _plain(numbers[-1]) if numbers else None
    found = re.search(pattern, text)
    return None if found is None or found[1] is None else found[1].strip()


def _plain(number: str) -> str:
    number = re.sub(r"^(-?)\.", r"\g<1>0.", number.replace(",", ""))
    return number.rstrip("0").rstrip(".") if "." in number else number
