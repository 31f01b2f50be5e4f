"""Aggregators against dense float64 oracles, and by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.toy import LOCAL, Federation, combined

from fedlora.core import tree
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.core.state import Change, Update
from fedlora.core.tree import Tree
from fedlora.methods import fedavg
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.server.aggregate import (
    AGGREGATORS,
    Aggregator,
    CoordinateMedian,
    Krum,
    Mean,
    NormBound,
    ProductExact,
    SparsityWeighted,
    Stack,
    SvdRedistribute,
    TrimmedMean,
)
from fedlora.server.optimizers import Adam, Sgd
from fedlora.server.pruning import Prune
from fedlora.transport import Link, RandomK, TopK
from fedlora.tuning import Full, LoRA, SvdOfWeight

NOISE = CentralGaussian(clip_norm=1.0, noise_multiplier=1.0)
VALUES: dict[str, Aggregator] = {
    "mean": Mean(),
    "sparsity_weighted": SparsityWeighted(),
    "svd_redistribute": SvdRedistribute(),
    "product_exact": ProductExact(),
    "stack": Stack(),
    "median": CoordinateMedian(),
    "trimmed_mean": TrimmedMean(trim=0.25),
    "krum": Krum(faulty=0),
    "norm_bound": NormBound(norm=1e9),
}


def params_of(seed: int, rank: int = 3) -> Tree:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"m.lora_A": (rank, 7), "m.lora_B": (5, rank), "head.weight": (2, 5)}
    return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}


def cohort(num: int, seed: int = 0) -> tuple[Tree, list[Update]]:
    params = params_of(seed)
    return params, [Update(params, params_of(seed + 1 + k), float(k + 1)) for k in range(num)]


def product(params: Tree) -> torch.Tensor:
    return params["m.lora_B"].double() @ params["m.lora_A"].double()


def folded(change: Change) -> torch.Tensor:
    b, a = change.fold.factors.get("m", (torch.zeros(5, 1), torch.zeros(1, 7)))
    return b.double() @ a.double()


def mean_product(updates: list[Update], weighting: str) -> torch.Tensor:
    weights = np.array([1.0 if weighting == "uniform" else update.weight for update in updates])
    products = torch.stack([product(tree.add(update.start, update.delta)) for update in updates])
    return (torch.tensor(weights / weights.sum())[:, None, None] * products).sum(0)


def stacked(updates: list[Update]) -> np.ndarray:
    return np.stack([tree.flatten(update.delta).double().numpy() for update in updates])


def test_every_aggregator_is_here() -> None:
    assert list(VALUES) == list(AGGREGATORS)


@pytest.mark.parametrize("kind", VALUES)
def test_equal_clients_give_what_each_of_them_has(kind: str) -> None:
    params, (one,) = cohort(1)
    change = combined(VALUES[kind], [one] * 4, params)
    after = tree.add(params, change.delta)
    expected = tree.add(params, one.delta)
    torch.testing.assert_close(product(after) + folded(change), product(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["head.weight"], expected["head.weight"])
    assert bool(change.fold) == VALUES[kind].reinitialises


@pytest.mark.parametrize("kind", VALUES)
def test_the_order_of_clients_does_not_matter(kind: str) -> None:
    params, updates = cohort(5)
    one, other = (combined(VALUES[kind], order, params) for order in (updates, updates[::-1]))
    for name, value in one.delta.items():
        torch.testing.assert_close(value, other.delta[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(folded(one), folded(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VALUES)
def test_nobody_is_refused(kind: str) -> None:
    with pytest.raises(TrainingError, match="no client returned an update"):
        combined(VALUES[kind], [], params_of(0))


@pytest.mark.parametrize("kind", VALUES)
def test_its_loss_falls_on_a_real_model(kind: str) -> None:
    federation = Federation(fedavg(rounds=4, tuning=LoRA(rank=4), local=LOCAL, aggregator=VALUES[kind]))  # type: ignore[arg-type]
    state = federation.start()
    before = federation.loss(state)
    assert federation.loss(federation.go_on(state, 4)) < 0.95 * before


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("split", ["left", "symmetric"])
def test_svd_redistribute_is_the_best_approximation_of_the_mean_product(weighting: Any, split: Any) -> None:
    params, updates = cohort(4)
    change = combined(SvdRedistribute(weighting=weighting, split=split), updates, params)
    after = tree.add(params, change.delta)
    u, s, vt = torch.linalg.svd(mean_product(updates, weighting))
    torch.testing.assert_close(product(after), u[:, :3] * s[:3] @ vt[:3], rtol=1e-5, atol=1e-5)
    if split == "left":
        gram = after["m.lora_A"].double() @ after["m.lora_A"].double().T
        torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("kind", [kind for kind, rule in AGGREGATORS.items() if rule.exact_for_products])
def test_rules_that_are_exact_for_products_give_their_mean(kind: str, weighting: Any) -> None:
    params, updates = cohort(4)
    change = combined(VALUES[kind].__class__(weighting=weighting), updates, params)  # type: ignore[call-arg]
    after = product(tree.add(params, change.delta)) + folded(change)
    torch.testing.assert_close(after, mean_product(updates, weighting), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_rules_say_truly_whether_they_are_exact_for_products(kind: str) -> None:
    params, updates = cohort(6)
    change = combined(VALUES[kind], updates, params)
    gap = product(tree.add(params, change.delta)) + folded(change) - mean_product(updates, "uniform")
    assert (float(gap.abs().max()) < 1e-4) == VALUES[kind].exact_for_products


def test_the_fold_of_product_exact_has_the_least_rank_and_may_have_less() -> None:
    params, updates = cohort(2)
    b, a = combined(ProductExact(), updates, params).fold.factors["m"]
    assert (b.shape, a.shape) == ((5, 3), (3, 7))  # one client fewer than there are, times the rank
    whole = combined(ProductExact(), cohort(4)[1], params)
    small = combined(ProductExact(rank=2), cohort(4)[1], params)
    u, s, vt = torch.linalg.svd(folded(whole))
    torch.testing.assert_close(folded(small), u[:, :2] * s[:2] @ vt[:2], rtol=1e-5, atol=1e-5)


def test_where_a_keeps_still_product_exact_folds_nothing_and_stack_the_rank_of_one() -> None:
    params, updates = cohort(4)
    still = [update._replace(delta=update.delta | {"m.lora_A": torch.zeros(3, 7)}) for update in updates]
    assert not combined(ProductExact(), still, params).fold
    assert combined(Stack(), still, params).fold.factors["m"][1].shape == (3, 7)


def test_stack_leaves_out_ranks_that_a_client_does_not_have() -> None:
    params = params_of(0) | {"m.lora_B": torch.zeros(5, 3)}
    full, short = params_of(1), params_of(2)
    short["m.lora_A"][1:] = -params["m.lora_A"][1:]
    short["m.lora_B"][:, 1:] = 0.0
    updates = [Update(params, full, 1.0), Update(params, short, 1.0)]
    change = combined(Stack(), updates, params)
    assert change.fold.factors["m"][0].shape == (5, 4)
    torch.testing.assert_close(folded(change), mean_product(updates, "uniform"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, rule in AGGREGATORS.items() if rule.needs_factors])
def test_modules_may_have_unequal_ranks(kind: str) -> None:
    wide, narrow = (
        cohort(4),
        (params_of(10, 2), [Update(params_of(10, 2), params_of(11 + k, 2), 1.0) for k in range(4)]),
    )

    def both(one: Tree, other: Tree) -> Tree:
        return one | {name.replace("m.", "n."): value for name, value in other.items() if name.startswith("m.")}

    updates = [
        Update(both(one.start, two.start), both(one.delta, two.delta), 1.0)
        for one, two in zip(wide[1], narrow[1], strict=True)
    ]
    change = combined(VALUES[kind], updates, both(wide[0], narrow[0]))
    assert len({len(a) for _, a in change.fold.factors.values()}) <= 1  # one rank is announced for all modules
    for module, (params, own) in {"m.": wide, "n.": narrow}.items():
        alone = combined(VALUES[kind], [one._replace(weight=1.0) for one in own], params)
        found = {f"m.{name.removeprefix(module)}": v for name, v in change.delta.items() if name.startswith(module)}
        fold = change.fold.factors.get(module.rstrip("."), (torch.zeros(5, 1), torch.zeros(1, 7)))
        if kind != "sparsity_weighted":  # whose weights are of all modules together
            for name, value in found.items():
                torch.testing.assert_close(value, alone.delta[name], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(fold[0].double() @ fold[1].double(), folded(alone), rtol=1e-5, atol=1e-5)
        assert {name: value.shape for name, value in found.items()} == {n: params[n].shape for n in found}


@pytest.mark.parametrize("case", ["no energy", "one rank", "equal values"])
def test_svd_redistribute_is_stable_where_singular_values_vanish_or_repeat(case: str) -> None:
    params = {"m.lora_A": torch.eye(3, 7), "m.lora_B": torch.zeros(5, 3)}
    delta = {"m.lora_A": torch.zeros(3, 7), "m.lora_B": torch.zeros(5, 3)}
    if case == "one rank":
        delta["m.lora_B"][0, 0] = 2.0
    if case == "equal values":
        delta["m.lora_B"][:3] = torch.eye(3)
    updates = [Update(params, delta, 1.0)] * 3
    after = tree.add(params, combined(SvdRedistribute(), updates, params).delta)
    torch.testing.assert_close(product(after), delta["m.lora_B"].double() @ params["m.lora_A"].double())
    assert torch.isfinite(after["m.lora_A"]).all()
    torch.testing.assert_close(after["m.lora_A"] @ after["m.lora_A"].T, torch.eye(3))  # no rank is lost


def test_sparsity_weights_are_the_norms_of_the_products() -> None:
    params, updates = cohort(3)
    norms = np.array([float(product(tree.add(u.start, u.delta)).norm()) for u in updates])
    expected = (norms / norms.sum()) @ stacked(updates)
    found = tree.flatten(combined(SparsityWeighted(), updates, params).delta)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8])
def test_median_and_trimmed_mean_equal_numpy(num: int) -> None:
    params, updates = cohort(num)
    found = tree.flatten(combined(CoordinateMedian(), updates, params).delta)
    np.testing.assert_allclose(found.numpy(), np.median(stacked(updates), axis=0), rtol=1e-6)
    left_out = {1: 0, 2: 0, 3: 1, 5: 2, 8: 2}[num]
    expected = np.sort(stacked(updates), axis=0)[left_out : num - left_out].mean(axis=0)
    found = tree.flatten(combined(TrimmedMean(trim=0.25), updates, params).delta)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("faulty", "select"), [(1, 1), (1, 3), (2, 2)])
def test_krum_equals_a_slow_reference(faulty: int, select: int) -> None:
    params, updates = cohort(8)
    rows = stacked(updates)
    scores = []
    for i in range(8):
        others = sorted(((rows[i] - rows[j]) ** 2).sum() for j in range(8) if j != i)
        scores.append(sum(others[: 8 - faulty - 2]))
    best = sorted(range(8), key=lambda i: scores[i])[:select]
    found = tree.flatten(combined(Krum(faulty=faulty, select=select), updates, params).delta)
    np.testing.assert_allclose(found.numpy(), rows[best].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_krum_needs_enough_clients() -> None:
    params, updates = cohort(4)
    with pytest.raises(TrainingError, match="needs 5 clients in a round, and 4 answered"):
        combined(Krum(faulty=1), updates, params)


def test_norm_bound_equals_numpy() -> None:
    params, updates = cohort(5)
    rows = stacked(updates)
    norms = np.linalg.norm(rows, axis=1)
    bound = float(np.median(norms))  # some are longer
    expected = (rows * np.minimum(1.0, bound / norms)[:, None]).mean(axis=0)
    found = tree.flatten(combined(NormBound(norm=bound), updates, params).delta)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_svd_redistribute_bears_a_tie_where_it_cuts() -> None:
    """Four equal singular values and room for three: whichever are kept, what is lost is one of them."""
    zeros = {"m.lora_A": torch.zeros(3, 7), "m.lora_B": torch.zeros(5, 3)}
    rows = torch.eye(7)
    one = {"m.lora_A": rows[:3], "m.lora_B": torch.eye(5)[:, :3] * 2}
    other = {"m.lora_A": torch.stack([rows[3], *torch.zeros(2, 7)]), "m.lora_B": torch.eye(5)[:, [3, 4, 4]] * 2}
    updates = [Update(zeros, one, 1.0), Update(zeros, other, 1.0)]
    mean = mean_product(updates, "uniform")
    assert torch.linalg.svdvals(mean).tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.0])
    after = tree.add(zeros, combined(SvdRedistribute(), updates, zeros).delta)
    gap = torch.linalg.svdvals(product(after) - mean)
    torch.testing.assert_close(gap, torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["m.lora_A"] @ after["m.lora_A"].T, torch.eye(3), rtol=1e-5, atol=1e-6)


def test_adapters_that_are_all_zero_have_no_say() -> None:
    zeros = tree.zeros_like(params_of(0))
    with pytest.raises(TrainingError, match="all adapters are zero"):
        combined(SparsityWeighted(), [Update(zeros, zeros, 1.0)], zeros)


@pytest.mark.parametrize("kind", ["median", "trimmed_mean", "krum", "norm_bound"])
def test_one_client_that_lies_hardly_moves_a_robust_rule(kind: str) -> None:
    params, updates = cohort(1)
    honest = [updates[0]] * 6
    liar = updates[0]._replace(delta=tree.scale(updates[0].delta, -1e6))
    rule = {"krum": Krum(faulty=1), "norm_bound": NormBound(norm=tree.norm(updates[0].delta))}.get(kind, VALUES[kind])
    found = combined(rule, [*honest, liar], params).delta
    gap = tree.norm(tree.subtract(found, updates[0].delta)) / tree.norm(updates[0].delta)
    assert gap < 0.3
    assert tree.norm(tree.subtract(combined(Mean(), [*honest, liar], params).delta, updates[0].delta)) > 1e4 * gap


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"aggregator": SvdRedistribute(), "server": Adam()}, "recomputes both factors"),
        ({"aggregator": SvdRedistribute(), "server": Sgd(momentum=0.9)}, "recomputes both factors"),
        ({"aggregator": SvdRedistribute(), "tuning": LoRA(train="B")}, "both factors"),
        ({"aggregator": ProductExact(), "server": Adam()}, "recomputes both factors"),
        ({"aggregator": ProductExact(), "down": Link(sparsify=TopK(density=0.5))}, "would be lost"),
        ({"aggregator": ProductExact(), "privacy": NOISE}, "that all weigh the same"),
        ({"aggregator": ProductExact(), "prune": Prune(density=0.5)}, "an aggregator that is a mean"),
        ({"aggregator": Stack(), "tuning": Full()}, "works on products"),
        ({"aggregator": Stack(), "tuning": LoRA(train="alternate")}, "training A alone has no effect"),
        ({"aggregator": Stack(), "tuning": LoRA(init=SvdOfWeight())}, "reinitialises adapters after"),
        ({"aggregator": Stack(), "up": Link(feedback=True), "memory": "init"}, "are reinitialised"),
        ({"aggregator": Stack(), "local": Local(keep_optimizer=True)}, "are reinitialised"),
        ({"aggregator": SparsityWeighted(), "tuning": Full()}, "works on products"),
        ({"aggregator": SparsityWeighted(), "down": Link(sparsify=TopK(density=0.5))}, "decay to zero"),
        ({"aggregator": SvdRedistribute(), "down": Link(sparsify=TopK(density=0.5))}, "would be lost"),
        ({"aggregator": CoordinateMedian(), "up": Link(sparsify=TopK(density=0.5))}, "hardly any would change"),
        ({"aggregator": Krum(), "up": Link(sparsify=RandomK(density=0.5))}, "only for a plain mean"),
        ({"tuning": LoRA(train="alternate"), "server": Sgd(momentum=0.9)}, "the frozen factor in the next"),
        ({"tuning": LoRA(train="alternate"), "server": Adam()}, "the frozen factor in the next"),
        ({"aggregator": SvdRedistribute(), "tuning": Full()}, "works on products"),
    ],
)
def test_rules_that_would_lie_are_refused(slots: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**slots)


# ---- factors that keep still


@pytest.mark.parametrize("train", ["B", "alternate"])
def test_a_still_factor_keeps_its_bits_and_costs_nothing_up(train: Any) -> None:
    federation = Federation(fedavg(rounds=4, tuning=LoRA(rank=4, train=train), local=LOCAL))
    states = [federation.start()]
    for rounds in range(1, 5):
        states.append(federation.go_on(states[-1], rounds))
    for turn, (before, after) in enumerate(pairwise(states)):
        moving = "lora_A" if train == "alternate" and turn % 2 else "lora_B"
        for name, value in after.params.items():
            moved = not torch.equal(value, before.params[name])
            assert moved == (name.endswith(moving) or "lora" not in name)
    both = Federation(fedavg(rounds=4, tuning=LoRA(rank=4), local=LOCAL))
    both.go_on(both.start(), 4)
    assert federation.rows[2].up_bytes["adapter"] < 0.6 * both.rows[2].up_bytes["adapter"]


def test_the_mean_of_products_is_the_product_of_means_where_a_keeps_still() -> None:
    params, updates = cohort(4)
    still = [update._replace(delta=update.delta | {"m.lora_A": torch.zeros(3, 7)}) for update in updates]
    after = tree.add(params, combined(Mean(), still, params).delta)
    products = torch.stack([product(tree.add(update.start, update.delta)) for update in still])
    torch.testing.assert_close(product(after), products.mean(0), rtol=1e-6, atol=1e-6)


def test_what_a_client_knows_of_a_still_factor_is_not_sent_down() -> None:
    from fedlora.methods import dense_lora, ffa, rolora

    sent = {}
    for name, phases in (
        ("ffa", ffa(rounds=3, rank=4, local=LOCAL, memory="init")),
        ("rolora", rolora(rounds=3, rank=4, local=LOCAL, memory="last_round")),
        ("lora", dense_lora(rounds=3, rank=4, local=LOCAL)),
    ):
        federation = Federation(phases)
        federation.go_on(federation.start(), 3)
        sent[name] = federation.rows[2].down_bytes["adapter"]
    assert sent["ffa"] < 0.6 * sent["lora"]
    assert sent["rolora"] < 0.6 * sent["lora"]


def test_noise_leaves_a_still_factor_where_it_is() -> None:
    from fedlora.privacy import CentralGaussian

    noisy = CentralGaussian(clip_norm=1.0, noise_multiplier=1.0)
    federation = Federation(fedavg(rounds=2, tuning=LoRA(rank=4, train="B"), local=LOCAL, privacy=noisy))
    start = federation.start()
    end = federation.go_on(start, 2)
    assert all(torch.equal(end.params[n], value) for n, value in start.params.items() if n.endswith("lora_A"))


def test_the_servers_weight_decay_beside_a_still_factor_is_refused() -> None:
    from fedlora.server.optimizers import AdamW

    with pytest.raises(ConfigError, match="move the frozen factor"):
        Recipe(tuning=LoRA(train="B"), server=AdamW(weight_decay=0.1))
