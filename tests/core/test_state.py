"""Named seeds, and checkpoints: exact, all or nothing, and honest about damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from fedlora.client.workspace import Workspace
from fedlora.core import tree
from fedlora.core.errors import CheckpointError
from fedlora.core.files import clean
from fedlora.core.schema import Leaf, Schema
from fedlora.core.state import SEED_BITS, ClientState, Fold, ServerState, generator, named_seed
from fedlora.core.store import Memory, Store
from fedlora.core.tree import Tree
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.rounds import checkpoint as module
from fedlora.rounds.checkpoint import load_state, save_state
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.server.optimizers import AdamW
from fedlora.testing import equal_population, schema_of, toy_task
from fedlora.tuning import LoRA, SvdOfWeight


def tensors(seed: int) -> Tree:
    values = torch.Generator().manual_seed(seed)
    return {"z.weight": torch.randn(2, 3, generator=values), "a.bias": torch.randn(3, generator=values)}


def make_state() -> ServerState:
    held = tensors(6)
    return ServerState(
        phase=1,
        round=12,
        params=tensors(0),
        init=tensors(1),
        schema=Schema({"z.weight": Leaf(), "a.bias": Leaf("head")}),
        setup=bytes(range(256)) * 3 + b"\x00",
        setup_bytes={"seed": 14, "envelope": 16},
        steps=5,
        parts=Memory(server=Store({"v": tensors(2), "m": tensors(3)}), clip=Store(values={"norm": 0.1})),
        known={1: Memory(down=Store({"held": held})), 12: Memory(rank=Store(values={"rank": 3}))},
        clients={
            7: ClientState(
                has_setup=True, parts=Memory(optimizer=Store({"state": {"z.weight/step": torch.tensor(4.0)}}))
            ),
            3: ClientState(has_setup=False),
            12: ClientState(parts=Memory(residual=Store({"lost": tensors(5)}), down=Store({"held": held}))),
        },
    )


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit, order included."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, ServerState | ClientState | Store):
        assert_equal(vars(one), vars(other))
    else:
        assert one == other


# ---- seeds


def test_seeds_are_those_of_every_earlier_run() -> None:
    assert named_seed(0, "cohort") == 231960906200305
    assert named_seed(7, "client", 3, 12) == 46246121414034


def test_seeds_fit_their_bits() -> None:
    seeds = [named_seed(0, "noise", round) for round in range(2000)]
    assert min(seeds) >= 0
    assert 2 ** (SEED_BITS - 1) < max(seeds) < 2**SEED_BITS


def test_a_generator_uses_32_bits_of_a_seed() -> None:
    seed = named_seed(0, "noise", 1)
    drawn = [torch.rand(4, generator=generator(one)) for one in (seed, seed % 2**32, seed + 1, seed + 2**32)]
    assert [torch.equal(drawn[0], one) for one in drawn] == [True, True, False, True]


def test_every_run_purpose_round_and_client_has_a_seed_of_its_own() -> None:
    purposes = ("cohort", "client", "noise", "start", "install", "head")
    seeds = {
        named_seed(run, purpose, round, client)
        for run in (0, 1)
        for purpose in purposes
        for round in range(20)
        for client in range(20)
    }
    assert len(seeds) == 2 * len(purposes) * 20 * 20


def test_numbers_do_not_run_into_one_another() -> None:
    assert named_seed(1, "client", 1, 23) != named_seed(1, "client", 12, 3)
    assert named_seed(1, "client", 1) != named_seed(1, "client", 1, 0)


def test_a_generator_starts_at_its_seed_and_leaves_the_global_one() -> None:
    before = torch.get_rng_state()
    one, other = (torch.rand(3, generator=generator(named_seed(0, "x"))) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fold_is_true_if_it_edits_something() -> None:
    assert not Fold()
    assert Fold(dense={"w": torch.zeros(1)})
    assert Fold(factors={"m": (torch.zeros(2, 1), torch.zeros(1, 2))})


# ---- checkpoints


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    save_state(make_state(), tmp_path / "c", {"digest": "abc", "loss": 0.1})
    loaded, facts = load_state(tmp_path / "c")
    assert_equal(loaded, make_state())
    assert facts == {"digest": "abc", "loss": 0.1}


@pytest.mark.parametrize("changes", [{"setup": b"", "setup_bytes": {}}, {"parts": Memory()}, {"clients": {}}], ids=str)
def test_empty_parts_come_back_empty(tmp_path: Path, changes: dict[str, Any]) -> None:
    state = replace(make_state(), **changes)
    save_state(state, tmp_path / "c", {})
    assert_equal(load_state(tmp_path / "c")[0], state)


def test_special_values_and_strides_survive(tmp_path: Path) -> None:
    odd = {
        "z.weight": torch.tensor([[-0.0, 1e-45, 3e38], [1.0, 2.0, 3.0]]).T.contiguous().T,
        "a.bias": torch.arange(6.0)[::2],
    }
    state = replace(make_state(), params=odd)
    save_state(state, tmp_path / "c", {})
    loaded = load_state(tmp_path / "c")[0].params
    assert_equal(loaded, odd)
    assert bool(torch.signbit(loaded["z.weight"])[0, 0])


def test_a_phase_can_be_saved_before_its_first_round(tmp_path: Path) -> None:
    """There ``params`` and ``init`` are the same tensors."""
    state, _ = open_phase(Workspace(toy_task(), 0, torch.device("cpu")), 0, Recipe(tuning=LoRA(rank=2)), 0, 0, None)
    assert state.params["classifier.bias"] is state.init["classifier.bias"]
    save_state(state, tmp_path / "c", {})
    assert_equal(load_state(tmp_path / "c")[0], state)


def test_parameters_that_are_views_of_one_vector_can_be_saved(tmp_path: Path) -> None:
    vector = torch.arange(9.0)
    state = replace(make_state(), params={"z.weight": vector[:6].view(2, 3), "a.bias": vector[6:]})
    save_state(state, tmp_path / "c", {})
    assert_equal(load_state(tmp_path / "c")[0], state)


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    recipe = Recipe(
        tuning=LoRA(rank=2, init=SvdOfWeight()),
        server=AdamW(lr=1e-2, weight_decay=0.0),
        local=Local(batch_size=4, keep_optimizer=True),
        memory="init",
    )

    def engine() -> Serial:
        return Serial(Workspace(toy_task(num_examples=16), 0, torch.device("cpu")), equal_population(16, 2))

    first = engine()
    state, _ = open_phase(first.workspace, 0, recipe, seed=1, rounds_done=0, carry=None)
    state, _ = run_round(recipe, state, (0, 1), first, seed=1, rounds=2)
    save_state(state, tmp_path / "c", {})
    uninterrupted, row = run_round(recipe, state, (1, 0), first, seed=1, rounds=2)
    loaded, _ = load_state(tmp_path / "c")
    second = engine()
    second.workspace.apply_setup(0, recipe, loaded.setup)
    resumed, row_again = run_round(recipe, loaded, (1, 0), second, seed=1, rounds=2)
    assert_equal(resumed, uninterrupted)
    assert (row.loss, row.down_bytes, row.up_bytes) == (row_again.loss, row_again.down_bytes, row_again.up_bytes)


def test_what_several_remember_is_written_once_and_is_one_again(tmp_path: Path) -> None:
    save_state(make_state(), tmp_path / "c", {})
    loaded, _ = load_state(tmp_path / "c")
    assert loaded.known[1].tree("down", "held") is loaded.clients[12].parts.tree("down", "held")
    with safe_open(tmp_path / "c" / "state.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * 6 + 2  # six trees of two tensors, a step, and the setup


def test_a_checkpoint_replaces_the_one_before_it_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save_state(make_state(), tmp_path / "c", {"n": 1})
    (tmp_path / "c" / "stray").touch()
    save_state(replace(make_state(), round=13), tmp_path / "c", {"n": 2})
    loaded, facts = load_state(tmp_path / "c")
    assert (loaded.round, facts) == (13, {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "digests.json",
        "state.json",
        "state.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("rounds.checkpoint.save_file", OSError("disk full")),
        ("rounds.checkpoint.save_file", SafetensorError("disk full")),
        ("core.files._flush", OSError("disk full")),
        ("rounds.checkpoint.save_file", KeyboardInterrupt()),
    ],
    ids=str,
)
def test_a_crash_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    save_state(make_state(), tmp_path / "c", {"n": 1})

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"fedlora.{name}", fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            save_state(replace(make_state(), round=13), tmp_path / "c", {"n": 2})
    loaded, facts = load_state(tmp_path / "c")
    assert_equal(loaded, make_state())
    assert facts == {"n": 1}
    save_state(replace(make_state(), round=14), tmp_path / "c", {})  # what the crash left is in nobody's way
    assert load_state(tmp_path / "c")[0].round == 14


def test_a_crash_between_the_two_renames_leaves_both_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(make_state(), tmp_path / "c", {"n": 1})
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            save_state(make_state(), tmp_path / "c", {"n": 2})
    old = next(tmp_path.glob("c.*.old.tmp"))
    new = next(path for path in tmp_path.glob("c.*.tmp") if path != old)
    assert [load_state(folder)[1]["n"] for folder in (old, new)] == [1, 2]
    clean(tmp_path)
    assert load_state(tmp_path / "c")[1]["n"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no json": lambda folder: (folder / "state.json").unlink(),
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
    "json cut off": lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text()[:-20]),
    "json of another kind": lambda folder: (folder / "state.json").write_text("[]"),
    "json not text": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe\x00"),
    "another format": lambda folder: edit(folder / "state.json", format=1),
    "a part of another kind": lambda folder: edit(folder / "state.json", parts=None),
    "tensors cut off": lambda folder: (folder / "state.safetensors").write_bytes(
        (folder / "state.safetensors").read_bytes()[:-8]
    ),
    "tensors empty": lambda folder: (folder / "state.safetensors").write_bytes(b""),
    "a bit in the header": lambda folder: flip(folder / "state.safetensors", 20),
    "a bit in a value": lambda folder: flip(folder / "state.safetensors", -1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_says_what_to_do(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    save_state(make_state(), tmp_path / "c", {})
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match="resume from the one before it"):
        load_state(tmp_path / "c")


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "nowhere")


# ---- checkpoints of 0.1.0


def of_before(folder: Path, state: ServerState) -> None:
    """A checkpoint as 0.1.0 wrote it, of a run with folds."""
    folder.mkdir()
    trees = {"params": state.params, "init": state.init, "slots/m": tensors(3), "folds/2": {"z": torch.ones(2, 3)}}
    named = {f"{part}/{name}": value for part, one in trees.items() for name, value in one.items()}
    module.save_file(named, folder / "state.safetensors")
    document = {
        "format": 4,
        "digest": module.of_file(folder / "state.safetensors"),
        **{"phase": 1, "round": 12, "steps": 5, "folds": 2, "clip_norm": None, "ranks": {}},
        "order": {"groups": list(state.schema.groups.items()), "slots": ["m"], "setup_bytes": {}},
        "clients": {"7": [True, 2, ""]},
        "facts": {"n": 1},
    }
    (folder / "state.json").write_text(json.dumps(document))


def test_of_a_checkpoint_of_before_the_model_can_be_read(tmp_path: Path) -> None:
    named = {"m.lora_A": torch.ones(2, 3), "m.lora_B": torch.ones(4, 2), "head.weight": torch.ones(3)}
    groups = {name: "head" if "head" in name else "adapter" for name in named}
    state = replace(make_state(), schema=schema_of(groups), params=named, init=tree.scale(named, 2.0))
    of_before(tmp_path / "c", state)
    loaded, facts = load_state(tmp_path / "c")
    assert (loaded.phase, loaded.round, loaded.steps, facts) == (1, 12, 5, {"n": 1})
    assert_equal(loaded.params, state.params)
    assert_equal(loaded.init, state.init)
    assert loaded.schema == state.schema
    assert (loaded.folds.version, list(loaded.folds.total)) == (2, ["z"])
    assert not module.can_go_on(tmp_path / "c")
    save_state(state, tmp_path / "d", {})
    assert module.can_go_on(tmp_path / "d")
