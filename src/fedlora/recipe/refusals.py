"""Combinations that would run but mislead: a table over the properties that parts declare, with an error message
each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from fedlora.core.errors import ConfigError
from fedlora.core.slots import kind_of
from fedlora.recipe.modes import MODES

if TYPE_CHECKING:
    from fedlora.config import Experiment
    from fedlora.population.tiers import Tier
    from fedlora.recipe.recipe import Recipe

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Refusal(Generic[Subject]):
    """A refused combination.

    Args:
        when: a predicate over declared properties: whether the refusal applies.
        text: what is wrong and how to fix it. Names in braces stand for parts of the recipe.
    """

    when: Callable[[Subject], bool]
    text: str


class TierOf(NamedTuple):
    """A tier and the recipe that it modifies."""

    tier: Tier
    recipe: Recipe

    @property
    def slices(self) -> bool:
        """Whether its clients have fewer ranks than the recipe."""
        whole = self.recipe.tuning.adapter_rank
        return (self.tier.rank or whole) < whole


RECIPE_REFUSALS: dict[str, Refusal[Recipe]] = {
    "sparse_downlink_of_pretrained": Refusal(
        lambda r: (
            r.down.drops_entries
            and r.down.reference == "zero"
            and not (r.tuning.lost_ranks_are_neutral if r.down.slices_ranks else r.tuning.zero_is_neutral)
        ),
        "a sparse downlink would set weights to zero that carry pre-trained knowledge; set down.reference = 'init' so "
        "that only the difference from the public start is sparsified",
    ),
    "prune_pretrained": Refusal(
        lambda r: r.prune is not None and not r.tuning.zero_is_neutral,
        "pruning sets trained weights to zero, and these carry pre-trained knowledge; use tuning 'lora' without dora, "
        "with a kaiming or orthogonal init, or leave prune out",
    ),
    "prune_under_noise": Refusal(
        lambda r: r.prune is not None and not r.privacy.is_none,
        "noise is added to pruned entries too and brings them back; leave privacy or prune out",
    ),
    "prune_hidden": Refusal(
        lambda r: r.prune is not None and _moves_zeros(r),
        "clients recognise pruned entries by their zeros, and these must stay; with prune, use a down link that "
        "is dense, in floating point and relative to zero, memory 'none' or 'init', links without feedback, and "
        "an aggregator that is a mean",
    ),
    "uplink_from_init": Refusal(
        lambda r: r.up.reference == "init",
        "the uplink carries a difference already; leave up.reference at 'zero'",
    ),
    "decay_after_svd": Refusal(
        lambda r: (
            r.tuning.adapter_rank > 0 and not r.tuning.zero_is_neutral and (r.local.optimizer.decays or r.server.decays)
        ),
        "weight decay pulls factors to zero, which carry knowledge after an SVD start, and DoRA's magnitudes, which "
        "always do; set weight_decay = 0 in local.optimizer and in server",
    ),
    "server_decay_of_frozen_factor": Refusal(
        lambda r: r.tuning.moving != "both" and r.server.decays,
        "the server's weight decay would move the frozen factor; set weight_decay = 0 in server",
    ),
    "rates_without_factors": Refusal(
        lambda r: bool(_factor_rate(r)) and not r.tuning.has_factors,
        "{rate} applies to low-rank factors, and tuning {tuning} has none; name adapter or head, or leave it out",
    ),
    "local_rate_of_frozen_factor": Refusal(
        lambda r: r.tuning.moving == "B" and r.local.lr_scale.A != 1,
        "local.lr_scale.A has no effect where tuning.train = 'B'; leave it out",
    ),
    "server_rate_of_frozen_factor": Refusal(
        lambda r: r.tuning.moving == "B" and r.server.lr_scale.A != 1,
        "server.lr_scale.A has no effect where tuning.train = 'B'; leave it out",
    ),
    "head_rate_of_two_servers": Refusal(
        lambda r: r.server_head is not None and (r.server.lr_scale.head != 1 or bool(r.server_head.lr_scale.moved)),
        "server_head steps the head, and nothing else does; set server_head.lr, and leave server.lr_scale.head "
        "(warm_server.lr_scale.head too, if there is one) and server_head.lr_scale at 1",
    ),
    "feedback_without_memory": Refusal(
        lambda r: r.up.feedback and r.memory == "none",
        "up.feedback adds the entries that a client's last message left out to its next one, so clients need a "
        "memory; set memory to 'init' or 'last_round', or up.feedback to false",
    ),
    "feedback_after_clip": Refusal(
        lambda r: r.up.feedback and not r.privacy.is_none,
        "feedback would later send the part that clipping removed; set up.feedback to false",
    ),
    "ranks_by_norm_of_difference": Refusal(
        lambda r: r.memory == "last_round" and any(each.slices_ranks and each.reads_values for each in r.down.facts),
        "the ranks of largest norm would be those of the difference from the last round; they change from round "
        "to round, and a client would accumulate all of them; choose ranks by 'order', or set memory to 'init' "
        "or 'none'",
    ),
    "down_feedback_with_last_round": Refusal(
        lambda r: r.down.feedback and r.memory == "last_round",
        "the difference from the client's copy already corrects all losses of earlier messages; set "
        "down.feedback to false, or memory to 'init'",
    ),
    "rescaled_downlink": Refusal(
        lambda r: r.down.rescales,
        "down.sparsify scales up the kept entries, which is correct only for the mean of many changes; set "
        "rescale = false in down.sparsify",
    ),
    "rescaled_uplink_with_feedback": Refusal(
        lambda r: r.up.rescales and r.up.feedback,
        "up.sparsify scales up the kept entries, which is correct only for the mean of many changes; set "
        "rescale = false in up.sparsify",
    ),
    "factors_rebuilt_from_sparse": Refusal(
        lambda r: r.aggregator.needs == "factors" and r.down.drops_entries and not r.down.slices_ranks,
        "{aggregator} rebuilds the factors from what clients received, and entries left out would be lost; leave "
        "down.sparsify at dense",
    ),
    "zero_padding_of_sparse": Refusal(
        lambda r: r.aggregator.pads_with_zeros and r.down.drops_entries and not r.down.slices_ranks,
        "padding with zeros treats ranks that a sparse link left out as ranks that the client lacks, and they "
        "decay to zero; set aggregator.padding = 'keep', or leave down.sparsify at dense",
    ),
    "coordinates_of_sparse": Refusal(
        lambda r: r.aggregator.coordinatewise and (r.up.drops_entries or r.down.drops_entries),
        "{aggregator} works on each coordinate, and a sparse link leaves it out for most clients, so hardly any "
        "would change; leave sparsify at dense",
    ),
    "rescaled_uplink_without_mean": Refusal(
        lambda r: r.up.rescales and not r.aggregator.unbiased,
        "up.sparsify scales up the kept entries, which is correct only for a plain mean; use aggregator 'mean'",
    ),
    "frozen_factor_loses_entries": Refusal(
        lambda r: (
            r.tuning.moving != "both" and (r.prune is not None or (r.down.drops_entries and r.down.reference == "zero"))
        ),
        "the frozen factor would lose entries to a sparse downlink or to pruning; set down.reference = 'init', "
        "or leave down.sparsify and prune out",
    ),
    "alternating_factors_with_memory": Refusal(
        lambda r: r.tuning.moving == "alternate" and (r.up.feedback or r.server.remembers),
        "momentum, moments and feedback of one round would move the frozen factor in the next; set server.kind "
        "to 'sgd' without momentum, and up.feedback to false",
    ),
    "example_noise_with_weights": Refusal(
        lambda r: r.local.example_privacy is not None and r.aggregator.weighs_by_examples,
        "under local.example_privacy clients do not report their number of examples; set aggregator.weighting = "
        "'uniform'",
    ),
    "example_noise_with_timeout": Refusal(
        lambda r: r.local.example_privacy is not None and r.local.timeout_seconds is not None,
        "whether a client runs out of time depends on the lengths of examples; leave local.example_privacy or "
        "timeout_seconds out",
    ),
    "example_noise_with_shrink": Refusal(
        lambda r: r.local.example_privacy is not None and r.shrink is not None,
        "the penalty of shrink would bypass the noise; leave local.example_privacy or shrink out",
    ),
    "noise_without_uniform_mean": Refusal(
        lambda r: r.privacy.needs_uniform_mean and not (r.aggregator.unbiased and not r.aggregator.weighs_by_examples),
        "noise is calibrated for a mean of clients that all weigh the same; set aggregator.kind = 'mean' and "
        "aggregator.weighting = 'uniform'",
    ),
    "products_without_factors": Refusal(
        lambda r: r.aggregator.needs_factors and not r.tuning.adapter_rank,
        "aggregator {aggregator} works on products B A; use it with tuning 'lora'",
    ),
    "products_of_dora": Refusal(
        lambda r: r.aggregator.needs == "factors" and not r.tuning.sums_products,
        "{aggregator} works on sums of products B A, and DoRA scales each row of W + B A to a trained length, so that "
        "a mean of products is no mean of weights; use aggregator 'mean', or set tuning.dora to false",
    ),
    "factors_rebuilt_and_stepped": Refusal(
        lambda r: r.aggregator.needs == "factors" and not r.server.adds_unscaled,
        "{aggregator} recomputes both factors, so a server step that adds up changes has no meaning for them; "
        "leave server at kind = 'sgd' and lr = 1, where lr_scale may name the head; server_head may be any",
    ),
    "both_factors_rebuilt": Refusal(
        # without an edit of the base, matching the mean of the products needs both factors
        lambda r: r.aggregator.needs == "factors" and not r.aggregator.exact_for_products and r.tuning.moving != "both",
        "{aggregator} moves both factors; leave tuning.train at 'both'",
    ),
    "reinitialised_without_seed": Refusal(
        lambda r: r.aggregator.reinitialises and not r.tuning.init_from_seed,
        "{aggregator} reinitialises adapters after each round; use tuning.init kaiming",
    ),
    "reinitialised_alternating": Refusal(
        lambda r: r.aggregator.reinitialises and r.tuning.moving == "alternate",
        "under {aggregator} B is zero at the start of a round, and training A alone has no effect; use train "
        "'both' or 'B'",
    ),
    "reinitialised_with_memory": Refusal(
        lambda r: r.aggregator.reinitialises and (r.local.keep_optimizer or r.up.feedback),
        "under {aggregator} adapters are reinitialised, so a client's state of the old ones is meaningless; set "
        "local.keep_optimizer and up.feedback to false",
    ),
    "shrink_without_ranks": Refusal(
        lambda r: (
            r.shrink is not None
            and not (r.tuning.adapter_rank and r.tuning.moving == "both" and r.tuning.lost_ranks_are_neutral)
        ),
        "shrink works on ranks that are trained from zero; use tuning 'lora' with train 'both'",
    ),
    "shrink_hidden": Refusal(
        lambda r: r.shrink is not None and _hides_ranks(r),
        "shrink chooses the ranks that are sent down; leave down dense and relative to zero, feedback and prune "
        "out, and memory at 'none' or 'init'",
    ),
    "shrink_with_kept_optimizer": Refusal(
        lambda r: r.shrink is not None and r.local.keep_optimizer,
        "a client's optimiser state of pruned ranks would bring them back; set local.keep_optimizer to false, "
        "or leave shrink out",
    ),
    "shrink_with_noise_or_new_starts": Refusal(
        lambda r: r.shrink is not None and (r.aggregator.reinitialises or not r.privacy.is_none),
        "clients report their ranks, without noise, and compare them with earlier ones; leave privacy out, and "
        "use an aggregator that does not reinitialise adapters",
    ),
}
"""Refusals of recipes by name, in the order in which they are checked."""

TIER_REFUSALS: dict[str, Refusal[TierOf]] = {
    "tier_rank_above_recipe": Refusal(
        lambda t: 0 < t.recipe.tuning.adapter_rank < (t.tier.rank or 0),
        "tier {tier} has rank {rank}, above the recipe's {whole}; set it to {whole} or less",
    ),
    "tier_rank_of_pretrained": Refusal(
        lambda t: t.slices and not (t.recipe.tuning.lost_ranks_are_neutral and t.recipe.tuning.moving == "both"),
        "tier {tier} has a rank, and ranks that a client lacks are zero in both factors: with this method that "
        "would remove pre-trained knowledge, or change a frozen factor; leave out the tier's rank, and give it "
        "a density or fewer steps",
    ),
    "tier_rank_of_other_downlink": Refusal(
        lambda t: t.slices and _is_downlink_of_its_own(t),
        "tier {tier} has a rank, which is a downlink of its own, and needs one that is dense and relative to zero: "
        "method lora or het_lora, or flora with reference = 'zero'; or give the tier a density (down, up) in place of "
        "the rank",
    ),
    "tier_reference": Refusal(
        lambda t: t.tier.down is not None and t.tier.down.reference != t.recipe.down.reference,
        "tier {tier}: the start is announced to all clients or to none; set its down.reference to {reference}",
    ),
    "tier_compute": Refusal(
        lambda t: t.tier.compute == "fp32" and t.recipe.local.compute != "fp32",
        "tier {tier} computes in fp32, but local.compute = 'bf16' keeps frozen weights in bfloat16, and 'auto' may; "
        "set local.compute to fp32, and compute of the other tiers to bf16",
    ),
    "tier_feedback": Refusal(
        lambda t: t.recipe.down.feedback or (t.tier.down is not None and t.tier.down.feedback),
        "down.feedback keeps one error for all clients, and tiers get different messages; unset it",
    ),
}
"""Refusals of tiers with a recipe by name, in the order in which they are checked."""

EXPERIMENT_REFUSALS: dict[str, Refusal[Experiment]] = {
    "noise_in_some_phases": Refusal(
        lambda e: len({phase.recipe.privacy.is_none for phase in e.phases}) > 1,
        "some phases have noise and some have none, and those without reveal everything; give every phase privacy",
    ),
    "noise_alone": Refusal(
        lambda e: not MODES[e.mode].sends and not all(phase.recipe.privacy.is_none for phase in e.phases),
        "privacy is that of clients in a federation; leave it out in mode 'centralised' or 'local'",
    ),
    "example_noise_in_some_phases": Refusal(
        lambda e: len({_covers_examples(phase.recipe) for phase in e.phases}) > 1,
        "some phases have noise for examples and some have none, and those without reveal everything; set "
        "example_privacy in every phase (slora and primed_lora: in warm_local too)",
    ),
    "too_many_for_poisson": Refusal(
        lambda e: MODES[e.mode].sends and _least(e) > 1 and e.clients.sampling == "poisson",
        "the aggregator needs {least} clients in every round, and a Poisson sample may have any number; set "
        "clients.sampling to 'fixed'",
    ),
    "too_few_per_round": Refusal(
        lambda e: MODES[e.mode].sends and e.clients.per_round < _least(e),
        "the aggregator needs {least} clients in a round; set clients.per_round to {least} or more, not {per_round}",
    ),
    "sparse_downlink_of_an_adapter": Refusal(
        lambda e: e.init_from is not None and MODES[e.mode].sends and _sends_part_of_fresh_start(e),
        "the downlink sends a part of the difference from a fresh start, so clients would mix the adapter of init_from "
        "with random values; set reference = 'zero' (of down, or of method flasc), or leave down.sparsify at dense "
        "(flasc: down = 1.0)",
    ),
    "tier_rank_without_ranks": Refusal(
        lambda e: bool(_tier_with_rank(e)) and not any(phase.recipe.tuning.adapter_rank for phase in e.phases),
        "tier {tier} has a rank, and no phase trains LoRA; leave it out",
    ),
}
"""Refusals of experiments by name, in the order in which they are checked."""

REFUSALS = {name: each.text for name, each in RECIPE_REFUSALS.items()}
REFUSALS |= {name: each.text for name, each in TIER_REFUSALS.items()}
REFUSALS |= {name: each.text for name, each in EXPERIMENT_REFUSALS.items()}
"""The error messages of all refusals by name."""


def check_recipe(recipe: Recipe) -> None:
    """Refuses a recipe that would run but give misleading results.

    Raises:
        ConfigError: with the sentence of the first refusal that applies.
    """
    aggregator, tuning = repr(kind_of(recipe.aggregator)), repr(kind_of(recipe.tuning))
    _check(RECIPE_REFUSALS, recipe, {"aggregator": aggregator, "tuning": tuning, "rate": _factor_rate(recipe)})


def check_tier(tier: Tier, recipe: Recipe) -> None:
    """Refuses a tier that cannot be combined with a recipe.

    Raises:
        ConfigError: with the sentence of the first refusal that applies.
    """
    words = {"tier": repr(tier.name), "rank": tier.rank, "whole": recipe.tuning.adapter_rank}
    _check(TIER_REFUSALS, TierOf(tier, recipe), words | {"reference": repr(recipe.down.reference)})


def check_experiment(experiment: Experiment) -> None:
    """Refuses phases, clients and a mode that cannot be combined.

    Raises:
        ConfigError: with the sentence of the first refusal that applies.
    """
    words = {"least": _least(experiment), "per_round": experiment.clients.per_round}
    _check(EXPERIMENT_REFUSALS, experiment, words | {"tier": repr(_tier_with_rank(experiment))})


def _check(table: Mapping[str, Refusal[Subject]], subject: Subject, words: Mapping[str, object]) -> None:
    for refusal in table.values():
        if refusal.when(subject):
            raise ConfigError(refusal.text.format_map(words))


def _factor_rate(recipe: Recipe) -> str:
    """The first key that sets a separate learning rate for a low-rank factor; empty if there is none."""
    places = (("local", recipe.local.lr_scale), ("server", recipe.server.lr_scale))
    keys = [f"{place}.lr_scale.{name}" for place, scale in places for name in scale.moved if name in ("A", "B")]
    return keys[0] if keys else ""


def _moves_zeros(recipe: Recipe) -> bool:
    """Whether pruned entries may arrive as nonzero, or other entries as zero."""
    down = recipe.down
    lost = down.drops_entries or not all(each.is_floating for each in down.precisions)
    relative = down.reference == "init" or recipe.memory == "last_round"
    return lost or relative or down.feedback or recipe.up.feedback or recipe.aggregator.needs == "factors"


def _hides_ranks(recipe: Recipe) -> bool:
    """Whether the downlink is not simply a slice of the first ranks, or dropped ranks may come back in another way."""
    down = recipe.down
    plain = (not down.drops_entries or down.slices_ranks) and not down.stages and down.reference == "zero"
    remembers = down.feedback or recipe.up.feedback or recipe.memory == "last_round"
    return not plain or remembers or recipe.prune is not None


def _covers_examples(recipe: Recipe) -> bool:
    privacy = recipe.local.example_privacy
    return privacy is not None and privacy.noise_multiplier > 0


def _least(experiment: Experiment) -> int:
    return max(phase.recipe.aggregator.min_updates for phase in experiment.phases)


def _sends_part_of_fresh_start(experiment: Experiment) -> bool:
    """Whether clients of the first phase get some entries from its initial values, others from the parameters."""
    links = (experiment.phases[0].recipe.down, *(tier.down for tier in experiment.clients.tiers))
    return any(link is not None and link.reference == "init" and link.drops_entries for link in links)


def _tier_with_rank(experiment: Experiment) -> str:
    return next((tier.name for tier in experiment.clients.tiers if tier.rank is not None), "")


def _is_downlink_of_its_own(tiered: TierOf) -> bool:
    down = tiered.tier.down or tiered.recipe.down
    return down.drops_entries or bool(down.stages) or down.reference == "init"
