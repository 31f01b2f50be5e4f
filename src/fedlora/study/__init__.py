"""Tuning and studies: settings chosen on held-out training data, methods compared over settings and seeds."""

from __future__ import annotations

from fedlora.study.gates import GateError
from fedlora.study.plan import Study, load_study, parse_study
from fedlora.study.runner import run_study
from fedlora.study.tables import FORMATS
from fedlora.study.tuning import Tuned, tune

__all__ = ["FORMATS", "GateError", "Study", "Tuned", "load_study", "parse_study", "run_study", "tune"]
