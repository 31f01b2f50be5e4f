"""Every refusal: a combination that asks for it, its sentence, `fedlora list refusals`, and the page of docs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.config import Experiment
from fedlora.core.errors import ConfigError
from fedlora.core.rates import LrScale
from fedlora.population.clients import Clients
from fedlora.population.tiers import Tier
from fedlora.privacy import CentralGaussian
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import AdamW as ClientAdamW
from fedlora.recipe.local import Local
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.recipe.refusals import EXPERIMENT_REFUSALS, RECIPE_REFUSALS, REFUSALS, TIER_REFUSALS
from fedlora.server.aggregate import (
    CoordinateMedian,
    Krum,
    Mean,
    ProductExact,
    SparsityWeighted,
    Stack,
    SvdRedistribute,
)
from fedlora.server.optimizers import Adam, AdamW, Sgd
from fedlora.server.pruning import Prune
from fedlora.transport import Link, RandomK, RankSlice, Stage, TopK
from fedlora.tuning import Full, LoRA, Orthogonal, SvdOfWeight

NOISE = CentralGaussian(clip_norm=1.0, noise_multiplier=1.0)
EXAMPLES = Local(example_privacy=ExampleNoise(clip_norm=1.0, noise_multiplier=1.0))
SPARSE = Link(sparsify=TopK(density=0.5))
RESCALED = Link(sparsify=RandomK(density=0.5))
SVD = LoRA(init=SvdOfWeight())
FROZEN_A = LoRA(train="B")
ALTERNATING = LoRA(train="alternate")
PRUNE = Prune(density=0.5)

RECIPES: dict[str, dict[str, Any]] = {
    "sparse_downlink_of_pretrained": {"tuning": Full(), "down": SPARSE},
    "prune_pretrained": {"tuning": Full(), "prune": PRUNE},
    "prune_under_noise": {"prune": PRUNE, "privacy": NOISE},
    "prune_hidden": {"prune": PRUNE, "down": SPARSE},
    "uplink_from_init": {"up": Link(reference="init")},
    "decay_after_svd": {"tuning": SVD, "local": Local(optimizer=ClientAdamW(weight_decay=0.1))},
    "server_decay_of_frozen_factor": {"tuning": FROZEN_A, "server": AdamW()},
    "rates_without_factors": {"tuning": Full(), "local": Local(lr_scale=LrScale(B=2.0))},
    "local_rate_of_frozen_factor": {"tuning": FROZEN_A, "local": Local(lr_scale=LrScale(A=2.0))},
    "server_rate_of_frozen_factor": {"tuning": FROZEN_A, "server": Sgd(lr_scale=LrScale(A=2.0))},
    "head_rate_of_two_servers": {"server": Sgd(lr_scale=LrScale(head=2.0)), "server_head": Sgd()},
    "feedback_without_memory": {"up": Link(feedback=True)},
    "feedback_after_clip": {"up": Link(feedback=True), "memory": "init", "privacy": NOISE},
    "ranks_by_norm_of_difference": {
        "down": Link(stages=(Stage(round=1, sparsify=RankSlice(rank=2, by="norm")),)),
        "memory": "last_round",
    },
    "down_feedback_with_last_round": {"down": Link(feedback=True), "memory": "last_round"},
    "rescaled_downlink": {"down": RESCALED},
    "rescaled_uplink_with_feedback": {"up": replace(RESCALED, feedback=True), "memory": "init"},
    "factors_rebuilt_from_sparse": {"aggregator": Stack(), "down": SPARSE},
    "zero_padding_of_sparse": {"aggregator": SparsityWeighted(), "down": SPARSE},
    "coordinates_of_sparse": {"aggregator": CoordinateMedian(), "up": SPARSE},
    "rescaled_uplink_without_mean": {"aggregator": Krum(), "up": RESCALED},
    "frozen_factor_loses_entries": {"tuning": FROZEN_A, "prune": PRUNE},
    "alternating_factors_with_memory": {"tuning": ALTERNATING, "server": Adam()},
    "example_noise_with_weights": {"local": EXAMPLES, "aggregator": ProductExact(weighting="examples")},
    "example_noise_with_timeout": {"local": replace(EXAMPLES, timeout_seconds=1.0)},
    "example_noise_with_shrink": {"local": EXAMPLES, "shrink": RankPruning()},
    "noise_without_uniform_mean": {"privacy": NOISE, "aggregator": Mean(weighting="examples")},
    "products_without_factors": {"tuning": Full(), "aggregator": SparsityWeighted()},
    "products_of_dora": {"tuning": LoRA(dora=True), "aggregator": ProductExact()},
    "factors_rebuilt_and_stepped": {"aggregator": SvdRedistribute(), "server": Sgd(lr=0.5)},
    "both_factors_rebuilt": {"tuning": FROZEN_A, "aggregator": SvdRedistribute()},
    "reinitialised_without_seed": {"tuning": LoRA(init=Orthogonal()), "aggregator": Stack()},
    "reinitialised_alternating": {"tuning": ALTERNATING, "aggregator": Stack()},
    "reinitialised_with_memory": {"aggregator": Stack(), "local": Local(keep_optimizer=True)},
    "shrink_without_ranks": {"shrink": RankPruning(), "tuning": FROZEN_A},
    "shrink_hidden": {"shrink": RankPruning(), "down": SPARSE},
    "shrink_with_kept_optimizer": {"shrink": RankPruning(), "local": Local(keep_optimizer=True)},
    "shrink_with_noise_or_new_starts": {"shrink": RankPruning(), "aggregator": Stack()},
}
TIERS: dict[str, tuple[Tier, Recipe]] = {
    "tier_rank_above_recipe": (Tier(name="a", rank=32), Recipe()),
    "tier_rank_of_pretrained": (Tier(name="a", rank=2), Recipe(tuning=SVD)),
    "tier_rank_of_other_downlink": (Tier(name="a", rank=2), Recipe(down=SPARSE)),
    "tier_reference": (Tier(name="a", down=replace(SPARSE, reference="init")), Recipe()),
    "tier_compute": (Tier(name="a", compute="fp32"), Recipe(local=Local(compute="bf16"))),
    "tier_feedback": (Tier(name="a"), Recipe(down=Link(feedback=True))),
}


NOISY, COVERED = Phase(recipe=Recipe(privacy=NOISE)), Phase(recipe=Recipe(local=EXAMPLES))
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "noise_in_some_phases": {"phases": (NOISY, Phase())},
    "noise_alone": {"phases": (NOISY,), "mode": "centralised"},
    "example_noise_in_some_phases": {"phases": (COVERED, Phase())},
    "too_many_for_poisson": {
        "phases": (Phase(recipe=Recipe(aggregator=Krum())),),
        "clients": Clients(sampling="poisson"),
    },
    "too_few_per_round": {
        "phases": (Phase(recipe=Recipe(aggregator=Krum())),),
        "clients": Clients(per_round=2),
    },
    "sparse_downlink_of_an_adapter": {
        "phases": (Phase(recipe=Recipe(down=replace(SPARSE, reference="init"))),),
        "init_from": "adapter",
    },
    "tier_rank_without_ranks": {
        "phases": (Phase(recipe=Recipe(tuning=Full())),),
        "clients": Clients(tiers=(Tier(name="a", rank=2, share=1.0),)),
    },
}


def applies(message: str) -> list[str]:
    """The refusals whose sentence this is, whatever their braces stand for."""
    texts = {name: re.sub(r"\\\{\w+\\\}", r"[\\w.']+", re.escape(text)) for name, text in REFUSALS.items()}
    return [name for name, text in texts.items() if re.fullmatch(text, message)]


@pytest.mark.parametrize("name", RECIPE_REFUSALS)
def test_a_recipe_is_refused_with_this_very_sentence(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**RECIPES[name])
    assert applies(str(caught.value)) == [name]


@pytest.mark.parametrize("name", TIER_REFUSALS)
def test_a_tier_is_refused_with_this_very_sentence(name: str) -> None:
    tier, recipe = TIERS[name]
    with pytest.raises(ConfigError) as caught:
        tier.applied(recipe)
    assert applies(str(caught.value)) == [name]


@pytest.mark.parametrize("name", EXPERIMENT_REFUSALS)
def test_an_experiment_is_refused_with_this_very_sentence(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment(**EXPERIMENTS[name])
    assert applies(str(caught.value)) == [name]


def test_no_case_is_left_over() -> None:
    assert list(RECIPES) == list(RECIPE_REFUSALS)
    assert list(TIERS) == list(TIER_REFUSALS)
    assert list(EXPERIMENTS) == list(EXPERIMENT_REFUSALS)


def test_a_lower_rank_that_would_be_refused_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="uplink carries a difference"):
        Recipe(shrink=RankPruning(), up=Link(reference="init"))
    assert Recipe(shrink=RankPruning()).rank == 16


@pytest.mark.parametrize("text", REFUSALS.values(), ids=REFUSALS)
def test_a_sentence_says_what_is_wrong_and_what_to_do(text: str) -> None:
    wrong, _, mend = text.partition(";")
    assert wrong
    assert mend
    assert "\n" not in text
    assert ". " not in text
    assert len(text) < 300


def test_they_are_listed() -> None:
    def printed(*arguments: str) -> str:
        return CliRunner().invoke(app, ["list", "refusals", *arguments], catch_exceptions=False).stdout

    assert json.loads(printed("--format", "json")) == REFUSALS
    assert "pruned entries by their" in " ".join(printed().split())


def test_the_page_of_docs_has_the_same_sentences_in_the_same_order() -> None:
    page = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text(encoding="utf-8")
    items = [" ".join(item.split()) for item in re.findall(r"^- (.*?)(?=\n-|\n\n|\Z)", page, re.M | re.S)]
    assert items == [f"`{name}`: {text}." for name, text in REFUSALS.items()]
