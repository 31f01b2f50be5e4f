"""Where a phase begins and what it hands to the next one."""

from __future__ import annotations

from fedlora.client.workspace import Workspace, setup_parts
from fedlora.core.state import PhaseHandover, ServerState, named_seed
from fedlora.recipe import Recipe
from fedlora.transport import wire
from fedlora.transport.precision import Float32


def open_phase(
    workspace: Workspace, phase: int, recipe: Recipe, seed: int, rounds_done: int, carry: PhaseHandover | None
) -> tuple[ServerState, dict[str, float]]:
    """Starts a phase: the server chooses the first values and announces what clients need to know.

    Args:
        workspace: the resident model; it is loaded anew.
        phase: number of the phase.
        recipe: its recipe.
        seed: seed of the run.
        rounds_done: rounds finished in earlier phases.
        carry: what the phase before learnt.

    Returns:
        The state before the phase's first round, and the start's figures.
    """
    installed = workspace.open(phase, recipe)
    start = recipe.tuning.start(installed, named_seed(seed, "start", phase), carry)
    parts = setup_parts(recipe, installed, start)
    # where the rest of the start is redraw_init from a seed, the head's travels like the head
    head = installed.schema.names("head")
    coarse = wire.Form(recipe.down.at(0).head_precision or Float32(), named_seed(seed, "init", phase))
    forms = {"init": coarse} if set(parts.get("init", {})) <= head else {}
    packet = wire.pack(parts, forms) if parts else wire.Packet(b"", {}, {}, {})
    told = packet.trees.get("init", {}) if forms else {}
    workspace.apply_setup(phase, recipe, packet.raw)
    state = ServerState(
        phase=phase,
        round=rounds_done,
        params=start.params,
        init=start.params | told,
        schema=installed.schema,
        setup=packet.raw,
        setup_bytes=packet.sizes,
    )
    return state, start.facts


def close_phase(workspace: Workspace, recipe: Recipe, state: ServerState) -> PhaseHandover:
    """What a finished phase hands to the next one."""
    head = state.schema.split(state.params).get("head", {})
    recipe.tuning.fold(workspace.installed, state.folds)
    return PhaseHandover(recipe.tuning.changes(workspace.installed, state.init, state.params), head)
