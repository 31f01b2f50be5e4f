"""What a process says is what every other says: fingerprints of what is handed over, and an adapter's settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.tiny import experiment, tiny_world
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedlora
from fedlora import config
from fedlora.tasks.models.loading import quiet_transformers

world = pytest.fixture(scope="module")(tiny_world)
pytestmark = pytest.mark.slow  # each process loads PyTorch
ROWS = [{"text": "w1", "label": 3}]
THERE = """
import sys
import fedlora, transformers
from fedlora import config
bert, rows, out, *runs = sys.argv[1:]
autos = transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer
pair = tuple(auto.from_pretrained(bert) for auto in autos)
print(config.digest(fedlora.Experiment(data=eval(rows), model=pair)))
for number, run in enumerate(runs):
    fedlora.load_run(run).export(f"{out}/{number}")
"""


def test_fingerprints_and_adapters_are_the_same_in_every_process(world: Path, tmp_path: Path) -> None:
    assert fedlora.Rows(train=ROWS).train.fingerprint == "rows:7374b7efef5d01a2b8613c672466244c"
    with quiet_transformers():
        autos = (AutoModelForSequenceClassification, AutoTokenizer)
        own = fedlora.Experiment(data=ROWS, model=tuple(auto.from_pretrained(world / "bert") for auto in autos))
    runs = [tmp_path / "lora", tmp_path / "peft"]
    fedlora.run(experiment(world, "lora", "method.targets='all-linear'", rounds=1), runs[0])
    fedlora.run(experiment(world, "peft", rounds=1), runs[1])
    # it imports for seconds, so one serves both; it has another seed of hashes
    done = subprocess.run(
        [sys.executable, "-c", THERE, str(world / "bert"), repr(ROWS), str(tmp_path), *map(str, runs)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == [config.digest(own)]
    for number, run in enumerate(runs):
        written = (run / "adapter" / "adapter_config.json").read_bytes()
        assert (tmp_path / str(number) / "adapter_config.json").read_bytes() == written
