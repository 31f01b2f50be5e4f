"""Server optimisers against ``torch.optim``, and Reddi et al.'s forms against their algorithm in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.core.rates import LrScale, Schedule
from fedlora.core.tree import Tree
from fedlora.server.optimizers import (
    SERVER_OPTIMIZERS,
    Adam,
    AdamW,
    FedAdagrad,
    FedAdam,
    FedYogi,
    ServerOptimizer,
    Sgd,
    Slots,
    take_step,
)
from fedlora.testing import schema_of

STEPS = 5
ALL: list[ServerOptimizer] = [*(cls() for cls in SERVER_OPTIMIZERS.values()), Sgd(momentum=0.5)]


def tensors(seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {"b": torch.randn(3, 2, generator=generator), "a": torch.randn(4, generator=generator)}


DELTAS = [tensors(seed) for seed in range(1, STEPS + 1)]


def run(optimizer: ServerOptimizer) -> list[Tree]:
    params, slots, history = tensors(0), {}, []
    for steps, delta in enumerate(DELTAS):
        params, slots = optimizer.step(params, delta, slots, steps)
        history.append(params)
    return history


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Sgd(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
        (Sgd(lr=0.3, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
        (Adam(lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
        (
            Adam(lr=0.1, beta1=0.5, beta2=0.7, eps=0.1),
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.7), eps=0.1),
        ),
        (AdamW(lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1)),
        (AdamW(lr=0.1, weight_decay=0.5), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)),
    ],
    ids=["sgd", "momentum", "adam", "adam settings", "adamw", "adamw decay"],
)
def test_every_step_is_that_of_torch_on_the_negative_change(ours: ServerOptimizer, theirs: Any) -> None:
    params = {name: torch.nn.Parameter(value) for name, value in tensors(0).items()}
    optimizer = theirs(list(params.values()))
    for delta, after in zip(DELTAS, run(ours), strict=True):
        for name, value in params.items():
            value.grad = -delta[name]
        optimizer.step()
        for name, value in params.items():
            torch.testing.assert_close(after[name], value.detach(), atol=1e-6, rtol=1e-6)


def reddi(kind: str, lr: float, beta1: float, beta2: float, tau: float) -> dict[str, Any]:
    """Algorithm 2 of arXiv 2003.00295, line by line, in float64."""
    result = {}
    for name in ("b", "a"):
        x = tensors(0)[name].double().numpy()
        m, v = np.zeros_like(x), np.full_like(x, tau**2)
        for delta in DELTAS:
            d = delta[name].double().numpy()
            m = beta1 * m + (1 - beta1) * d
            if kind == "adagrad":
                v = v + d**2
            elif kind == "yogi":
                v = v - (1 - beta2) * d**2 * np.sign(v - d**2)
            else:
                v = beta2 * v + (1 - beta2) * d**2
            x = x + lr * m / (np.sqrt(v) + tau)
        result[name] = x
    return result


@pytest.mark.parametrize(
    ("ours", "kind", "beta1", "beta2"),
    [
        (FedAdam(lr=0.2, beta1=0.8, beta2=0.6, tau=0.05), "adam", 0.8, 0.6),
        (FedYogi(lr=0.2, beta1=0.8, beta2=0.6, tau=0.05), "yogi", 0.8, 0.6),
        (FedAdagrad(lr=0.2, beta1=0.8, tau=0.05), "adagrad", 0.8, 0.0),
        (FedAdagrad(lr=0.2, tau=0.05), "adagrad", 0.0, 0.0),
    ],
    ids=str,
)
def test_the_adaptive_forms_follow_the_paper(ours: ServerOptimizer, kind: str, beta1: float, beta2: float) -> None:
    expected = reddi(kind, 0.2, beta1, beta2, 0.05)
    for name, value in run(ours)[-1].items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-5)


def test_yogi_moves_its_second_moment_towards_the_square_from_both_sides() -> None:
    delta = {"x": torch.tensor([1.0])}
    for before, after in ((0.0, 0.25), (4.0, 3.75)):
        slots = {"m": {"x": torch.zeros(1)}, "v": {"x": torch.tensor([before])}}
        _, slots = FedYogi(beta2=0.75).step({"x": torch.zeros(1)}, delta, slots, 1)
        assert float(slots["v"]["x"]) == after


def test_plain_sgd_of_one_is_the_change_itself() -> None:
    params, slots = Sgd().step({"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([0.5, -4.0])}, {}, 0)
    assert params["x"].tolist() == [1.5, -2.0]
    assert slots == {}


def test_momentum_by_hand() -> None:
    params, slots, history = {"x": torch.tensor([0.0])}, {}, []
    for steps in range(3):
        params, slots = Sgd(lr=1.0, momentum=0.5).step(params, {"x": torch.tensor([1.0])}, slots, steps)
        history.append(float(params["x"]))
    assert history == [1.0, 2.5, 4.25]


def test_the_first_step_of_adam_is_the_learning_rate_in_the_direction_of_the_change() -> None:
    params, _ = Adam(lr=0.1).step({"x": torch.zeros(2)}, {"x": torch.tensor([5.0, -0.01])}, {}, 0)
    torch.testing.assert_close(params["x"], torch.tensor([0.1, -0.1]), atol=1e-5, rtol=0)


def test_weight_decay_shrinks_what_does_not_change() -> None:
    params, _ = AdamW(lr=0.1, weight_decay=0.5).step({"x": torch.tensor([2.0])}, {"x": torch.zeros(1)}, {}, 0)
    torch.testing.assert_close(params["x"], torch.tensor([1.9]))


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_arguments_are_left_as_they_were(optimizer: ServerOptimizer) -> None:
    slots: Slots = {}
    params = tensors(0)
    params, slots = optimizer.step(params, DELTAS[0], slots, 0)
    kept = {slot: {name: value.clone() for name, value in tree.items()} for slot, tree in slots.items()}
    before = {name: value.clone() for name, value in params.items()}
    again, _ = optimizer.step(params, DELTAS[1], slots, 1)
    assert all(torch.equal(DELTAS[1][name], value) for name, value in tensors(2).items())
    assert all(torch.equal(params[name], value) for name, value in before.items())
    assert all(torch.equal(slots[slot][name], value) for slot, tree in kept.items() for name, value in tree.items())
    assert not any(torch.equal(again[name], value) for name, value in before.items())


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_names_and_their_order_are_kept(optimizer: ServerOptimizer) -> None:
    params, slots = optimizer.step(tensors(0), DELTAS[0], {}, 0)
    assert [list(tree) for tree in (params, *slots.values())] == [["b", "a"]] * (1 + len(slots))


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_the_state_is_all_there_is(optimizer: ServerOptimizer) -> None:
    """A value built anew from its settings goes on as the old one would have."""
    params, slots = optimizer.step(tensors(0), DELTAS[0], {}, 0)
    anew = type(optimizer)(**{field: getattr(optimizer, field) for field in optimizer.__dataclass_fields__})  # type: ignore[attr-defined]
    one, other = (each.step(params, DELTAS[1], slots, 1)[0] for each in (optimizer, anew))
    assert all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.parametrize("optimizer", [*ALL, Sgd(lr=0.5), AdamW(weight_decay=0.0)], ids=str)
def test_what_it_declares_is_true(optimizer: ServerOptimizer) -> None:
    params, (first, second) = tensors(0), DELTAS[:2]
    once, slots = optimizer.step(params, first, {}, 0)
    twice, _ = optimizer.step(once, second, slots, 1)
    assert optimizer.remembers == bool(slots)
    assert optimizer.adds_unscaled == all(torch.equal(twice[n], params[n] + first[n] + second[n]) for n in params)
    at_rest, _ = optimizer.step(params, {name: torch.zeros_like(value) for name, value in first.items()}, {}, 0)
    assert optimizer.decays == any(bool((at_rest[name].abs() < params[name].abs()).any()) for name in params)


@pytest.mark.parametrize("head", [*ALL, AdamW(schedule=Schedule(shape="linear"))], ids=str)
@pytest.mark.parametrize("server", [Sgd(), Sgd(momentum=0.5, lr_scale=LrScale(adapter=0.5)), AdamW()], ids=str)
def test_the_head_may_have_a_server_optimiser_of_its_own(server: ServerOptimizer, head: ServerOptimizer) -> None:
    """Each steps its own part exactly as if there were no other."""
    schema = schema_of({"b": "adapter", "a": "head"})
    both, slots = tensors(0), {}
    apart: dict[str, tuple[Tree, Slots]] = {name: ({name: both[name]}, {}) for name in both}
    for steps, delta in enumerate(DELTAS):
        both, slots = take_step((server, head), both, delta, slots, steps, schema, (steps, STEPS))
        for name, one in (("b", server), ("a", head)):
            params, state = apart[name]
            rates = one.rates(schema, (steps, STEPS))
            apart[name] = one.step(params, {name: delta[name]}, state, steps, rates)
            assert torch.equal(both[name], apart[name][0][name])
    assert list(both) == ["b", "a"]


@pytest.mark.parametrize("head", ALL, ids=str)
@pytest.mark.parametrize("group", ["adapter", "head"])
def test_either_of_two_server_optimisers_may_have_nothing_to_step(group: str, head: ServerOptimizer) -> None:
    """Without a trained head, or with a head alone, in round after round."""
    schema, params, slots = schema_of({"b": group}), {"b": tensors(0)["b"]}, {}
    alone, own = params, {}
    pair = (AdamW(), head) if group == "adapter" else (head, AdamW())
    for steps, delta in enumerate(DELTAS):
        params, slots = take_step(pair, params, {"b": delta["b"]}, slots, steps, schema, (steps, STEPS))
        alone, own = AdamW().step(alone, {"b": delta["b"]}, own, steps)
    assert torch.equal(params["b"], alone["b"])


def test_without_one_the_server_steps_the_head_too() -> None:
    schema, optimizer = schema_of({"b": "adapter", "a": "head"}), AdamW(lr_scale=LrScale(head=10.0))
    found, state = take_step((optimizer, None), tensors(0), DELTAS[0], {}, 0, schema, (0, 1))
    expected, slots = optimizer.step(tensors(0), DELTAS[0], {}, 0, {"b": 1.0, "a": 10.0})
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert state.keys() == slots.keys()
