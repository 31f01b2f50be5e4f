"""Learning rates by group, factor and round, on clients and on the server, in every optimiser."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fixtures.toy import LOCAL, Federation

from fedlora import config
from fedlora.core.errors import ConfigError
from fedlora.core.rates import LrScale, Schedule
from fedlora.core.state import ServerState
from fedlora.methods import dense_lora, fedavg, ffa, flexlora, flora, full, slora
from fedlora.population.tiers import Tier
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Recipe
from fedlora.recipe.local import CLIENT_OPTIMIZERS, AdamW, Local
from fedlora.server.optimizers import SERVER_OPTIMIZERS, ServerOptimizer, Sgd
from fedlora.testing import schema_of
from fedlora.tuning import Full, LoRA, Peft

GROUPS = schema_of({"layer.lora_A": "adapter", "layer.lora_B": "adapter", "score.weight": "head"})


def by_group(before: ServerState, after: ServerState) -> dict[str, float]:
    """How far ``A``, ``B`` and the head moved."""
    moved = {"A": 0.0, "B": 0.0, "head": 0.0}
    for name, value in before.params.items():
        kind = before.schema[name].factor or "head"
        moved[kind] += float((after.params[name] - value).abs().sum())
    return moved


def round_of(federation: Federation) -> dict[str, float]:
    start = federation.start()
    return by_group(start, federation.go_on(start, 1))


def test_a_multiplier_is_that_of_the_group_times_that_of_the_factor() -> None:
    rates = LrScale(adapter=2.0, head=10.0, B=16.0).by_name(GROUPS, 0.5)
    assert rates == {"layer.lora_A": 1.0, "layer.lora_B": 16.0, "score.weight": 5.0}


def test_factors_are_found_under_the_names_of_peft_too() -> None:
    tuning = Peft(config={"peft_type": "LORA"})
    assert tuning.has_factors
    assert not Peft(config={"peft_type": "IA3"}).has_factors
    federation = Federation(
        fedavg(rounds=1, tuning=replace(tuning, config=tuning.config | {"target_modules": ["query"]}))
    )
    leaves = federation.start().schema.values()
    assert {(leaf.group, leaf.factor, leaf.rank_axis) for leaf in leaves} == {
        ("adapter", "A", 0),
        ("adapter", "B", 1),
        ("head", "", None),
    }


@pytest.mark.parametrize("kind", CLIENT_OPTIMIZERS)
def test_every_client_optimizer_moves_a_group_by_its_own_rate(kind: str) -> None:
    # one step, so that the first one's length is proportional to the rate
    optimizer = replace(CLIENT_OPTIMIZERS[kind](), lr=1e-3)
    local = Local(optimizer=optimizer, batch_size=16)
    plain = round_of(Federation(fedavg(rounds=1, tuning=LoRA(rank=4), local=local, server=Sgd())))
    scaled = replace(local, lr_scale=LrScale(head=3.0, B=4.0))
    moved = round_of(Federation(fedavg(rounds=1, tuning=LoRA(rank=4), local=scaled, server=Sgd())))
    assert moved["B"] == pytest.approx(4 * plain["B"], rel=0.02)
    assert moved["head"] == pytest.approx(3 * plain["head"], rel=0.02)
    assert moved["A"] == pytest.approx(plain["A"], rel=0.02)


@pytest.mark.parametrize("kind", SERVER_OPTIMIZERS)
def test_every_server_optimizer_steps_as_one_with_that_rate_would(kind: str) -> None:
    params = {name: torch.linspace(-1, 1, 6) * (place + 1) for place, name in enumerate(GROUPS)}
    optimizer: ServerOptimizer = replace(SERVER_OPTIMIZERS[kind](), lr_scale=LrScale(head=5.0, A=0.5))
    rates = optimizer.rates(GROUPS, (0, 4))
    apart = {name: replace(optimizer, lr=optimizer.lr * rates[name]) for name in params}
    slots: dict[str, dict[str, torch.Tensor]] = {}
    alone = {name: ({name: value}, {}) for name, value in params.items()}
    for steps in range(3):
        delta = {name: torch.sin(torch.arange(6.0) + steps) for name in params}
        params, slots = optimizer.step(params, delta, slots, steps, rates)
        for name, (value, kept) in alone.items():
            alone[name] = apart[name].step(value, {name: delta[name]}, kept, steps)
    for name, (value, _) in alone.items():
        torch.testing.assert_close(params[name], value[name], rtol=1e-6, atol=1e-7)


def test_the_servers_schedule_runs_over_the_whole_run() -> None:
    cosine = Sgd(schedule=Schedule(shape="linear"))
    assert cosine.rates(schema_of({"x": "head"}), (3, 4)) == {"x": 0.25}
    local = Local(optimizer=AdamW(lr=0.01), batch_size=16)
    plain = Federation(fedavg(rounds=2, tuning=LoRA(rank=4), local=local, server=Sgd()))
    falling = Federation(fedavg(rounds=2, tuning=LoRA(rank=4), local=local, server=cosine))
    one, other = plain.start(), falling.start()
    first, same = plain.go_on(one, 1), falling.go_on(other, 1)
    assert all(torch.equal(first.params[name], same.params[name]) for name in first.params)
    # of the six rounds of the toy run the second one has five sixths of the rate
    full_step, short = by_group(first, plain.go_on(first, 2)), by_group(same, falling.go_on(same, 2))
    assert short["head"] == pytest.approx(full_step["head"] * 5 / 6, rel=1e-4)


def test_a_rate_of_the_server_means_the_same_under_noise() -> None:
    noisy = CentralGaussian(clip_norm=1.0, noise_multiplier=1.0, seed=1)
    plain = round_of(Federation(fedavg(rounds=1, tuning=LoRA(rank=4), local=LOCAL, privacy=noisy)))
    server = Sgd(lr_scale=LrScale(head=3.0))
    scaled = round_of(Federation(fedavg(rounds=1, tuning=LoRA(rank=4), local=LOCAL, privacy=noisy, server=server)))
    assert scaled["head"] == pytest.approx(3 * plain["head"], rel=1e-4)
    assert scaled["B"] == pytest.approx(plain["B"], rel=1e-4)


@pytest.mark.parametrize("method", [flexlora, flora])
def test_rules_about_products_take_a_rate_of_the_head_alone(method: object) -> None:
    phases = method(rounds=1, rank=4, local=LOCAL)  # type: ignore[operator]
    recipe = replace(phases[0].recipe, server_head=None)
    plain = replace(phases[0], recipe=recipe)
    scaled = replace(phases[0], recipe=replace(recipe, server=Sgd(lr_scale=LrScale(head=2.0))))
    one, other = round_of(Federation((plain,))), round_of(Federation((scaled,)))
    assert other["head"] == pytest.approx(2 * one["head"], rel=1e-4)
    assert other["A"] == pytest.approx(one["A"], rel=1e-4)
    with pytest.raises(ConfigError, match="no meaning for them"):
        replace(recipe, server=Sgd(lr_scale=LrScale(B=2.0)))


def test_a_tier_has_rates_of_its_own() -> None:
    recipe = dense_lora(rank=4, local=LOCAL)[0].recipe
    assert Tier(name="weak", share=1.0, lr_scale=LrScale(head=7.0)).applied(recipe).local.lr_scale.head == 7.0
    assert Tier(name="weak", share=1.0).applied(recipe).local.lr_scale == recipe.local.lr_scale


def test_rates_of_what_is_not_there_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"server\.lr_scale\.B applies to low-rank factors, and tuning 'full' has none"
    ):
        Recipe(tuning=Full(), server=Sgd(lr_scale=LrScale(B=2.0)))
    with pytest.raises(ConfigError, match=r"local\.lr_scale\.A has no effect where tuning\.train = 'B'"):
        ffa(local=Local(lr_scale=LrScale(A=2.0)))


def test_rates_stand_in_a_configuration_as_tables() -> None:
    method = {"kind": "lora", "server": {"kind": "adamw", "lr_scale": {"head": 10}}, "local": {"lr_scale": {"B": 16}}}
    recipe = config.parse({"method": method}).phases[0].recipe
    assert (recipe.server.lr_scale, recipe.local.lr_scale.B) == (LrScale(head=10.0), 16.0)
    with pytest.raises(ConfigError, match=r"unknown key 'method\.server\.adamw\.lr_scale\.heads'|did you mean 'head'"):
        config.parse({"method": {"kind": "lora", "server": {"kind": "adamw", "lr_scale": {"heads": 10}}}})


def test_the_ratio_of_older_configurations_is_read_as_a_rate_of_b() -> None:
    old = {"tuning": {"kind": "lora", "lr_ratio": 4.0}, "local": {"batch_size": 3}}
    read = config.parse({"phases": [{"recipe": old, "rounds": 2}]}).phases[0].recipe
    assert (read.local.lr_scale, read.local.batch_size) == (LrScale(B=4.0), 3)
    assert old["tuning"] == {"kind": "lora", "lr_ratio": 4.0}
    one = config.parse({"method": {"kind": "fedavg", "tuning": {"kind": "lora", "lr_ratio": 1.0}}})
    assert one == config.parse({"method": {"kind": "fedavg", "tuning": {"kind": "lora"}}})


def test_both_phases_of_slora_take_rates() -> None:
    first, second = slora(
        rounds=4, warm_rounds=2, warm_local=Local(lr_scale=LrScale(head=3.0)), local=Local(lr_scale=LrScale(B=2.0))
    )
    assert (first.recipe.local.lr_scale.head, second.recipe.local.lr_scale.B) == (3.0, 2.0)
    assert full(local=Local(lr_scale=LrScale(head=2.0)))[0].recipe.local.lr_scale.moved == ("head",)


def test_classifiers_of_older_runs_read_what_the_stock_class_does() -> None:
    task = {"kind": "text_classification", "problem": "single", "max_length": 64, "pad_to": "longest"}
    old = {"task": {**task, "eval_batch_size": 64}, "phases": [{"rounds": 1}]}
    assert config.parse(old).task.pooling == "model"  # type: ignore[union-attr]
    assert config.parse({"task": task, "phases": [{"rounds": 1}]}).task.pooling == "auto"  # type: ignore[union-attr]


def test_a_floor_is_where_a_schedule_decays_to() -> None:
    schedule = Schedule(shape="cosine", floor=0.02)
    factors = [schedule.factor(turn, 200) for turn in range(200)]
    assert factors[0] == 1.0
    assert factors[100] == pytest.approx(0.51)
    assert min(factors) == factors[-1] == pytest.approx(0.02, abs=1e-4)
    assert Schedule(shape="linear", floor=0.5).factor(5, 10) == pytest.approx(0.75)
    with pytest.raises(ConfigError, match=r"schedule\.floor = 0\.5 is where a schedule decays to"):
        Schedule(floor=0.5)
