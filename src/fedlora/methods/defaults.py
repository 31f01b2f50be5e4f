"""The methods' default optimisers; `tests/methods/test_defaults.py` holds each against the head alone."""

from __future__ import annotations

from fedlora.core.rates import LrScale
from fedlora.recipe.local import Local, Sgd
from fedlora.server.optimizers import AdamW as ServerAdamW

ADAPTIVE = ServerAdamW(lr=5e-3, weight_decay=0.0, lr_scale=LrScale(head=10.0))
"""The server optimiser of methods that average changes of adapters.

SGD on clients preserves the relative magnitudes of a gradient's entries, by which sparse links and pruning choose;
AdamW on the server compensates for how unequal they are. A fresh head needs a higher learning rate than adapters do."""

ADAPTIVE_FULL = ServerAdamW(lr=1e-3, weight_decay=0.0, lr_scale=LrScale(head=10.0))
"""The same for methods that train the pre-trained weights themselves."""

HEAD = ServerAdamW(lr=5e-2, weight_decay=0.0)
"""The server optimiser of the head in methods whose adapters need the mean as it is: no product is taken of a head."""

LARGER = Local(optimizer=Sgd(lr=0.1))
"""Clients of these methods: nothing on the server enlarges the step of their adapters, and they diverge above 0.3."""

SLOWER = Local(optimizer=Sgd(lr=0.01))
"""Clients of FlexLoRA, whose orthonormal ``A`` enlarges the steps of ``B``: higher rates lose accuracy in the end."""

PLAIN = Local(optimizer=Sgd(lr=0.05), lr_scale=LrScale(head=20.0))
"""Clients of plain averaging, where nothing on the server enlarges the step of the head."""
