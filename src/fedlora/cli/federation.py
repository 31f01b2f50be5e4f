"""Commands for federations over several machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.common import (
    OUT,
    AsFormat,
    ConfigPath,
    Format,
    Overrides,
    RunOut,
    Tracks,
    callbacks_of,
    experiment_of,
    folder_of,
    show,
)
from fedlora.core.errors import ConfigError
from fedlora.core.progress import LOG
from fedlora.runs.callbacks import Callback

GROUP = "Federation"
federation = typer.Typer(
    no_args_is_help=True, help="Set up a federation over several machines, or try one on this machine."
)


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.add_typer(federation, name="federation", rich_help_panel=GROUP)
    app.command(rich_help_panel=GROUP)(serve)
    app.command(rich_help_panel=GROUP)(join)


class Messages(Callback):
    """Prints events of sites alongside the progress."""

    def message(self, text: str) -> None:
        LOG.info("%s", text)


@federation.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    sites: Annotated[int | None, typer.Option(min=1, help="Number of sites; they are called site-0 and so on.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="The name of a site; repeat for each site.")] = None,
    host: Annotated[str, typer.Option(help="Host name or address at which sites reach the server.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port of Flower's SuperLink, on the loopback interface.")] = 8000,
    proxy_port: Annotated[int, typer.Option(help="Port of the proxy that sites connect to.")] = 9443,
) -> None:
    """Write certificates, keys, a folder for each site, a proxy's configuration, and the commands."""
    from fedlora.federation.deploy.folder import init as write

    if (sites is None) == (not name):
        raise ConfigError("give the number of sites (--sites 3) or their names (--name clinic --name hospital)")
    write(folder, name or [f"site-{number}" for number in range(sites or 0)], host, port, proxy_port)
    OUT.print(f"written to {folder}; {folder / 'README.md'} has the next steps", markup=False, soft_wrap=True)


@federation.command("renew")
def renew(folder: Annotated[Path, typer.Argument(help="The folder that `fedlora federation init` wrote.")]) -> None:
    """Sign new certificates before the old ones end, after two years; keys stay the same."""
    from fedlora.federation.deploy.certificates import renew as write

    for line in write(folder):
        OUT.print(line, markup=False, soft_wrap=True)


@federation.command("demo")
def demo(
    config: ConfigPath,
    sites: Annotated[int, typer.Option(min=1, help="Number of sites to start.")] = 3,
    set_: Overrides = None,
    run_out: RunOut = None,
    federation_: Annotated[
        Path, typer.Option("--federation", help="Folder of keys, certificates and sites' state.")
    ] = Path("runs/federation"),
    track: Tracks = None,
    format_: AsFormat = Format.table,
) -> None:
    """Run an experiment on sites on this machine, with real processes, TLS and keys."""
    from fedlora.federation.deploy.demo import demo as run_demo
    from fedlora.show.report import as_dict, result_table

    experiment, folder = experiment_of(config, set_, run_out)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (sites + 1))))
    where = folder_of(experiment, folder)
    callbacks = [*callbacks_of(where, track), Messages()]
    result = run_demo(experiment, where, federation_, sites, callbacks=callbacks)
    show(format_, as_dict(result), result_table(result))


def serve(
    config: ConfigPath,
    set_: Overrides = None,
    run_out: RunOut = None,
    federation_: Annotated[
        Path, typer.Option("--federation", help="The server's folder that `fedlora federation init` wrote.")
    ] = Path("federation/server"),
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text, on this machine alone.")] = False,
    track: Tracks = None,
    format_: AsFormat = Format.table,
) -> None:
    """Run an experiment on the sites of a federation, or resume it."""
    from fedlora.federation.deploy.serve import serve as run_server
    from fedlora.show.report import as_dict, result_table

    experiment, folder = experiment_of(config, set_, run_out)
    where = folder_of(experiment, folder)
    callbacks = [*callbacks_of(where, track), Messages()]
    result = run_server(experiment, where, federation_, insecure=insecure, callbacks=callbacks)
    show(format_, as_dict(result), result_table(result))


def join(
    server: Annotated[str, typer.Argument(help="host:port of the federation.")],
    site_config: Annotated[Path, typer.Option(help="The site's file; its key and certificate are beside it.")] = Path(
        "site.toml"
    ),
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text, on this machine alone.")] = False,
) -> None:
    """Work for a federation as one of its sites, until Ctrl-C."""
    from fedlora.federation.deploy.join import join as work

    work(server, site_config, [Messages()], insecure=insecure)
