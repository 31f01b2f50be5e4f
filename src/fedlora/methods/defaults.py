"""The optimisers that methods begin with; `benchmarks/defaults.py` measures them, `docs/results.md` has the figures."""

from __future__ import annotations

from fedlora.core.rates import LrScale
from fedlora.recipe.local import Local, Sgd
from fedlora.server.optimizers import AdamW

ADAPTIVE = AdamW(lr=5e-3, weight_decay=0.0, lr_scale=LrScale(head=10.0))
"""The server of methods that add up changes of adapters.

SGD on clients keeps the relative size of a gradient's entries, which sparse links and pruning choose by; AdamW on the
server makes up for how unequal these are. A fresh head wants a higher rate than adapters do."""

ADAPTIVE_FULL = AdamW(lr=1e-3, weight_decay=0.0, lr_scale=LrScale(head=10.0))
"""The same where pre-trained weights themselves move."""

PLAIN = Local(optimizer=Sgd(lr=0.2))
"""The clients of methods whose server must take the mean as it is: what a round moves is decided here alone."""
