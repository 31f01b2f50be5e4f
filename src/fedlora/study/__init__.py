"""Comparisons of equally tuned methods: trials, final runs over seeds, gates, tables.

A study trains through the same public entry points as users do.
"""

from __future__ import annotations

from fedlora.study.gates import GateError
from fedlora.study.plan import Study, load_study, parse_study
from fedlora.study.runner import run_study
from fedlora.study.tables import FORMATS
from fedlora.study.tuning import Tuned, tune

__all__ = ["FORMATS", "GateError", "Study", "Tuned", "load_study", "parse_study", "run_study", "tune"]
