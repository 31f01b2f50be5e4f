"""Descriptions of the methods' arguments, most of which they share."""

from __future__ import annotations

from fedlora.core.docs import arguments
from fedlora.recipe import Recipe
from fedlora.tuning import LoRA

_SHARED = {
    **arguments(Recipe),
    **{name: arguments(LoRA)[name] for name in ("rank", "alpha", "dropout")},
    "rounds": "total number of rounds, over all phases.",
    "targets": "the adapted matrices: default, all-linear, a regular expression, or suffixes of their names.",
    "precision": "the number format of messages, in both directions.",
    "weighting": "whether clients weigh the same, or by their number of examples.",
    "split": "how the singular values are shared between the factors: symmetric, or left, where B gets all of them.",
    "warm_rounds": "rounds of the first phase; a quarter of rounds if absent.",
    "warm_server": "the server's step in the first phase; in slora, that of the second if absent.",
    "warm_local": "a client's turn in the first phase; that of the second if absent.",
    "fold": "updates added to the base between the phases: none, the trained biases, or all that LoRA leaves out.",
    "every": "rounds between two steps of the decay.",
    "scope": "one threshold for all tensors, or one for each.",
    "whole_head": "whether the task head is left out of pruning and of sparse messages.",
}
_OWN = {
    "flasc.down": "the share of entries that is sent to clients.",
    "flasc.up": "the share of entries that clients send.",
    "flasc.init": "where the factors start.",
    "flasc.decay": "factor on the density of both links at each step of the decay.",
    "flasc.decay_every": "rounds between two steps of the decay.",
    "flasc.quota": "shares of A, B or the head apart from the others.",
    "flasc.reference": "the reference of ranking and sending entries: zero, or the phase's start.",
    "flasc.feedback": "whether a client adds entries that its last upload left out to the next one; needs a memory.",
    "flora.reference": "init: clients draw the new A from its seed; zero: it is sent.",
    "slora.density": "the share of each matrix that the mask covers; as many entries as its adapter has if absent.",
    "slora.mask_targets": "the matrices that the mask covers; those of targets if absent.",
    "slora.biases": "whether the biases of these matrices are trained in the first phase.",
    "sparse_adapter.density": "the share of the adapter's entries that is kept after the first round.",
    "adapter_lth.keep": "the share of the remaining entries kept at each pruning.",
    "fed_select.keep": "factor on the density of both links at each step of the decay.",
    "fedex.fold_rank": "how many ranks of each round's correction are kept; all of them if absent.",
    "fedex.max_base_share": "the largest base update of a round, as a share of the model; a half if absent.",
    "flora.max_base_share": "the largest base update of a round, as a share of the model; a half if absent.",
    "het_lora.padding": "the values of ranks that a client lacks: zero, as published, or keep, the server's own.",
}


def argument_text(method: str, name: str) -> str:
    """The description of a method's argument.

    Args:
        method: its name in ``[method]``.
        name: the argument's name, or that of a key of a recipe.
    """
    return _OWN.get(f"{method}.{name}") or _SHARED.get(name, "")
