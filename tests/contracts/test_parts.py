"""What a new part needs is itself alone: a stateful aggregator, and a tuning one factor of which stays with clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures.toy import LOCAL, Federation, toy_run
from safetensors.torch import load_file
from torch import nn

from fedlora import run
from fedlora.core import tree
from fedlora.core.schema import Schema
from fedlora.core.state import Change, ServerState, Update
from fedlora.core.store import Store
from fedlora.core.tree import Tree
from fedlora.methods import fedavg
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.rounds.checkpoint import load_state, save_state
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.cost import costs
from fedlora.runs.experiment import Stopped
from fedlora.runs.folder import RunFolder
from fedlora.server.aggregate import Accumulator, Mean
from fedlora.transport import BFloat16, Link, TopK
from fedlora.tuning import Installed, LoRA
from fedlora.tuning.export import save_lora


class WithMomentum(Accumulator):
    """The mean of the updates, and half of what was applied in the round before."""

    def __init__(self, mean: Accumulator, store: Store) -> None:
        self._mean, self._store = mean, store

    def add(self, update: Update) -> None:
        self._mean.add(update)

    def finish(self) -> Change:
        change = self._mean.finish()
        before = self._store.trees.get("momentum", {})
        delta = tree.add(change.delta, before, 0.5) if before else change.delta
        return change._replace(delta=delta, store=Store({"momentum": delta}, {"rounds": 1 + self._rounds}))

    @property
    def _rounds(self) -> int:
        return int(self._store.values.get("rounds", 0))


class MomentumMean(Mean):
    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return WithMomentum(super().begin(params, schema, store), store)


class KilledAfter(Callback):
    def __init__(self, round: int) -> None:
        self.round = round

    def row_recorded(self, row: RoundRecord) -> None:
        if row.round == self.round:
            raise KeyboardInterrupt


def test_a_part_that_remembers_is_a_class_and_no_more(tmp_path: Path) -> None:
    experiment, data = toy_run(fedavg(rounds=4, tuning=LoRA(rank=4), local=LOCAL, aggregator=MomentumMean()))
    plain = replace(experiment, phases=fedavg(rounds=4, tuning=LoRA(rank=4), local=LOCAL))
    run(experiment, tmp_path / "whole", data=data)
    with pytest.raises(Stopped):
        run(experiment, tmp_path / "killed", data=data, callbacks=[KilledAfter(2)])
    run(experiment, tmp_path / "killed", data=data)
    run(plain, tmp_path / "plain", data=data)
    whole, killed, without = (newest(tmp_path / name) for name in ("whole", "killed", "plain"))
    assert whole.parts.value("aggregator", "rounds") == killed.parts.value("aggregator", "rounds") == 4
    for one, other in ((whole.params, killed.params), *zip(momenta(whole), momenta(killed), strict=True)):
        assert all(torch.equal(other[name], value) for name, value in one.items())
    assert any(not torch.equal(without.params[name], value) for name, value in whole.params.items())


def newest(folder: Path) -> ServerState:
    found = RunFolder(folder).latest()
    assert found is not None
    return found[0]


def momenta(state: ServerState) -> list[Tree]:
    return [state.parts.tree("aggregator", "momentum")]


# ---- what stays with clients


class PersonalB(LoRA):
    """LoRA whose factors ``B`` never leave their client."""

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        installed = super().install(model, head, seed)
        for name, leaf in installed.schema.items():
            if leaf.factor == "B":
                installed.schema[name] = leaf._replace(role="personal")
        return installed


class PersonalHead(LoRA):
    """LoRA whose head never leaves its client."""

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        installed = super().install(model, head, seed)
        for name in installed.schema.names("head"):
            installed.schema[name] = installed.schema[name]._replace(role="personal")
        return installed


def test_a_personal_head_goes_with_ranks_that_clients_give_up() -> None:
    federation = Federation(
        fedavg(rounds=2, tuning=PersonalHead(rank=4), local=LOCAL, memory="init", shrink=RankPruning())
    )
    state = federation.go_on(federation.start(), 2)
    assert "head" not in federation.rows[-1].up_bytes
    assert all(
        memory.parts.tree("personal", "values").keys() == state.schema.personal for memory in state.clients.values()
    )


LINKS = {
    "dense": {},
    "relative to the init": {"down": Link(reference="init"), "up": Link(sparsify=TopK(density=0.5))},
    "rounded": {"down": Link(precision=BFloat16()), "up": Link(precision=BFloat16(), feedback=True)},
    "the last round": {"memory": "last_round"},
}


@pytest.mark.parametrize("slots", LINKS.values(), ids=LINKS)
def test_what_is_personal_stays_with_its_client(slots: dict[str, object], tmp_path: Path) -> None:
    phases = fedavg(rounds=4, tuning=PersonalB(rank=4), local=LOCAL, **{"memory": "init", **slots})  # type: ignore[arg-type]
    federation = Federation(phases)
    start = federation.start()
    personal = start.schema.personal
    assert personal == {name for name in start.params if name.endswith("lora_B")}
    half = federation.go_on(start, 2)
    assert all(torch.equal(half.params[name], start.params[name]) for name in personal)
    shared = set(start.params) - personal
    assert all(not torch.equal(half.params[name], start.params[name]) for name in shared)
    own = [half.clients[client].parts.tree("personal", "values") for client in range(3)]
    assert all(set(values) == personal for values in own)
    assert all(not torch.equal(own[0][name], own[1][name]) for name in personal)
    assert not personal & set(half.known.get(0, {}).get("down", Store()).trees.get("held", {}))
    save_state(half, tmp_path / "state", {})
    end = federation.go_on(half, 4)
    fresh = Federation(phases)
    fresh.start()
    again = fresh.go_on(load_state(tmp_path / "state")[0], 4)
    assert all(torch.equal(again.params[name], value) for name, value in end.params.items())
    kept = again.clients[1].parts.tree("personal", "values")
    assert all(
        torch.equal(kept[name], value) for name, value in end.clients[1].parts.tree("personal", "values").items()
    )
    assert any(not torch.equal(kept[name], own[1][name]) for name in personal)


def test_what_is_personal_costs_no_bytes_and_is_exported_as_it_began(tmp_path: Path) -> None:
    experiment, data = toy_run(fedavg(rounds=2, tuning=PersonalB(rank=4), local=LOCAL, memory="init"), clients=3)
    result = run(experiment, tmp_path / "run", data=data)
    state = newest(tmp_path / "run")
    adapters = sum(value.numel() for name, value in state.params.items() if name.endswith("lora_A"))
    assert 0 <= result.rows[1].up_bytes["adapter"] - 3 * 4 * adapters < 100
    assert 0 <= result.rows[2].down_bytes["adapter"] - 3 * 4 * adapters < 100
    (told,) = costs(experiment, data)
    assert told.all_bytes == (sum(result.down_bytes.values()), sum(result.up_bytes.values()))
    federation = Federation(experiment.phases)
    begun = federation.start()
    installed = federation.workspace.installed
    save_lora(PersonalB(rank=4), installed, state.init, state.params, "base", tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in begun.schema.personal:
        assert torch.equal(written[f"base_model.model.{name}.weight"], begun.params[name])
