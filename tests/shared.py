"""Where real data and recorded runs lie, if they lie anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """A file or folder of the shared data; the test is skipped, and says so, where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is not beside the project (../shared)")
    return found
