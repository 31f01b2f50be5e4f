"""What a site has done for servers so far, kept on disk, and the limits on it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fedlora.core.errors import CheckpointError, ConfigError
from fedlora.core.files import write_atomically
from fedlora.federation.protocol.policies import SitePolicy
from fedlora.privacy.accountant import composed_epsilon
from fedlora.recipe import Recipe

FILE = "usage.json"
DELTA = 1e-6
"""Probability that the bound on a site's whole epsilon fails."""
REPEATS = 15
"""Turns of a client in one round that count as one: the attempts at a round, times the tries of a job, by default."""
_EMPTY: dict[str, Any] = {"runs": [], "rounds": 0, "last": None, "steps": {}, "day": "", "bytes": 0, "work": None}


class Usage:
    """Counts runs, rounds, epsilon and bytes of a site against its limits; a restart forgets nothing.

    Everything is counted before it is done. Without cumulative limits, nothing is counted.

    Args:
        folder: the folder of the site's state.
        limits: the site's policy.
    """

    def __init__(self, folder: Path, limits: SitePolicy) -> None:
        self._file, self._limits = folder / FILE, limits

    def open_run(self, run: str, per_round: int) -> None:
        """Counts a run, unless it was opened before.

        Args:
            run: its name.
            per_round: the number of clients in a cohort, as announced by the server.

        Raises:
            ConfigError: a limit is exceeded.
        """
        least, most = self._limits.min_cohort, self._limits.max_runs
        if least is not None and per_round < least:
            raise ConfigError(f"{per_round} clients are asked in a round, and {least} must be averaged here")
        if most is None:
            return
        held = self._read()
        if run not in held["runs"]:
            if len(held["runs"]) >= most:
                raise ConfigError(self._reached(f"max_runs = {most} runs"))
            self._write({**held, "runs": [*held["runs"], run]})

    def begin_turn(self, run: str, round: int, recipe: Recipe, examples: int, client: int) -> None:
        """Counts a client's turn before it begins.

        Args:
            run: the name of the run.
            round: the round of the run; a repeated one is not counted again, up to ``REPEATS`` times, but its noise is.
            recipe: the recipe of the job.
            examples: the number of the client's examples.
            client: the number of the client.

        Raises:
            ConfigError: a limit is exceeded.
        """
        limits = self._limits
        if limits.max_rounds is None and limits.max_epsilon is None:
            return
        held = self._read()
        last, number = held["last"] or [], str(client)
        turns = last[2] if len(last) == 3 and last[:2] == [run, round] else {}
        before = turns.get(number, 0)
        held["rounds"] += not turns or before >= REPEATS
        held["last"] = [run, round, {**turns, number: before % REPEATS + 1}]
        if limits.max_rounds is not None and held["rounds"] > limits.max_rounds:
            raise ConfigError(self._reached(f"max_rounds = {limits.max_rounds} rounds"))
        if limits.max_epsilon is not None:
            noise = recipe.local.example_privacy
            if noise is None or not noise.noise_multiplier:
                raise ConfigError(
                    f"max_epsilon = {limits.max_epsilon:g} is set here, and the recipe adds no noise to examples; set "
                    "local.example_privacy"
                )
            chance = min(1.0, recipe.local.batch_size / max(1, examples))
            key = f"{noise.noise_multiplier!r} {chance!r}"
            held["steps"][key] = held["steps"].get(key, 0) + recipe.local.num_steps(examples)
            spent = [(*map(float, key.split()), steps) for key, steps in held["steps"].items()]
            if composed_epsilon(spent, DELTA) > limits.max_epsilon:
                raise ConfigError(self._reached(f"max_epsilon = {limits.max_epsilon:g} at delta = {DELTA:g}"))
        self._write(held)

    def add_bytes(self, size: int) -> None:
        """Counts a message in either direction.

        Raises:
            ConfigError: the limit of the day, in UTC, is exceeded.
        """
        most = self._limits.max_megabytes_per_day
        if most is None:
            return
        held, today = self._read(), time.strftime("%Y-%m-%d", time.gmtime())
        held |= {"day": today, "bytes": size + (held["bytes"] if held["day"] == today else 0)}
        self._write(held)
        if held["bytes"] > 1e6 * most:
            raise ConfigError(self._reached(f"max_megabytes_per_day = {most:g} MB"))

    def begin_work(self, ticket: str) -> None:
        """Notes the message that is worked on, so that it is not begun again after the watchdog ended the process.

        Raises:
            ConfigError: it was begun before, longer ago than the limit.
        """
        most = self._limits.max_seconds
        if most is None:
            return
        held = self._read()
        if held["work"] and held["work"][0] == ticket:
            if time.time() - held["work"][1] >= most:
                raise ConfigError(f"it took longer than max_seconds = {most:g}, and was given up")
            return
        self._write({**held, "work": [ticket, time.time()]})

    def end_work(self) -> None:
        """Notes that the message is done with: if its reply is lost, it comes again, however much later."""
        if self._limits.max_seconds is not None:
            self._write({**self._read(), "work": None})

    def _reached(self, what: str) -> str:
        return f"this site's limit of {what} is reached; its owner may raise it in site.toml"

    def _read(self) -> dict[str, Any]:
        if not self._file.exists():
            return {**_EMPTY, "runs": [], "steps": {}}
        try:
            held = json.loads(self._file.read_text(encoding="utf-8"))
            if not isinstance(held, dict) or held.keys() != _EMPTY.keys():
                raise ValueError("it has other keys")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._file} cannot be read ({error}), so no job is accepted; restore it, or remove it to "
                "restart the counts"
            ) from error
        return held

    def _write(self, held: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self._file, json.dumps(held).encode())
