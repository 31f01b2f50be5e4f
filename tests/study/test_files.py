"""The project's own studies are files like anybody's: each is read, and each of its runs is a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora import config
from fedlora.study.plan import load_study

FOLDER = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_a_study_of_the_project_is_a_file_that_anyone_could_have_written(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    # what is not tuned ranks nothing
    assert len(study.seeds) == (3 if study.tuned else 1)
    for setting in study.settings():
        for label in study.labels:
            experiment = config.parse(study.document(label, setting, 0))
            assert experiment.rounds > 0
            assert study.varied(label) or not study.tuned
