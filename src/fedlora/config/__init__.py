"""Experiment configurations as Python values and as TOML: parsing, validation, printing.

Nothing in this package loads a model or trains.
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
