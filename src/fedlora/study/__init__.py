"""Tuning and studies: settings chosen on held-out training data, methods compared over settings and seeds."""

from __future__ import annotations

from fedlora.study.tuning import Tuned, tune

__all__ = ["Tuned", "tune"]
