"""Descriptions of the methods' arguments, most of which they share."""

from __future__ import annotations

from fedlora.core.docs import arguments
from fedlora.recipe import Recipe
from fedlora.tuning import LoRA

_SHARED = {
    **arguments(Recipe),
    **{name: arguments(LoRA)[name] for name in ("rank", "alpha", "dropout")},
    "rounds": "how many rounds, those of all phases together.",
    "targets": "the adapted matrices: default, all-linear, a regular expression, or the ends of their names.",
    "precision": "the number format of what is sent, in both directions.",
    "weighting": "whether clients count alike, or by their examples.",
    "split": "how the singular values are shared between the factors: symmetric, or left, where B gets all of them.",
    "warm_rounds": "rounds of the first phase; a quarter of rounds if absent.",
    "warm_server": "the server's step in the first phase; that of the second if absent.",
    "warm_local": "a client's turn in the first phase; that of the second if absent.",
    "fold": "what goes into the base at the hand-over: nothing, the trained biases, or all that LoRA leaves out.",
    "every": "rounds between two steps of the decay.",
    "scope": "one threshold for all tensors, or one for each.",
}
_OWN = {
    "flasc.down": "the share of entries that is sent to clients.",
    "flasc.up": "the share of entries that is sent back.",
    "flasc.init": "where the factors start.",
    "flasc.decay": "what the density of both links is multiplied by each time.",
    "flasc.decay_every": "rounds between two steps of the decay.",
    "flasc.quota": "shares of A, B or the head apart from the others.",
    "flasc.reference": "what entries are ranked and sent relative to: zero, or the phase's start.",
    "flasc.feedback": "whether a client adds what its last upload left out to the next one; asks for a memory.",
    "flora.reference": "init: clients draw the new A from its seed; zero: it is sent.",
    "slora.density": "the share of each matrix that the mask covers; as many entries as its adapter has if absent.",
    "slora.mask_targets": "the matrices that the mask covers; those of targets if absent.",
    "slora.biases": "whether the biases of these matrices are trained in the first phase.",
    "sparse_adapter.density": "the share of the adapter's entries that is kept after the first round.",
    "adapter_lth.keep": "the share of what is left that stays each time.",
    "fed_select.keep": "what the density of both links is multiplied by each time.",
    "fedex.fold_rank": "how many ranks of each round's correction are kept; all of them if absent.",
    "het_lora.padding": "what counts at ranks that a client lacks: zero, as published, or keep, the server's own.",
}


def argument_text(method: str, name: str) -> str:
    """The description of a method's argument.

    Args:
        method: its name in ``[method]``.
        name: the argument's name, or that of a key of a recipe.
    """
    return _OWN.get(f"{method}.{name}") or _SHARED.get(name, "")
