"""How many processes a study takes, and which GPU each of them has."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from fedlora.study import pool


def test_one_process_for_each_gpu_or_else_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert pool.processes_for(None) == 3
    assert pool.processes_for(5) == 5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5, 6}, raising=False)
    assert pool.processes_for(None) == 5


@pytest.mark.parametrize(("gpus", "used"), [(2, [0, 1, 0]), (1, []), (0, [])])
def test_processes_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, gpus: int, used: list[int]) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(pool, "worker_signals", lambda: None)
    begun = multiprocessing.get_context("spawn").Value("i", 0)
    for _ in range(3):
        pool._begin(begun)
    assert found == used
