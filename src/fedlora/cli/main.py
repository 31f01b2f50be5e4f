"""The command line. Heavy modules are imported inside the commands, so that help is displayed immediately."""

from __future__ import annotations

import codecs
import errno
import inspect
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

import fedlora
from fedlora.cli import begin, compare, federation, plan, study, train, use
from fedlora.cli.common import import_settings
from fedlora.cli.log import set_up
from fedlora.cli.streams import failure_of, open_streams
from fedlora.core.errors import FedloraError, ran_out_of_memory
from fedlora.core.interrupts import sigterm_as_ctrl_c
from fedlora.core.progress import LOG

_FLAGS = {"--debug", "-v", "--verbose", "-q", "--quiet"}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors of writing that only the user can correct, wherever they arise."""
_NO_HOME = "Could not determine home directory."
"""What `pathlib` says of ``~name`` where there is no such user, and of ``~`` where there is neither a user nor HOME."""
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of Hugging Face models with low-rank adapters, in as few bytes as possible. "
    "The options below work before or after a command.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedlora {fedlora.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print every round, and other details.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the result, warnings and errors alone.")] = False,
    log_file: Annotated[
        Path | None, typer.Option(help="Append what is printed beside the result to this file, with times.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    set_up(verbose, quiet, log_file)
    if "--help" not in sys.argv:
        import_settings()


# help lists groups in this order
for group in (begin, plan, train, compare, study, use, federation):
    group.add_to(app)


def _print_any_text() -> None:
    """Lets both streams take any text: in the locale C as UTF-8, elsewhere escaped where the encoding lacks it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def main() -> None:
    """Runs the command line.

    Exit code 2 for errors the user can fix, 1 for internal errors, 130 after Ctrl-C or SIGTERM, 141 if the reader of
    the output has gone.
    """
    # threads that spin while waiting starve each other when several processes share the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _print_any_text()
    streams = open_streams()
    set_up(verbose=False, quiet=False, file=None)
    with sigterm_as_ctrl_c():
        code, text = _run("--debug" in sys.argv)
    code, text = failure_of(streams) or (code, text)
    if text:
        with suppress(OSError):
            LOG.log(logging.INFO if code == 130 else logging.ERROR, "%s", text)
    sys.exit(code)


def common_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with the options that all commands have moved to the front, where the parser reads them."""
    common, others, rest = [], [], list(arguments)
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        if argument in _FLAGS or argument.startswith("--log-file="):
            common.append(argument)
        elif argument == "--log-file":
            common += [argument, *rest[:1]]
            del rest[:1]
        else:
            others.append(argument)
    return [*common, *others, *rest]


def _run(debug: bool) -> tuple[int, str]:
    """Runs the command; its exit code, and what is left to print."""
    try:
        app(args=common_first(sys.argv[1:]), prog_name="fedlora")
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else int(bool(end.code))), ""
    except FedloraError as error:
        if debug:
            raise
        stopped = type(error).__name__ == "Stopped"
        return (130, str(error)) if stopped else (2, f"error: {error}")
    except Exception as error:
        if debug:
            raise
        if cause := _of_the_user(error) or _of_an_own_class(error):
            return 2, f"error: {cause}"
        return 1, (
            f"fedlora failed because of a bug in fedlora ({type(error).__name__}: {error}); run the command "
            "again with --debug and report its output"
        )
    return 0, ""


def _of_an_own_class(error: Exception) -> str:
    """Where a module with the user's own parts took part in an error; empty if none did."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = str(frame.f_globals.get("__name__"))
        defined = [one for one in frame.f_globals.values() if inspect.isclass(one) and one.__module__ == name]
        bases = {base.__module__.split(".")[0] for one in defined for base in one.__mro__}
        if "fedlora" in bases and name.split(".")[0] != "fedlora":
            return (
                f"{frame.f_code.co_filename}, line {line}, failed ({type(error).__name__}: {error}); correct this "
                "class of your own, --debug shows the traceback"
            )
    return ""


def _of_the_user(error: Exception) -> str:
    """What the user can correct about an error, wherever it arises; empty if it is a fault of fedlora."""
    if isinstance(error, PermissionError):
        return (
            f"{error.filename or 'a file'} cannot be accessed ({error.strerror}); correct its rights, or name another"
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        place = error.filename or "a file"
        return f"{place} cannot be written ({error.strerror}); make room, or choose another place"
    if isinstance(error, RuntimeError) and str(error) == _NO_HOME:
        return "the home folder of a path with ~, or of this user, is unknown; write the whole path, or set HOME"
    return ran_out_of_memory(error)
