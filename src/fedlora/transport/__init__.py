"""What is sent in one direction and in which form: the ``Link`` slot, its parts and the wire format.

No module here trains, aggregates, or depends on the method in use.
"""

from __future__ import annotations

from fedlora.transport.layout import Draw
from fedlora.transport.link import PRECISIONS, SPARSIFIERS, AnyPrecision, AnySparsifier, Link, Stage
from fedlora.transport.precision import BFloat16, Float16, Float32, Precision
from fedlora.transport.sparsify import Dense, Quota, RandomK, RankSlice, Sparsifier, Threshold, TopK
from fedlora.transport.uniform import Uniform
from fedlora.transport.wire import Form, Packet, pack, unpack

__all__ = [
    "PRECISIONS",
    "SPARSIFIERS",
    "AnyPrecision",
    "AnySparsifier",
    "BFloat16",
    "Dense",
    "Draw",
    "Float16",
    "Float32",
    "Form",
    "Link",
    "Packet",
    "Precision",
    "Quota",
    "RandomK",
    "RankSlice",
    "Sparsifier",
    "Stage",
    "Threshold",
    "TopK",
    "Uniform",
    "pack",
    "unpack",
]
