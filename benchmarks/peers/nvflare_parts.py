"""What NVFlare's server is made of beside its own parts: the adapter as a module, and a clock."""

from __future__ import annotations

from pathlib import Path

import torch
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_event_type import AppEventType
from nvflare.widgets.widget import Widget

from benchmarks.peers.job import Job, Work


def marked(name: str) -> str:
    """A parameter's name as a module may have it, without dots."""
    return name.replace(".", "~")


def plain(name: str) -> str:
    """The inverse of ``marked``."""
    return name.replace("~", ".")


class Adapter(torch.nn.Module):
    """The job's LoRA start and nothing else, so that the server neither loads nor sends frozen weights."""

    def __init__(self, job: str) -> None:
        super().__init__()
        for name, value in Job(Path(job)).start().items():
            self.register_parameter(marked(name), torch.nn.Parameter(value))


class Clock(Widget):
    """Notes when each round ended."""

    def __init__(self, job: str, out: str) -> None:
        super().__init__()
        self.job, self.out = job, out

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        first = event_type == AppEventType.ROUND_STARTED and not (Path(self.out) / "rounds.txt").exists()
        if first or event_type == AppEventType.AFTER_AGGREGATION:
            Work(Path(self.job), Path(self.out)).round_ended()
