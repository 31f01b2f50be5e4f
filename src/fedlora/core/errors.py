"""fedlora's exceptions: each message says what happened, what was expected, and how to fix it."""

from __future__ import annotations


def plain(text: object, longest: int = 500) -> str:
    """Untrusted text made safe to print: truncated, and without terminal control characters."""
    return "".join(one if one.isprintable() else " " for one in str(text)[:longest])


def shown(value: object, longest: int = 60) -> str:
    """The ``repr`` of a value for a message, truncated if long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def ran_out_of_memory(error: BaseException) -> str:
    """What to do about memory that ran out, on the host or on a device; empty for any other error."""
    if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's
        return ""
    return (
        f"memory ran out ({first_line(error)}): lower method.local.batch_size or raise method.local.accumulate, set "
        "model.gradient_checkpointing = true or method.local.compute = 'bf16', or use a smaller model or model.load"
    )


class FedloraError(Exception):
    """An error that a user can fix; the command line prints only its text and exits with 2."""


class ConfigError(FedloraError):
    """A configuration that cannot be read, or that would run but give misleading results."""


class DataError(FedloraError):
    """Data that is missing, empty, or not in the expected format."""


class WireError(FedloraError):
    """Bytes that are not a message for the expected template."""


class QuorumError(FedloraError):
    """Too few clients returned a valid result in a round; the round can be retried.

    Args:
        text: the message.
        refused: the clients whose results were rejected.
    """

    def __init__(self, text: str, refused: frozenset[int] = frozenset()) -> None:
        super().__init__(text)
        self.refused = refused


class ProcessError(FedloraError):
    """A Flower process that did not start, or that exited."""


class CallbackError(FedloraError):
    """A user's callback that failed."""


class TrainingError(FedloraError):
    """Training that would have failed silently: NaN, an adapter that did not change, all labels masked."""


class DivergedError(FedloraError):
    """A round after which the model cannot be trained or evaluated any more.

    Args:
        text: the message.
        suspect: the client with the longest update of that round, and its norm; None if there is none.
        recorded: whether the round is in the ledger already, so that it must be undone.
    """

    def __init__(self, text: str, suspect: tuple[int, float] | None, recorded: bool = False) -> None:
        super().__init__(text)
        self.suspect, self.recorded = suspect, recorded


class CheckpointError(FedloraError):
    """A checkpoint that is corrupted or belongs to another configuration."""
