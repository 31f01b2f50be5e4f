"""Pruning for good, by hand and in training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fixtures.toy import LOCAL, Federation, num_nonzero

from fedlora.core import tree
from fedlora.core.errors import ConfigError
from fedlora.methods import Phases, adapter_lth, dense_lora, fed_select, sparse_adapter
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Recipe
from fedlora.server.aggregate import SvdRedistribute
from fedlora.server.optimizers import Adam, Sgd
from fedlora.server.pruning import Prune
from fedlora.testing import schema_of
from fedlora.transport import Link, Quota, Uniform
from fedlora.tuning import LoRA, SvdOfWeight


def test_the_largest_stay_and_the_servers_memory_of_the_others_goes() -> None:
    params = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([3.0, 2.0])}
    slots = {"m": {"a": torch.ones(2), "b": torch.ones(2)}}
    kept, state = Prune(density=0.5, scope="global").apply(
        params, slots, schema_of({"a": "adapter", "b": "adapter"}), steps=1
    )
    assert (kept["a"].tolist(), kept["b"].tolist()) == ([0.0, -4.0], [3.0, 0.0])
    assert (state["m"]["a"].tolist(), state["m"]["b"].tolist()) == ([0.0, 1.0], [1.0, 0.0])


def test_a_quota_keeps_the_head() -> None:
    params = {"a": torch.tensor([1.0, -4.0]), "h": torch.tensor([0.1, 0.2])}
    kept, _ = Prune(density=0.5, quota=Quota(head=1)).apply(
        params, {}, schema_of({"a": "adapter", "h": "head"}), steps=1
    )
    assert (kept["a"].tolist(), kept["h"].tolist()) == ([0.0, -4.0], pytest.approx([0.1, 0.2]))


def test_densities_by_round() -> None:
    once = Prune(density=0.25)
    assert [once.density_after(steps) for steps in range(4)] == [None, 0.25, None, None]
    again = Prune(density=0.5, first=2, every=2, decay=0.5)
    assert [again.density_after(steps) for steps in range(7)] == [None, None, 0.5, None, 0.25, None, 0.125]


def density(params: tree.Tree, part: str = "") -> float:
    some = {name: value for name, value in params.items() if part in name}
    return num_nonzero(some) / tree.num_entries(some)


@pytest.mark.parametrize("server", [Sgd(), Adam(lr=0.01)])
def test_sparse_adapter_keeps_one_mask_after_its_first_round(server: Any) -> None:
    federation = Federation(
        sparse_adapter(rounds=4, rank=4, local=LOCAL, density=0.25, whole_head=False, server=server)
    )
    first = federation.go_on(federation.start(), 1)
    assert density(first.params) == pytest.approx(0.25, abs=0.001)
    last = federation.go_on(first, 4)
    for name, value in last.params.items():
        assert not value[first.params[name] == 0].any()
        assert not torch.equal(value, first.params[name]) or not value.any()
    dense = Federation(dense_lora(rounds=4, rank=4, local=LOCAL))
    dense.go_on(dense.start(), 4)
    for key in ("down_bytes", "up_bytes"):
        assert sum(getattr(federation.rows[2], key).values()) < 0.4 * sum(getattr(dense.rows[2], key).values())


def test_adapter_lth_keeps_less_and_less() -> None:
    federation = Federation(adapter_lth(rounds=4, rank=4, local=LOCAL, keep=0.5, whole_head=False))
    state, found = federation.start(), []
    for rounds in range(1, 5):
        state = federation.go_on(state, rounds)
        found.append(density(state.params))
    assert found == pytest.approx([0.5, 0.25, 0.125, 0.0625], abs=0.002)


@pytest.mark.parametrize(
    "method", [sparse_adapter(rounds=2, rank=4, local=LOCAL), adapter_lth(rounds=2, rank=4, local=LOCAL)]
)
def test_the_head_is_whole_by_default(method: Phases) -> None:
    federation = Federation(method)
    pruned = federation.go_on(federation.start(), 1).params
    assert density(pruned, "lora") == pytest.approx(method[0].recipe.prune.density, abs=0.002)
    assert density(pruned, "classifier") == 1.0


def test_federated_select_sends_less_and_keeps_everything() -> None:
    federation = Federation(fed_select(rounds=4, rank=4, local=LOCAL, keep=0.5))
    state = federation.go_on(federation.start(), 4)
    assert [round(row.density_up, 2) for row in federation.rows] == pytest.approx([1.0, 0.5, 0.25, 0.12], abs=0.3)
    assert federation.rows[3].up_bytes["adapter"] < 0.5 * federation.rows[1].up_bytes["adapter"]
    assert density(state.params) > 0.6


def test_momentum_that_clients_keep_does_not_bring_it_back() -> None:
    local = dataclasses.replace(LOCAL, keep_optimizer=True)
    federation = Federation(sparse_adapter(rounds=4, rank=4, local=local, density=0.5))
    first = federation.go_on(federation.start(), 1)
    last = federation.go_on(first, 4)
    assert not any(value[first.params[name] == 0].any() for name, value in last.params.items())


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"down": Link(reference="init")}, "these must stay"),
        ({"down": Link(precision=Uniform())}, "these must stay"),
        ({"memory": "last_round"}, "these must stay"),
        ({"aggregator": SvdRedistribute()}, "these must stay"),
        ({"tuning": LoRA(init=SvdOfWeight())}, "carry pre-trained knowledge"),
        ({"privacy": CentralGaussian(clip_norm=1.0, noise_multiplier=1.0)}, "brings them back"),
    ],
)
def test_pruning_that_would_lie_is_refused(slots: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(prune=Prune(density=0.5), **slots)
