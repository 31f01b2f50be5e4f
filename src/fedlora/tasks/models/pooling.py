"""How a sequence classifier pools the token states."""

from __future__ import annotations

from typing import Literal

Pooling = Literal["model", "cls", "mean"]
POOLER_FAMILIES = frozenset({"albert", "bert", "ernie", "megatron-bert", "mobilebert", "rembert"})
"""Families whose stock class classifies what a pooler makes of the first token. The pooler belongs to the backbone, so
adapters leave it as it was pre-trained."""
LAST_TOKEN_FAMILIES = frozenset({"xlnet"})
"""Families whose stock class reads the last position whatever it is, which in a batch is padding on the right."""
