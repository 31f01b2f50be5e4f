"""Experiments as values and as TOML: reading, checking, printing.

Nothing here loads a model or trains.
"""

from fedlora.config.experiment import Evaluate, Experiment, differences, digest, parse, resolved, to_toml
from fedlora.config.reading import assign, document_of, load, override, toml_value

__all__ = [
    "Evaluate",
    "Experiment",
    "assign",
    "differences",
    "digest",
    "document_of",
    "load",
    "override",
    "parse",
    "resolved",
    "to_toml",
    "toml_value",
]
