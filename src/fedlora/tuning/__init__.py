"""The slot ``Tuning`` and its table."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedlora.tuning.base import Installed, Start, Tuning
from fedlora.tuning.bottleneck import Bottleneck
from fedlora.tuning.lora import LoRA, from_peft, to_peft
from fedlora.tuning.lora_init import LORA_INITS, Kaiming, LoRAInit, Orthogonal, SvdOfDelta, SvdOfWeight
from fedlora.tuning.peft import Peft
from fedlora.tuning.subset import BitFit, Full, HeadOnly, SparseMask

TUNINGS: dict[str, type[Tuning]] = {
    "lora": LoRA,
    "full": Full,
    "head_only": HeadOnly,
    "bitfit": BitFit,
    "sparse_mask": SparseMask,
    "bottleneck": Bottleneck,
    "peft": Peft,
}
AnyTuning = Annotated[
    LoRA | Full | HeadOnly | BitFit | SparseMask | Bottleneck | Peft,
    Field(discriminator="kind"),
]

__all__ = [
    "LORA_INITS",
    "TUNINGS",
    "AnyTuning",
    "BitFit",
    "Bottleneck",
    "Full",
    "HeadOnly",
    "Installed",
    "Kaiming",
    "LoRA",
    "LoRAInit",
    "Orthogonal",
    "Peft",
    "SparseMask",
    "Start",
    "SvdOfDelta",
    "SvdOfWeight",
    "Tuning",
    "from_peft",
    "to_peft",
]
