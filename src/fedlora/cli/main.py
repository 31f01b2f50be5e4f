"""The command line. Heavy modules are imported inside the commands, so that help is displayed immediately."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Annotated

import typer

import fedlora
from fedlora.cli import begin, compare, federation, plan, study, train, use
from fedlora.cli.common import ERR, import_settings
from fedlora.core.errors import FedloraError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of Hugging Face models with low-rank adapters, in as few bytes as possible.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedlora {fedlora.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
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
    """Runs the command line: exit code 2 for errors the user can fix, 1 for internal errors, 130 after Ctrl-C."""
    # threads that spin while waiting starve each other when several processes share the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    _print_any_text()
    try:
        app(args=[argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="fedlora")
    except FedloraError as error:
        if debug:
            raise
        stopped = type(error).__name__ == "Stopped"
        text, style = (str(error), None) if stopped else (f"error: {error}", "red")
        ERR.print(text, style=style, markup=False, soft_wrap=True, highlight=False)
        sys.exit(130 if stopped else 2)
    except Exception as error:
        if debug:
            raise
        ERR.print(
            f"fedlora failed because of a bug in fedlora ({type(error).__name__}: {error}); run the command "
            "again with --debug and report its output",
            style="red",
            markup=False,
            soft_wrap=True,
            highlight=False,
        )
        sys.exit(1)
