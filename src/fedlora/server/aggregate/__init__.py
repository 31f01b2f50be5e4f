"""The ``Aggregator`` slot: how the updates of a cohort become one change.

An aggregator sees updates and a schema, never clients, links or noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedlora.core.component import by_kind
from fedlora.core.slots import Slot
from fedlora.server.aggregate.base import Accumulator, Aggregator, Needs
from fedlora.server.aggregate.means import CoordinateMedian, Krum, Mean, NormBound, TrimmedMean
from fedlora.server.aggregate.products import ProductExact, SparsityWeighted, Stack, SvdRedistribute

if TYPE_CHECKING:
    AnyAggregator = Aggregator
else:
    AnyAggregator = Annotated[
        Mean
        | SparsityWeighted
        | SvdRedistribute
        | ProductExact
        | Stack
        | CoordinateMedian
        | TrimmedMean
        | Krum
        | NormBound,
        Slot("aggregator", Aggregator),
    ]
AGGREGATORS: dict[str, type[Aggregator]] = by_kind(AnyAggregator)

__all__ = [
    "AGGREGATORS",
    "Accumulator",
    "Aggregator",
    "AnyAggregator",
    "CoordinateMedian",
    "Krum",
    "Mean",
    "Needs",
    "NormBound",
    "ProductExact",
    "SparsityWeighted",
    "Stack",
    "SvdRedistribute",
    "TrimmedMean",
]
