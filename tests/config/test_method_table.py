"""``[method]``: a method's own arguments, every other key of a recipe, tables laid over defaults, and presets."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.config import digest, parse
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS, dense_lora, flasc
from fedlora.methods.defaults import ADAPTIVE
from fedlora.methods.presets import PAPER
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Recipe
from fedlora.recipe.local import AdamW as ClientAdamW
from fedlora.recipe.local import Sgd as ClientSgd
from fedlora.server.optimizers import AdamW
from fedlora.transport import BFloat16, TopK
from fedlora.tuning import LoRA

_RULES = "calibrated for a mean of clients that all weigh the same"
REFUSED = {
    **dict.fromkeys(("fedex", "flexlora", "flora"), _RULES),
    **dict.fromkeys(("sparse_adapter", "adapter_lth"), "noise is added to pruned entries"),
    "het_lora": "the penalty of shrink|without noise|all weigh the same",
}


def recipes(**table: Any) -> list[Recipe]:
    return [phase.recipe for phase in parse({"method": table}).phases]


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_takes_keys_that_it_has_no_argument_for(kind: str) -> None:
    found = recipes(kind=kind, memory="init", local={"batch_size": 3})
    assert all(recipe.memory == "init" and recipe.local.batch_size == 3 for recipe in found)


@pytest.mark.parametrize("kind", METHODS)
def test_noise_goes_with_a_method_or_is_refused_in_a_sentence(kind: str) -> None:
    noise = {"kind": "central_gaussian", "clip_norm": 0.5, "noise_multiplier": 1.0}
    if kind in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[kind]):
            recipes(kind=kind, privacy=noise)
        return
    found = recipes(kind=kind, privacy=noise)
    assert all(recipe.privacy == CentralGaussian(clip_norm=0.5, noise_multiplier=1.0) for recipe in found)


def test_a_table_without_a_kind_changes_what_the_method_has() -> None:
    (recipe,) = recipes(kind="lora", server={"lr": 1e-3}, local={"optimizer": {"lr": 0.5}})
    assert recipe.server == AdamW(lr=1e-3, weight_decay=0.0, lr_scale=ADAPTIVE.lr_scale)
    assert recipe.local.optimizer == ClientSgd(lr=0.5)


def test_a_table_with_a_kind_stands_for_itself() -> None:
    (recipe,) = recipes(kind="lora", server={"kind": "adamw", "lr": 1e-3}, local={"optimizer": {"kind": "adamw"}})
    assert recipe.server == AdamW(lr=1e-3)
    assert recipe.local.optimizer == ClientAdamW()


def test_a_link_is_laid_over_that_of_the_method() -> None:
    (recipe,) = recipes(kind="flasc", down=0.5, up={"precision": {"kind": "bfloat16"}})
    assert (recipe.down.sparsify, recipe.up.sparsify) == (TopK(density=0.5), TopK(density=0.25))
    assert (recipe.down.precision.kind, recipe.up.precision) == ("float32", BFloat16())


def test_a_first_phase_has_what_the_second_has_unless_it_says_otherwise() -> None:
    warm, rest = recipes(kind="slora", local={"batch_size": 4}, server={"lr": 2e-3})
    assert (warm.local, warm.server) == (rest.local, rest.server)
    warm, rest = recipes(kind="slora", warm_local={"optimizer": {"lr": 3.0}}, local={"batch_size": 4})
    assert (warm.local.batch_size, warm.local.optimizer) == (4, ClientSgd(lr=3.0))
    assert rest.local.optimizer == ClientSgd()
    warm, rest = recipes(kind="primed_lora", warm_server={"lr": 1.0})
    assert (warm.server.lr_scale, rest.server) == (ADAPTIVE.lr_scale, ADAPTIVE)


def test_an_empty_table_is_the_method_and_a_method_is_its_function() -> None:
    assert parse({"method": {"kind": "lora", "rank": 4}}).phases == dense_lora(rank=4)
    assert digest(parse({"method": {"kind": "flasc", "server": {}}})) == digest(parse({"method": {"kind": "flasc"}}))


def test_an_unknown_key_names_the_nearest_of_all_that_are_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown key 'method\.memry', did you mean 'memory'; known here: rounds.*prune"
    ):
        parse({"method": {"kind": "lora", "memry": "init"}})
    with pytest.raises(ConfigError, match=r"method\.aggregator"):
        parse({"method": {"kind": "lora", "aggregator": {"kind": "mean", "weight": 3}}})


def test_the_preset_of_a_paper_is_its_official_code() -> None:
    (recipe,) = recipes(kind="flasc", preset="paper", down=0.5)
    assert recipe.server == AdamW(lr=5e-3, weight_decay=0.01)
    assert recipe.local.optimizer == ClientSgd(lr=5e-4, momentum=0.9)
    assert (recipe.down.sparsify, recipe.down.reference) == (TopK(density=0.5), "zero")
    (recipe,) = recipes(kind="flasc", preset="paper", server={"lr": 1e-3})
    assert recipe.server == AdamW(lr=1e-3, weight_decay=0.01)


@pytest.mark.parametrize("kind", PAPER)
def test_every_preset_is_a_configuration(kind: str) -> None:
    assert recipes(kind=kind, preset="paper")[0].local.optimizer.lr == 5e-4


def test_there_is_no_preset_where_no_code_is_public() -> None:
    with pytest.raises(ConfigError, match="'slora' has no preset 'paper': no official code"):
        parse({"method": {"kind": "slora", "preset": "paper"}})
    with pytest.raises(ConfigError, match=r"method\.preset = 'papers' is not known; known: paper"):
        parse({"method": {"kind": "flasc", "preset": "papers"}})


def test_python_and_toml_say_the_same() -> None:
    assert recipes(kind="flasc", up=0.5) == [phase.recipe for phase in flasc(up=0.5)]


@pytest.mark.parametrize("kind", ["slora", "primed_lora"])
def test_a_setting_of_lora_reaches_the_phase_that_trains_lora(kind: str) -> None:
    warm, second = recipes(kind=kind, tuning={"rslora": True, "dropout": 0.1})
    assert warm == recipes(kind=kind)[0]
    assert isinstance(second.tuning, LoRA)
    assert (second.tuning.rslora, second.tuning.dropout) == (True, 0.1)
    with pytest.raises(ConfigError, match=r"unknown key 'method.tuning.rslara'"):
        recipes(kind=kind, tuning={"rslara": True})
