"""Trackers of fedlora 0.1.0; they are callbacks now, and an import says so."""

from fedlora.callbacks import moved as __getattr__  # noqa: F401
