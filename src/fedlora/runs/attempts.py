"""The attempts at the rounds of a run whose noise cannot be drawn again: its account counts them, not the rounds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.core.digests import sealed, unsealed
from fedlora.core.errors import CheckpointError, first_line
from fedlora.core.files import append, write_atomically
from fedlora.recipe import Phase
from fedlora.runs.folder import cannot_write

FILE = "attempts.jsonl"
"""The file of a run's folder that lists its attempts."""


class Attempts:
    """A round that is made again, as after a crash, draws new noise, so both attempts are disclosed.

    Clients send what has noise on examples as soon as they are asked, so that is recorded before. The server's noise is
    recorded when it has been added, before anything of the result is evaluated, written or sent: an attempt that ends
    earlier discloses nothing to those who see models. Noise from a seed is not recorded, as the same job and seed give
    the same bits again.

    Args:
        folder: the folder of the run.
        phases: its phases.

    Raises:
        CheckpointError: the record is damaged.
    """

    def __init__(self, folder: Path, phases: Sequence[Phase]) -> None:
        self._file = folder / FILE
        self._clients = not all(phase.recipe.privacy.repeatable for phase in phases)
        self._examples = not all(phase.recipe.local.gradient_source.repeatable for phase in phases)
        self._asked: list[tuple[int, tuple[int, ...]]] = []
        self._noised: list[int] = []
        if self._clients or self._examples:
            self._read()

    def asked(self, round: int, cohort: Sequence[int]) -> None:
        """Records that clients are about to be asked; a secret cohort is recorded as an empty one."""
        if self._examples:
            self._append({"round": round, "cohort": list(cohort)})

    def noised(self, round: int) -> None:
        """Records that the server has added its noise."""
        if self._clients:
            self._append({"round": round})

    def cohorts(self, done: int) -> list[tuple[int, ...]]:
        """The cohorts of the attempts that are not the last ones at the first ``done`` rounds."""
        last = {round: place for place, (round, _) in enumerate(self._asked) if round <= done}
        return [cohort for place, (round, cohort) in enumerate(self._asked) if last.get(round) != place]

    def rounds(self, done: int) -> list[int]:
        """The rounds, from 1, of the server's noise beyond one time for each of the first ``done`` rounds."""
        counts = Counter(self._noised)
        return [round for round, count in counts.items() for _ in range(count - (round <= done))]

    def note(self, done: int) -> tuple[str, ...]:
        """A sentence on the attempts at rounds after ``done``, all of which were interrupted."""
        found = {round for round, _ in self._asked} | {*self._noised}
        if not (left := sorted(round for round in found if round > done)):
            return ()
        rounds = f"round{'s' * (len(left) > 1)} {', '.join(map(str, left))}"
        return (
            f"{rounds} ended before the end, after noisy updates may have been disclosed: the privacy account includes "
            "these attempts, besides the repetition with new noise",
        )

    def _read(self) -> None:
        """Reads the file; a line that was cut off by a crash is removed, as nothing was disclosed after it."""
        try:
            text = self._file.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                write_atomically(self._file, whole.encode())
            for line in whole.splitlines():
                self._add(unsealed(json.loads(line)))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self._file}, by which the privacy account is kept, cannot be read ({first_line(error)}); restore "
                "the original file, or start in another folder with --out"
            ) from error

    def _append(self, line: dict[str, Any]) -> None:
        try:
            append(self._file, (json.dumps(sealed(line)) + "\n").encode())
        except OSError as error:
            raise cannot_write(self._file.parent, error) from error
        self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        if "cohort" in line:
            self._asked.append((line["round"], tuple(line["cohort"])))
        else:
            self._noised.append(line["round"])
