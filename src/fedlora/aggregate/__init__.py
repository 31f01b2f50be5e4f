"""The slot ``Aggregator`` and its table."""

from __future__ import annotations

from typing import Annotated

from fedlora.aggregate.base import Accumulator, Aggregator, Needs
from fedlora.aggregate.means import CoordinateMedian, Krum, Mean, NormBound, TrimmedMean
from fedlora.aggregate.products import ProductExact, SparsityWeighted, Stack, SvdRedistribute
from fedlora.component import Field, by_kind

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
    Field(discriminator="kind"),
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
