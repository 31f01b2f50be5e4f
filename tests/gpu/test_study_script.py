"""``scripts/gpu-study`` brings back what had ended when its time was over."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu-study"
STAND_IN = """
import pathlib, sys, time
runs = pathlib.Path(next(word for word in sys.argv if word.startswith("--out=")).removeprefix("--out="))
if "--stage=table" in sys.argv:
    runs.mkdir(parents=True)
    (runs / "results.json").write_text("{}")
else:
    time.sleep(60)
"""


def test_the_results_of_a_study_that_was_stopped_come_back(tmp_path: Path) -> None:
    (tmp_path / "src" / "fedlora").mkdir(parents=True)
    (tmp_path / "src" / "fedlora" / "__init__.py").touch()
    (tmp_path / "src" / "fedlora" / "__main__.py").write_text(STAND_IN)
    (tmp_path / ".gpu-study").mkdir()
    with tarfile.open(tmp_path / ".gpu-study" / "part-00", "w") as tar:
        file = tarfile.TarInfo(".gpu-study/files/study.toml")
        tar.addfile(file, io.BytesIO(b""))
    words = [sys.executable, str(SCRIPT), "here", "study.toml", "--minutes=0"]
    ended = subprocess.run(words, cwd=tmp_path, env=os.environ | {"OUT": str(tmp_path / "out")}, check=False)
    assert ended.returncode == 124
    assert (tmp_path / "out" / "results.json").read_text() == "{}"
