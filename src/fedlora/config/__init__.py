"""Experiment configurations as Python values and as TOML: parsing, validation, printing.

Nothing in this package loads a model or trains.
"""

from fedlora.config.experiment import (
    Evaluate,
    Experiment,
    default_folder,
    differences,
    digest,
    folder_name,
    parse,
    resolved,
    to_toml,
)
from fedlora.config.reading import assign, document_of, load, override, toml_value

__all__ = [
    "Evaluate",
    "Experiment",
    "assign",
    "default_folder",
    "differences",
    "digest",
    "document_of",
    "folder_name",
    "load",
    "override",
    "parse",
    "resolved",
    "to_toml",
    "toml_value",
]
