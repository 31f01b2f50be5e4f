"""A run on disk: configuration, manifest, ledger, checkpoints. Files are never left half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora import config
from fedlora.config import Experiment
from fedlora.config.places import rooted
from fedlora.core.digests import sealed, unsealed
from fedlora.core.errors import CheckpointError, ConfigError, DataError, first_line
from fedlora.core.files import append, clean, write_atomically
from fedlora.core.locks import LOCK
from fedlora.core.state import ServerState
from fedlora.rounds.checkpoint import can_go_on, load_state, save_state
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs import changes

KEPT = 2
"""Number of checkpoints kept."""
KEPT_OF_SITES = 5
"""Number of checkpoints kept if clients are not trusted, so that their effect can be undone."""


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> list[Path]:
        """The existing checkpoints, oldest first."""
        held = self.path / "checkpoints"
        # not `glob`, which takes a folder that cannot be read for an empty one
        found = held.iterdir() if held.is_dir() else ()
        return sorted(one for one in found if one.name.startswith("round-") and not one.name.endswith(".tmp"))

    @property
    def begun(self) -> bool:
        """Whether the folder contains anything of a run that can be resumed or is worth keeping."""
        ledgers = (self.path / "ledger.jsonl", *self.path.glob("clients/*/ledger.jsonl"))
        rows = any(file.stat().st_size for file in ledgers if file.exists())
        return rows or bool(self.checkpoints) or (self.path / "result.json").exists()

    def check(self, experiment: Experiment, extend: bool = True) -> bool:
        """Whether the folder already belongs to this experiment (True) or is available for it (False).

        Args:
            experiment: the experiment.
            extend: whether a run in it may go on with more rounds, other evaluations or another learning rate.

        Raises:
            CheckpointError: it contains another experiment's run.
            ConfigError: it contains something else.
            DataError: it cannot be read.
        """
        file = self.path / "config.toml"
        try:
            if not file.exists():
                self._check_empty()
                return False
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            held = config.load(file)
        except ConfigError as error:
            raise CheckpointError(f"{file} cannot be read ({error}); choose another folder with --out") from error
        if config.digest(held) == config.digest(experiment):
            return True
        # a run that was killed before it started has nothing to lose
        if self.begun:
            self._check_change(held, experiment, extend)
        return False

    def _check_change(self, held: Experiment, experiment: Experiment, extend: bool) -> None:
        reason = changes.refusal(held, experiment, self._position())
        if reason is None and not (extend and all(map(can_go_on, self.checkpoints[-1:]))):
            found = "; ".join(changes.changed_keys(held, experiment)[:4])
            reason = f"({found}); choose another folder with --out, or remove that one"
        if reason:
            raise CheckpointError(f"{self.path} holds a run of another configuration {reason}")

    def _position(self) -> changes.Position:
        latest = self.latest()
        if not latest:
            return changes.Position()
        (state, _), last = latest, self.rows()[-1:]
        return changes.Position(state.phase, state.steps, state.round, last[0].stopped if last else "")

    def _check_empty(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a folder; choose another folder with --out")
        if self.path.exists() and any(entry.name != LOCK for entry in self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and holds no run; choose another folder with --out")

    def claim(self, experiment: Experiment, extend: bool = True) -> None:
        """Assigns the folder to this experiment, unless it already is.

        A change of a run that began is recorded in ``changes.json``, and a run with more rounds is no finished one.

        Args:
            experiment: the experiment.
            extend: see ``check``.

        Raises:
            CheckpointError: it contains another experiment's run.
            ConfigError: it contains something else.
            DataError: writing failed.
        """
        if not self.check(experiment, extend):
            if self.begun:
                self._change(config.load(self.path / "config.toml"), experiment)
            self.write("config.toml", config.to_toml(rooted(experiment, config.resolved(experiment))))

    def _change(self, held: Experiment, experiment: Experiment) -> None:
        at = self._position()
        # in this order: what is left by a crash between two of them is the old run or the new one
        self.write_json(changes.CHANGES, {"changes": changes.recorded(self.changes(), held, experiment, at)})
        if experiment.rounds > at.round:
            (self.path / "result.json").unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes what a killed process left half-written; only for the process that has locked the folder."""
        for folder in (self.path, *self.path.glob("clients/*")):
            clean(folder)
            clean(folder / "checkpoints")

    def changes(self) -> list[dict[str, Any]]:
        """The changes of the configuration since the run began, each with ``round``, ``config`` and ``changes``.

        Raises:
            ConfigError: the record is damaged.
        """
        found = self.read_json(changes.CHANGES)["changes"] if (self.path / changes.CHANGES).exists() else []
        return list(found)

    def write(self, name: str, text: str) -> None:
        """Writes or replaces a file of the folder atomically."""
        try:
            write_atomically(self.path / name, text.encode())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes or replaces a JSON file of the folder atomically, with its digest as its last entry."""
        self.write(name, json.dumps(sealed(value), indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON file of the folder.

        Raises:
            ConfigError: it is missing, not JSON, or differs from what was written.
        """
        try:
            found = unsealed(json.loads((self.path / name).read_text(encoding="utf-8")))
            if name == "result.json" and "after" not in found:
                raise ValueError("it has no metrics")
            return found
        except (OSError, ValueError) as error:
            if not self.path.is_dir():
                mend = "there is no such folder"
            elif isinstance(error, PermissionError):
                mend = f"its {name} may not be read; allow it"
            elif (self.path / name).exists():
                mend = f"its {name} is damaged; write it anew with: fedlora run {self.path}"
            elif (self.path / "config.toml").exists():
                mend = f"it has no {name} yet; finish it with: fedlora run {self.path}"
            else:
                mend = f"there is no {name} in it"
            raise ConfigError(f"{self.path} is not the folder of a finished run: {mend}") from error

    def settings(self) -> dict[str, Any]:
        """The content of ``config.toml``; empty if there is none.

        Raises:
            ConfigError: it is damaged.
        """
        file = self.path / "config.toml"
        if not file.exists():
            return {}
        if file.is_file() and not file.read_bytes().strip():
            raise ConfigError(f"{file} is empty, but a run writes all of its settings there; restore the original file")
        return config.document_of(file)

    def began_with(self, facts: Mapping[str, Any], experiment: Experiment) -> bool:
        """Whether the run of a checkpoint had this configuration, or was changed to it.

        Args:
            facts: what was saved with the checkpoint.
            experiment: the experiment of ``config.toml``.
        """
        return facts.get("config") in {config.digest(experiment), *(change["config"] for change in self.changes())}

    def finished(self) -> tuple[dict[str, Any], list[RoundRecord]]:
        """The result and the ledger of a finished run; of clients that trained alone, the latter is empty.

        Raises:
            ConfigError: it is not finished.
            CheckpointError: the ledger is damaged, or has not all rounds of the result.
        """
        result, rows = self.read_json("result.json"), self.rows()
        alone = not rows and (self.path / "clients").exists()
        if not alone and [row.round for row in rows] != list(range(result["rounds"] + 1)):
            raise CheckpointError(
                f"{self.path / 'ledger.jsonl'} lacks some of the {result['rounds']} rounds of result.json; restore the "
                "original file"
            )
        return result, rows

    def rows(self, until: int | None = None) -> list[RoundRecord]:
        """The ledger; an incomplete last line, as left by a killed process, is ignored.

        Args:
            until: the last round to read; all if omitted.

        Raises:
            CheckpointError: it contains something else, or a row differs from what was written.
        """
        file = self.path / "ledger.jsonl"
        if not file.exists():
            return []
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); make it readable") from error
        rows = []
        for number, line in enumerate(lines):
            if until is not None and number > until:
                break
            try:
                rows.append(_row(line))
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"row {number} of {file} is damaged, or not one of this version ({first_line(error)}); restore "
                    "the original file"
                ) from error
        return rows

    def append(self, row: RoundRecord) -> None:
        """Appends a line to the ledger and flushes it to disk."""
        try:
            append(self.path / "ledger.jsonl", _line(row).encode())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def rewind(self, rounds: int) -> list[RoundRecord]:
        """Removes the ledger's rows after ``rounds``, which no checkpoint covers, and returns the remaining ones."""
        rows = [row for row in self.rows(rounds) if row.round <= rounds]
        self.write("ledger.jsonl", "".join(map(_line, rows)))
        return rows

    def save(self, state: ServerState, facts: Mapping[str, Any], kept: int = KEPT) -> None:
        """Writes a checkpoint and removes all but the last ``kept``.

        Raises:
            DataError: writing failed; earlier checkpoints are intact.
        """
        folder = self.path / "checkpoints" / f"round-{state.round:06d}"
        try:
            save_state(state, folder, facts)
            for old in self.checkpoints[:-kept]:
                shutil.rmtree(old)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def latest(self) -> tuple[ServerState, dict[str, Any]] | None:
        """The latest checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged.
        """
        return load_state(self.checkpoints[-1]) if self.checkpoints else None

    def drop_damaged(self) -> list[str]:
        """Removes the newest checkpoints that cannot be read, as long as an older one can; a sentence for each.

        Raises:
            CheckpointError: none can be read, or the disk failed to read one, which may be intact.
        """
        found, errors = self.checkpoints, []
        for folder in reversed(found):
            try:
                load_state(folder)
                break
            except CheckpointError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                    raise CheckpointError(
                        f"the disk failed to read the checkpoint {folder} ({cause.strerror or cause}), which may be "
                        "intact: try again; if it fails again, remove that folder to continue from the checkpoint "
                        "before it"
                    ) from error
                errors.append(error)
        if found and len(errors) == len(found):
            raise errors[0]
        for folder in found[len(found) - len(errors) :]:
            shutil.rmtree(folder)
        return [f"{error}; it was removed" for error in errors]


def _line(row: RoundRecord) -> str:
    return json.dumps(sealed(dataclasses.asdict(row)), allow_nan=False) + "\n"


def _row(line: str) -> RoundRecord:
    row = unsealed(json.loads(line))
    return RoundRecord(**{**row, **{key: tuple(row.get(key, ())) for key in ("cohort", "late", "ranks", "warnings")}})


def cannot_write(path: Path, error: Exception) -> DataError:
    """The error for a failed write."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    what = "the disk is full" if full else f"the disk refused ({getattr(error, 'strerror', None) or error})"
    mend = "free some space" if full else "make it writable"
    return DataError(
        f"{what} while writing to {path}; everything saved before is intact: {mend} and run the same command to resume"
    )
