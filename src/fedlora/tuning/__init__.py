"""Which weights are trained and how they are installed in the model: the ``Tuning`` slot, and LoRA's initialisations.

Only this folder imports ``peft``; nothing here depends on rounds or clients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedlora.core.component import by_kind
from fedlora.core.slots import Slot
from fedlora.tuning.base import InitialParams, Installed, Tuning
from fedlora.tuning.bottleneck import Bottleneck
from fedlora.tuning.lora import LoRA
from fedlora.tuning.lora_init import LORA_INITS, Kaiming, LoRAInit, Orthogonal, SvdOfDelta, SvdOfWeight
from fedlora.tuning.peft import Peft
from fedlora.tuning.peft_names import from_peft, to_peft
from fedlora.tuning.subset import BitFit, Full, HeadOnly, SparseMask

if TYPE_CHECKING:
    AnyTuning = Tuning
else:
    AnyTuning = Annotated[
        LoRA | Full | HeadOnly | BitFit | SparseMask | Bottleneck | Peft,
        Slot("tuning", Tuning),
    ]
TUNINGS: dict[str, type[Tuning]] = by_kind(AnyTuning)

__all__ = [
    "LORA_INITS",
    "TUNINGS",
    "AnyTuning",
    "BitFit",
    "Bottleneck",
    "Full",
    "HeadOnly",
    "InitialParams",
    "Installed",
    "Kaiming",
    "LoRA",
    "LoRAInit",
    "Orthogonal",
    "Peft",
    "SparseMask",
    "SvdOfDelta",
    "SvdOfWeight",
    "Tuning",
    "from_peft",
    "to_peft",
]
