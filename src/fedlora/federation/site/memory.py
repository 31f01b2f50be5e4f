"""A site's client state between rounds, stored in one folder per run."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedlora.core.errors import CheckpointError
from fedlora.core.files import new_file, write_atomically
from fedlora.core.state import ClientState
from fedlora.core.store import Reader, Writer

KEPT = 3
"""Number of states kept per client: the server may return to an earlier one after losing its own state."""
RUNS = 5
"""Number of runs whose folders are kept."""
_NAME = re.compile(r"^[0-9a-f]{8,64}$")


class SiteMemory:
    """The files of one run on a site; they survive restarts and are deleted with the run.

    Args:
        folder: the folder of all runs.
        run: name of the run, hexadecimal digits.

    Raises:
        CheckpointError: the name is invalid.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder / _checked(run)

    def open(self, text: str) -> None:
        """Stores the announcement of the run, and removes the files of the oldest runs."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self.folder / "run.json", text.encode())
        others = sorted(self.folder.parent.glob("*/run.json"), key=lambda file: file.stat().st_mtime)
        for old in others[:-RUNS]:
            shutil.rmtree(old.parent, ignore_errors=True)

    def opened(self) -> str | None:
        """The announcement stored by ``open``, if any."""
        file = self.folder / "run.json"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def setup(self, phase: int, content: bytes | None) -> bytes | None:
        """A phase's setup message: the one received, which is stored, or else the stored one."""
        file = self.folder / f"setup-{phase}.bin"
        if content is None:
            return file.read_bytes() if file.exists() else None
        if not file.exists() or file.read_bytes() != content:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(file, content)
        return content

    def load(self, client: int, known: ClientState) -> ClientState:
        """Loads the complete state of a client.

        Args:
            client: its number.
            known: the part of the state known to the server.

        Raises:
            CheckpointError: it does not exist.
        """
        if not known.kept:
            return known
        file = self.folder / f"client-{client}" / f"{_checked(known.kept)}.safetensors"
        try:
            with safe_open(file, "pt") as opened:
                content = json.loads((opened.metadata() or {})["told"])
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
            parts = Reader(tensors).memory(content["parts"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"the state of client {client} is no longer here ({type(error).__name__})") from error
        return ClientState(content["has_setup"], parts, known.kept)

    def save(self, client: int, memory: ClientState) -> str:
        """Stores a client's state under a new name, unless it is empty.

        Returns:
            The name; empty if nothing was stored.
        """
        folder = self.folder / f"client-{client}"
        if not memory.parts and not memory.has_setup:
            return ""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        writer = Writer()
        content = {"has_setup": memory.has_setup, "parts": writer.memory(memory.parts)}
        kept = secrets.token_hex(8)
        with new_file(folder / f"{kept}.safetensors") as temporary:
            save_file(writer.tensors, temporary, {"told": json.dumps(content)})
        others = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for old in [file for file in others if file.stem not in (kept, memory.kept)][: -(KEPT - 2)]:
            old.unlink(missing_ok=True)
        return kept


def _checked(name: str) -> str:
    """A name validated not to leave its folder."""
    if not _NAME.match(name):
        raise CheckpointError(f"{name[:80]!r} is not the name of a run or of a state")
    return name
