"""What rounds fold into frozen weights: the dense oracle, the same bits on both sides, bytes, damage, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures.toy import LOCAL, Federation, combined

from fedlora.client.jobs import Job, Reply
from fedlora.config import Experiment
from fedlora.config.federated_data import in_mode
from fedlora.core import tree
from fedlora.core.errors import WireError
from fedlora.core.state import ClientState, Fold, Folds, ServerState, Update
from fedlora.methods import Phases, fedex, flora
from fedlora.rounds.downlink import Downlink
from fedlora.rounds.phases import close_phase
from fedlora.server.aggregate import Mean, ProductExact
from fedlora.transport.base_updates import extended, message, received
from fedlora.tuning.lora import lora_layers

METHODS: dict[str, Any] = {"fedex": fedex, "flora": flora}
SHAPES = {"n": (6, 5), "m": (9, 8)}


def phases(method: str, **settings: Any) -> Phases:
    found: Phases = METHODS[method](**{"rounds": 6, "rank": 2, "local": LOCAL, **settings})
    return found


def fold_of(seed: int, rank: int) -> Fold:
    draws = torch.Generator().manual_seed(seed)
    return Fold(
        {
            name: (torch.randn(rows, rank, generator=draws), torch.randn(rank, columns, generator=draws))
            for name, (rows, columns) in SHAPES.items()
        }
    )


def folds_of(*ranks: int) -> Folds:
    folds = Folds()
    for seed, rank in enumerate(ranks):
        folds = extended(folds, fold_of(seed, rank))
    return folds


def weights(federation: Federation) -> dict[str, torch.Tensor]:
    return {name: layer.matrix().detach().clone() for name, layer in lora_layers(federation.workspace.model).items()}


class Listening(Federation):
    """Keeps what every client started from and sent, and what was frozen in its model."""

    def __init__(self, found: Phases) -> None:
        super().__init__(found)
        self.delivered: list[tuple[Job, Reply, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        run = self.engine.run

        def listening(jobs: Any) -> Any:
            for job, reply in zip(jobs, run(jobs), strict=True):
                now = {name: value.detach().clone() for name, value in self.workspace.installed.parameters.items()}
                self.delivered.append((job, reply, now, weights(self)))
                yield reply

        self.engine.run = listening  # type: ignore[method-assign]


@pytest.mark.parametrize("memory", ["none", "init", "last_round"])
@pytest.mark.parametrize("method", METHODS)
def test_after_a_round_the_server_has_the_mean_of_the_clients_whole_matrices(method: str, memory: str) -> None:
    federation = Listening(phases(method, memory=memory))
    state = federation.start()
    for rounds in range(1, 4):
        federation.delivered.clear()
        state = federation.go_on(state, rounds)
        assert len({job.client for job, *_ in federation.delivered}) == 3
        tuning: Any = federation.phases[0].recipe.tuning
        scale = tuning.scale_of("", tuning.rank)
        means = {
            name: torch.stack(
                [
                    frozen[name].double() + scale * now[f"{name}.lora_B"].double() @ now[f"{name}.lora_A"].double()
                    for _, _, now, frozen in federation.delivered
                ]
            ).mean(0)
            for name in weights(federation)
        }
        federation.loss(state)  # shows the server's model
        for name, frozen in weights(federation).items():
            b, a = state.params[f"{name}.lora_B"].double(), state.params[f"{name}.lora_A"].double()
            torch.testing.assert_close(frozen.double() + scale * b @ a, means[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", ["none", "init", "last_round"])
@pytest.mark.parametrize("method", METHODS)
def test_clients_train_on_the_bits_that_the_server_has(method: str, memory: str) -> None:
    federation = Listening(phases(method, memory=memory))
    state = federation.go_on(federation.start(), 3)
    federation.loss(state)
    expected = weights(federation)
    federation.go_on(state, 4)
    for *_, frozen in federation.delivered[-3:]:
        assert all(torch.equal(frozen[name], value) for name, value in expected.items())


def test_clients_that_were_away_catch_up() -> None:
    federation = Listening(phases("fedex", memory="init"))
    state = federation.go_on(federation.start(), 1, (0, 1))
    state = federation.go_on(state, 3, (0, 1, 2))
    state = federation.go_on(state, 4, (1, 2))
    known = {client: memory.folds.version for client, memory in state.clients.items()}
    assert (known, state.folds.version) == ({0: 2, 1: 3, 2: 3}, 4)
    federation.go_on(state, 5, (0, 1))
    first, second = (frozen for *_, frozen in federation.delivered[-2:])
    assert all(torch.equal(first[name], value) for name, value in second.items())
    for client in (0, 1):
        memory = federation.go_on(state, 5, (0, 1)).clients[client]
        assert all(torch.equal(memory.folds.total[name], value) for name, value in state.folds.total.items())


def test_what_is_folded_is_billed_and_clients_that_remember_get_less() -> None:
    down = {}
    for memory in ("none", "init"):
        federation = Federation(phases("fedex", memory=memory))
        federation.go_on(federation.start(), 3, (0, 1))
        assert federation.rows[0].down_bytes.get("fold", 0) == 0
        down[memory] = [row.down_bytes["fold"] for row in federation.rows[1:]]
    entries = sum(2 * value.numel() for value in weights(federation).values())
    assert down["none"][0] == down["init"][0]  # the first fold is new to all
    assert down["init"][1] < 0.6 * down["none"][1]
    assert down["none"][1] <= 4 * entries + 400


def test_after_flora_a_round_sends_no_adapter_down_and_draws_another() -> None:
    federation = Federation(phases("flora"))
    state = federation.go_on(federation.start(), 1)
    after = federation.go_on(state, 2)
    for row in federation.rows:
        assert row.down_bytes["adapter"] < 100
    a = next(name for name in state.params if name.endswith("lora_A"))
    assert not torch.equal(state.params[a], after.params[a])
    assert not any(bool(value.any()) for name, value in after.params.items() if name.endswith("lora_B"))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_phase_hands_on_includes_the_folds(method: str) -> None:
    federation = Federation(phases(method))
    federation.start()
    before = weights(federation)
    state = federation.go_on(federation.start(), 3)
    recipe = federation.phases[0].recipe
    carry = close_phase(federation.workspace, recipe, state)
    federation.loss(state)
    for name, frozen in weights(federation).items():
        product = state.params[f"{name}.lora_B"] @ state.params[f"{name}.lora_A"]
        tuning: Any = recipe.tuning
        whole = frozen + tuning.scale_of(name, tuning.rank) * product - before[name]
        torch.testing.assert_close(carry.delta[f"{name}.weight"], whole, rtol=1e-4, atol=1e-5)


def test_a_model_can_go_back_to_an_earlier_state_bit_for_bit() -> None:
    federation = Federation(phases("fedex"))
    states: list[ServerState] = [federation.go_on(federation.start(), 1)]
    states.append(federation.go_on(states[0], 4))
    federation.loss(states[0])
    first = weights(federation)
    federation.loss(states[1])
    federation.loss(states[0])
    assert all(torch.equal(first[name], value) for name, value in weights(federation).items())


def test_two_states_with_as_many_folds_are_told_apart() -> None:
    federation = Federation(phases("fedex"))
    start = federation.start()
    one, other = (federation.go_on(start, 2, cohort) for cohort in ((0, 1), (1, 2)))
    assert one.folds.version == other.folds.version
    shown = []
    for state in (one, other, one):
        federation.loss(state)
        shown.append(weights(federation))
    assert all(torch.equal(shown[0][name], value) for name, value in shown[2].items())
    assert any(not torch.equal(shown[0][name], value) for name, value in shown[1].items())


# ---- messages


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_a_message_brings_any_client_to_the_same_bits(version: int) -> None:
    folds = folds_of(1, 1, 1)
    known = folds_of(*[1] * version)
    told = message(folds, version)
    if version == 3:
        assert told is None
        return
    assert told is not None
    assert len(told.raw) == sum(told.sizes.values())
    after = received(told, known, SHAPES)
    assert after.version == 3
    assert list(after.total) == list(folds.total)
    assert all(torch.equal(after.total[name], value) for name, value in folds.total.items())


def test_factors_are_sent_only_while_they_are_smaller() -> None:
    entries = sum(rows * columns for rows, columns in SHAPES.values())
    assert len(folds_of(1, 1, 1).recent) == 3  # 3 * 28 < 102
    assert len(folds_of(1, 1, 1, 1).recent) == 3
    assert len(folds_of(1, 5).recent) == 0
    for ranks in ((1, 1, 1, 1), (1, 5), (3,)):
        folds = folds_of(*ranks)
        for version in range(len(ranks)):
            told = message(folds, version)
            assert told is not None
            assert len(told.raw) < 4 * entries + 100


@pytest.mark.parametrize("ranks", [(4,), (1, 1, 1, 1), (10**12,)])
def test_announced_ranks_that_are_too_large_are_refused_before_anything_is_read(ranks: tuple[int, ...]) -> None:
    told = message(folds_of(1, 1), 1)
    assert told is not None
    with pytest.raises(WireError, match="more than the weights hold"):
        received(told._replace(ranks=ranks), folds_of(1), SHAPES)


@pytest.mark.parametrize("ranks", [(), (2,), (1, 1)])
def test_other_ranks_than_those_of_the_message_are_refused(ranks: tuple[int, ...]) -> None:
    told = message(folds_of(1, 1), 1)
    assert told is not None
    with pytest.raises(WireError, match="other parts, names or shapes"):
        received(told._replace(ranks=ranks), folds_of(1), SHAPES)


def test_a_damaged_message_is_refused() -> None:
    told = message(folds_of(1, 1), 1)
    assert told is not None
    raw = bytearray(told.raw)
    raw[-1] ^= 1
    with pytest.raises(WireError, match="checksum"):
        received(told._replace(raw=bytes(raw)), folds_of(1), SHAPES)


def test_a_client_whose_setup_is_new_gets_all_folds() -> None:
    federation = Federation(phases("fedex", memory="init"))
    state = federation.go_on(federation.start(), 3, (0, 1))
    downlink = Downlink(federation.phases[0].recipe, state, 0)
    told = downlink.message({}, ClientState().folds.version).fold
    assert told is not None
    shapes = {name: (layer.rows, layer.columns) for name, layer in lora_layers(federation.workspace.model).items()}
    after = received(told, Folds(), shapes)
    assert tree.num_entries(after.total) == tree.num_entries(state.folds.total)
    assert all(torch.equal(after.total[name], value) for name, value in state.folds.total.items())


def test_dense_folds_are_for_a_phases_start_alone() -> None:
    with pytest.raises(ValueError, match="as factors"):
        extended(Folds(), replace(fold_of(0, 1), dense={"m.weight": torch.ones(9, 8)}))


# ---- what a review found


def headless() -> Federation:
    """A federation whose model has no head, as those of language models have none."""
    federation = Listening(phases("flora"))
    load = federation.workspace.task.load_model
    federation.workspace.task.load_model = lambda *given: (load(*given)[0], frozenset())  # type: ignore[method-assign]
    return federation


def test_without_a_head_each_round_starts_from_its_own_a() -> None:
    federation = headless()
    assert isinstance(federation, Listening)
    state = federation.start()
    assert set(state.schema.groups.values()) == {"adapter"}
    for rounds in range(1, 4):
        federation.delivered.clear()
        before = federation.go_on(state, rounds)
        for job, *_ in federation.delivered:
            assert job.round == rounds - 1
        means = {
            name: torch.stack([_whole(now, frozen, name) for _, _, now, frozen in federation.delivered]).mean(0)
            for name in weights(federation)
        }
        state = before
        federation.loss(state)
        for name, frozen in weights(federation).items():
            torch.testing.assert_close(frozen.double(), means[name], rtol=1e-5, atol=1e-6)


def _whole(now: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    product = now[f"{name}.lora_B"].double() @ now[f"{name}.lora_A"].double()
    return frozen[name].double() + 16.0 / 2 * product


def test_in_bfloat16_the_weights_that_are_edited_keep_their_precision() -> None:
    federation = Federation(phases("fedex", local=replace(LOCAL, compute="bf16")))
    start = federation.start()
    federation.loss(start)
    before = weights(federation)
    state = federation.go_on(start, 3)
    federation.loss(state)
    for name, frozen in weights(federation).items():
        assert frozen.dtype == torch.float32
        torch.testing.assert_close(frozen - before[name], 8.0 * state.folds.total[name], rtol=1e-3, atol=1e-6)


def test_a_truncated_fold_has_one_rank_for_modules_of_all_sizes() -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = {"s.lora_A": (8, 9), "s.lora_B": (9, 8), "w.lora_A": (8, 40), "w.lora_B": (40, 8)}

    def tree_of() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}

    params = tree_of()
    change = combined(ProductExact(rank=20), [Update(params, tree_of(), 1.0) for _ in range(4)], params)
    assert {a.shape[0] for _, a in change.fold.factors.values()} == {20}
    folds = extended(Folds(), change.fold)
    told = message(folds, 0)
    assert told is not None
    after = received(told, Folds(), {"s": (9, 9), "w": (40, 40)})
    assert all(torch.equal(after.total[name], value) for name, value in folds.total.items())


@pytest.mark.parametrize("ranks", [(-1, 2), (0,) * 1000, (10**6, 1 - 10**6)])
def test_ranks_that_are_none_are_refused(ranks: tuple[int, ...]) -> None:
    told = message(folds_of(1, 1), 1)
    assert told is not None
    with pytest.raises(WireError, match="ranks are 1 or more"):
        received(told._replace(ranks=ranks), folds_of(1), SHAPES)


def test_clients_that_know_the_same_folds_share_one_copy() -> None:
    federation = Federation(phases("fedex", memory="init"))
    state = federation.go_on(federation.start(), 2, (0, 1))
    state = federation.go_on(state, 4, (0, 1, 2))
    totals = {id(memory.folds.total) for memory in state.clients.values()}
    assert len(totals) == 1


@pytest.mark.parametrize("mode", ["centralised", "local"])
@pytest.mark.parametrize("method", METHODS)
def test_alone_a_client_folds_nothing(method: str, mode: Any) -> None:
    alone = in_mode(Experiment(label=method, mode=mode, phases=phases(method)))
    assert alone.phases[0].recipe.aggregator == Mean()
