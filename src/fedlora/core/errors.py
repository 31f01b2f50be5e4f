"""What can go wrong: each error says what happened, what was expected, and how to mend it."""

from __future__ import annotations


def plain(text: object, longest: int = 500) -> str:
    """What others said, as it may be shown: cut, and without characters that would steer a terminal."""
    return "".join(one if one.isprintable() else " " for one in str(text)[:longest])


def shown(value: object, longest: int = 60) -> str:
    """A value in a message, as Python writes it; cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of what a library says of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class FedloraError(Exception):
    """An error a user can mend; the command line prints its text alone and exits with 2."""


class ConfigError(FedloraError):
    """A configuration that cannot be read, or that asks for something that would run but lie."""


class DataError(FedloraError):
    """Data that is missing, empty, or not of the stated form."""


class WireError(FedloraError):
    """Bytes that are not a message of the expected template."""


class QuorumError(FedloraError):
    """Too few clients answered in a round; it can be tried again.

    Args:
        text: what to tell.
        refused: the clients whose answers did not count.
    """

    def __init__(self, text: str, refused: frozenset[int] = frozenset()) -> None:
        super().__init__(text)
        self.refused = refused


class ProcessError(FedloraError):
    """A process of Flower's that did not come up, or ended."""


class CallbackError(FedloraError):
    """A callback of the user's that failed."""


class TrainingError(FedloraError):
    """Training that went wrong silently: NaN, an adapter that did not move, every label masked."""


class CheckpointError(FedloraError):
    """A checkpoint that is damaged, or that belongs to another configuration."""
