"""The slot ``Aggregator`` and its table."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from fedlora.aggregate.base import Accumulator, Aggregator, Needs
from fedlora.aggregate.means import CoordinateMedian, Krum, Mean, NormBound, TrimmedMean
from fedlora.aggregate.products import ProductExact, SparsityWeighted, Stack, SvdRedistribute

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
AGGREGATORS: dict[str, type[Aggregator]] = {cls.kind: cls for cls in get_args(get_args(AnyAggregator)[0])}

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
