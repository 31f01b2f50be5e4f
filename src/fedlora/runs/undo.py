"""Going back by a round after which the model cannot be trained any more."""

from __future__ import annotations

import shutil
from collections.abc import Collection

from fedlora.core.errors import DivergedError, TrainingError
from fedlora.engines import Engine
from fedlora.runs.folder import RunFolder


def undo(error: DivergedError, files: RunFolder, engine: Engine, barred: Collection[int]) -> tuple[int, str]:
    """Removes the checkpoint of the round that caused a divergence, if it was saved, and names the likely cause.

    Only remote clients are suspected: the same round of a simulation would end in the same way.

    Args:
        error: the divergence.
        files: the run's folder, with a checkpoint of every round.
        engine: where clients run.
        barred: the clients that are not asked any more.

    Returns:
        The client not to ask again, and a sentence for the ledger.

    Raises:
        TrainingError: the clients are trusted.
        DivergedError: none can be suspected, or too few would remain.
    """
    present = engine.present()
    if engine.trusted or present is None:
        raise TrainingError(str(error)) from error
    remaining = present - {*barred, error.suspect[0]} if error.suspect else frozenset()
    if error.suspect is None or error.suspect[0] in barred or len(remaining) < max(1, engine.min_clients):
        raise DivergedError(
            f"{error}; to go back by hand, remove the newest folder in {files.path / 'checkpoints'} and give the same "
            "command again",
            error.suspect,
        ) from error
    client, norm = error.suspect
    if error.recorded:
        shutil.rmtree(files.checkpoints[-1])
    return client, (
        f"a round was undone: {error}; its longest update, of norm {norm:.3g}, was that of client {client}, which is "
        "not asked any more until the server is started again"
    )
