"""Start of a phase, and handover to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedlora.client.workspace import Workspace, setup_parts
from fedlora.core.state import PhaseHandover, ServerState, named_seed
from fedlora.core.tree import Tree
from fedlora.recipe import Phase, Recipe
from fedlora.transport import wire
from fedlora.transport.precision import Float32
from fedlora.tuning import Full
from fedlora.tuning.warm_start import read_adapter


def open_phase(
    workspace: Workspace,
    phase: int,
    recipe: Recipe,
    seed: int,
    rounds_done: int,
    carry: PhaseHandover | None,
    adapter: str | None = None,
) -> tuple[ServerState, dict[str, float]]:
    """Starts a phase: the server initialises the parameters and packs the setup message for clients.

    Args:
        workspace: the resident model; it is reloaded.
        phase: number of the phase.
        recipe: its recipe.
        seed: seed of the run.
        rounds_done: rounds finished in earlier phases.
        carry: the result of the previous phase.
        adapter: the folder of an adapter to start from; the initial values that links refer to stay as they were.

    Returns:
        The state before the phase's first round, and the figures of the start.
    """
    installed = workspace.open(phase, recipe)
    start = recipe.tuning.start(installed, named_seed(seed, "start", phase), carry)
    params = start.params
    if adapter is not None:
        params = params | read_adapter(Path(adapter), recipe.tuning, installed, params)
    parts = setup_parts(recipe, installed, start)
    # if everything but the head's start is redrawn from a seed, the head's start is sent in the head's precision
    head = installed.schema.names("head")
    coarse = wire.Form(recipe.down.at(0).head_precision or Float32(), named_seed(seed, "init", phase))
    forms = {"init": coarse} if set(parts.get("init", {})) <= head else {}
    packet = wire.pack(parts, forms) if parts else wire.Packet(b"", {}, {}, {})
    delivered = packet.trees.get("init", {}) if forms else {}
    workspace.apply_setup(phase, recipe, packet.raw)
    state = ServerState(
        phase=phase,
        round=rounds_done,
        params=params,
        init=start.params | delivered,
        schema=installed.schema,
        setup=packet.raw,
        setup_bytes=packet.sizes,
    )
    return state, start.facts


def without_start(state: ServerState, phases: Sequence[Phase]) -> ServerState:
    """The state of full fine-tuning without its initial values, a copy of the model, once nothing reads them any more.

    They are read by links relative to them, by the next phase, and until every group of parameters has moved. An export
    reads them again in the base model.

    Args:
        state: the state after a round.
        phases: the phases of the run.
    """
    recipe, sent = phases[state.phase].recipe, state.schema.sent()
    if not isinstance(recipe.tuning, Full) or len(phases) > 1 or recipe.down.reference == "init" or not state.init:
        return state
    moved = {leaf.group for name, leaf in sent.items() if not torch.equal(state.params[name], state.init[name])}
    return replace(state, init={}) if moved == {leaf.group for leaf in sent.values()} else state


def close_phase(workspace: Workspace, recipe: Recipe, state: ServerState) -> PhaseHandover:
    """The handover of a finished phase to the next one: the change of all phases so far to the pre-trained weights."""
    head, init = state.schema.split(state.params).get("head", {}), state.init
    recipe.tuning.fold(workspace.installed, state.folds)
    own = any(leaf.group == "adapter" and not leaf.factor for leaf in state.schema.values())  # not factors beside it
    if own and (state.phase or not init):  # a later phase starts from what earlier ones changed
        init = init | _pretrained(workspace, state)
    return PhaseHandover(recipe.tuning.changes(workspace.installed, init, state.params), head)


def _pretrained(workspace: Workspace, state: ServerState) -> Tree:
    """The pre-trained values of those parameters that are the model's own or parts of them."""
    model, _ = workspace.task.load_model(named_seed(workspace.seed, "head"), "fp32", torch.device("cpu"))
    named, places = dict(model.named_parameters()), workspace.installed.places
    whole = {name: named[name].detach() for name in state.params if name in named}
    return {name: value.flatten()[places[name].cpu()] if name in places else value for name, value in whole.items()}
