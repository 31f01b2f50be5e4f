"""Rounds of FLASC's two other scripts, with noise and with unequal clients, against a plain loop that says the same.

The golden runs are of the script without either. Here every step of a round is written out once more, as the authors'
code has it: their order, their scaling, their zero padding, and PyTorch's own optimisers on both ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures.toy import CPU, Federation
from torch import Tensor

from fedlora.core.state import ServerState, generator, named_seed
from fedlora.core.tree import Tree, unflatten
from fedlora.methods import fedavg, flasc
from fedlora.population.tiers import Tier
from fedlora.privacy import CentralGaussian
from fedlora.recipe.local import Local
from fedlora.recipe.local import Sgd as ClientSgd
from fedlora.rounds.round import run_round
from fedlora.server.optimizers import AdamW
from fedlora.transport import Link, Quota, TopK
from fedlora.tuning import LoRA

COHORT = (2, 0, 1)
LOCAL = Local(optimizer=ClientSgd(lr=0.5, momentum=0.9), batch_size=4, shuffle=False, dropout=False)
SERVER = AdamW(lr=0.02, weight_decay=0.01)
ROUNDS = 3


def vector(params: Tree) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def shaken(state: ServerState) -> ServerState:
    """From zero Adam's first step is as long everywhere, and of entries that are as large as others any may be kept."""
    draws = generator(1)
    moved = {name: value + 0.1 * torch.randn(value.shape, generator=draws) for name, value in state.params.items()}
    return replace(state, params=moved)


def largest(values: Tensor, density: float, among: Tensor) -> Tensor:
    """The mask of FLASC's ``topk`` over ``among``; what is not among them is kept."""
    places = torch.nonzero(among).flatten()
    best = values[places].abs().topk(int(len(places) * density)).indices
    mask = ~among
    mask[places[best]] = True
    return mask


def trained(federation: Federation, state: ServerState, start: Tree, client: int) -> Tensor:
    """``theta_i - theta_i^0`` of a client's pass, by PyTorch alone."""
    workspace, recipe = federation.workspace, federation.phases[0].recipe
    workspace.apply_setup(state.phase, recipe, state.setup)
    workspace.load(recipe, start, state.folds)
    parameters = workspace.installed.parameters
    values = [parameters[name] for name in start]
    workspace.model.eval()  # no dropout
    for value in values:
        value.requires_grad_(True)
    optimizer = torch.optim.SGD(values, lr=0.5, momentum=0.9)
    rows = federation.engine.population.rows_of(client)
    for first in range(0, len(rows), 4):
        optimizer.zero_grad()
        workspace.task.loss(workspace.model, workspace.task.batch(rows[first : first + 4], CPU)).backward()
        optimizer.step()
    return vector({name: parameters[name].detach() for name in start}) - vector(start)


def rounds(
    federation: Federation,
    state: ServerState,
    down: Callable[[int, Tensor], Tensor],
    up: Callable[[int, Tensor], Tensor],
    mean: Callable[[list[Tensor], int], Tensor],
) -> Tensor:
    """The server's parameters after some rounds.

    Args:
        down: a client and the parameters -> what it starts from.
        up: a client and its change -> what it sends.
        mean: what came and the round -> the negative gradient of the server's optimiser.
    """
    theta = torch.nn.Parameter(vector(state.params).clone())
    server = torch.optim.AdamW([theta], lr=0.02, weight_decay=0.01)
    for turn in range(ROUNDS):
        now = theta.detach().clone()
        sent = []
        for client in COHORT:
            start = unflatten(down(client, now), state.params)
            sent.append(up(client, trained(federation, state, start, client)))
        theta.grad = -mean(sent, turn)
        server.step()
    return theta.detach()


def test_the_order_and_the_scaling_of_noise_are_those_of_flascs_code() -> None:
    clip, sigma = 0.3, 0.2
    privacy = CentralGaussian(clip_norm=clip, noise_multiplier=sigma, normalise=True, seed=5)
    links = {"down": 0.5, "up": 0.25, "reference": "zero"}
    phases = flasc(rounds=ROUNDS, rank=4, **links, server=SERVER, local=LOCAL, privacy=privacy)  # type: ignore[arg-type]
    federation = Federation(phases)
    state = shaken(federation.start())
    ours = vector(federation.go_on(state, ROUNDS).params)
    every = torch.ones(len(ours), dtype=torch.bool)
    clipped = []

    def up(client: int, delta: Tensor) -> Tensor:
        delta = delta * largest(delta, 0.25, every)
        clipped.append(float(delta.norm()) > clip)
        return delta / max(float(delta.norm()) / clip, 1.0)

    def mean(sent: list[Tensor], turn: int) -> Tensor:
        draws = generator(named_seed(5, "noise", turn))
        noise = torch.cat([torch.randn(value.shape, generator=draws).flatten() for value in state.params.values()])
        return (torch.stack(sent).sum(0) / clip + sigma * noise) / len(sent)

    expected = rounds(federation, state, lambda client, now: now * largest(now, 0.5, every), up, mean)
    assert any(clipped)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", ["density", "rank", "rankl1"])
def test_the_settings_of_unequal_clients_are_those_of_flascs_code(setting: str) -> None:
    ranks, densities = (1, 2, 4), (1 / 16, 1 / 4, 1.0)

    def tier(number: int) -> Tier:
        common = {"name": f"t{number}", "share": 1 / 3}
        if setting == "density":
            links = [
                Link(sparsify=TopK(density=densities[number], quota=quota)) for quota in (Quota(head=1.0), Quota())
            ]
            return Tier(**common, down=links[0], up=links[1])
        return Tier(**common, rank=ranks[number], rank_by="norm" if setting == "rankl1" else "order")

    federation = Federation(fedavg(rounds=ROUNDS, tuning=LoRA(rank=4), server=SERVER, local=LOCAL))
    first = shaken(federation.start())
    state, recipe = first, federation.phases[0].recipe
    tiers = {client: tier(client) for client in range(3)}
    for _ in range(ROUNDS):
        state, _ = run_round(recipe, state, COHORT, federation.engine, 0, ROUNDS, tiers)

    def whole(value: bool) -> Tree:
        return {name: torch.full(tensor.shape, value) for name, tensor in first.params.items()}

    adapter = vector(
        {name: torch.full(v.shape, first.schema[name].group == "adapter") for name, v in first.params.items()}
    )

    def down(client: int, now: Tensor) -> Tensor:
        if setting == "density":
            return now * largest(now, densities[client], adapter)
        masks, params = whole(True), unflatten(now, first.params)
        for name in (name for name in masks if "lora_" in name):
            rows = params[name] if name.endswith("A") else params[name].T
            order = np.argsort(-np.linalg.norm(rows.numpy(), axis=1)) if setting == "rankl1" else np.arange(4)
            kept = torch.zeros(rows.shape, dtype=torch.bool)
            kept[order[: ranks[client]].copy()] = True
            masks[name] = kept if name.endswith("A") else kept.T
        return now * vector(masks)

    def up(client: int, delta: Tensor) -> Tensor:
        every = torch.ones(len(delta), dtype=torch.bool)
        return delta * largest(delta, densities[client], every) if setting == "density" else delta

    expected = rounds(federation, first, down, up, lambda sent, turn: torch.stack(sent).sum(0) / len(sent))
    torch.testing.assert_close(vector(state.params), expected, rtol=1e-5, atol=1e-6)
