"""What holds for every test process.

One thread each: tiny models gain nothing from more, and several processes would starve each other. Ctrl-C works as in a
terminal: whoever starts the tests in the background has it ignored, and so would they. What was imported stays, so no
garbage is looked for in it.
"""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # what tests leave behind is small


@pytest.fixture(autouse=True, scope="session")
def _one_thread_and_nothing_made_twice() -> Iterator[None]:
    # the process that hands out tests to others needs neither
    import torch
    from fixtures.copies import copied_tiny_models, kept_costs

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        copied_tiny_models(patch)
        kept_costs(patch)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging.getLogger("fedlora"), "propagate", True)  # a command ends it, and caplog needs it
