"""Training that moves nothing: a client's first gradient may be zero, a whole cohort's may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora.client import turn
from fedlora.client.jobs import Job, Reply
from fedlora.client.training import LocalResult, Ready, check_trained
from fedlora.core.errors import TrainingError
from fedlora.core.state import ClientState
from fedlora.core.tree import Tree
from fedlora.federation.protocol import envelopes

world = pytest.fixture(scope="module")(tiny_world)
PLAIN, ONE_STEP = ("method.reference='zero'", "method.down=0.03"), "method.local.max_steps=1"


def test_a_cohort_under_a_head_of_zeros_is_told_the_reason(world: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        fedlora.run(experiment(world, "flasc", *PLAIN, ONE_STEP, rounds=1), tmp_path)
    assert str(error.value) == (
        "all 3 clients of a round took steps and their adapter did not move, so nothing would be learnt: the "
        "downlink's top-k left the whole head out, and no gradient passes through a head of zeros; set "
        "quota.head = 1.0 (of down.sparsify) to keep it, or take several local steps"
    )


def test_the_remedies_named_are_remedies(world: Path, tmp_path: Path) -> None:
    more = "method.local.epochs=3"
    assert fedlora.run(experiment(world, "flasc", *PLAIN, more, rounds=1), tmp_path / "more").rounds == 1
    kept = "method.quota={head=1.0}"
    assert fedlora.run(experiment(world, "flasc", *PLAIN, ONE_STEP, kept, rounds=1), tmp_path / "kept").rounds == 1


def test_an_adapter_that_moved_before_and_is_left_out_later_is_a_warning(world: Path, tmp_path: Path) -> None:
    links = ("method.reference='zero'", "method.down=1.0", "method.decay=1e-9", "method.quota={head=1.0}")
    rows = fedlora.run(experiment(world, "flasc", *links, ONE_STEP, rounds=2), tmp_path).rows
    assert not any("did not move" in text for text in rows[1].warnings)
    told = [text for text in rows[2].warnings if "did not move" in text]
    assert told == [
        "all 3 clients of a round took steps and their adapter did not move: the downlink's top-k left the whole "
        "adapter out, and no gradient passes through factors of zeros; raise the density of down.sparsify, or set "
        "quota.B (of down.sparsify)"
    ]


def test_another_reason(world: Path, tmp_path: Path) -> None:
    still = "method.local.optimizer={kind='sgd', lr=1e-45}"
    with pytest.raises(TrainingError, match=r"all 3 clients .* did not move.*: check the targets, the learning rate"):
        fedlora.run(experiment(world, "lora", still, rounds=1), tmp_path)


def test_an_adapter_that_moved_before_and_stands_still_has_diverged(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def check(ready: Ready, trained: LocalResult, delta: Tree) -> tuple[str, ...]:
        seen.append(ready.job.client)
        return check_trained(ready, trained, delta) if len(seen) <= 3 else ("adapter",)

    monkeypatch.setattr(turn, "check_trained", check)
    rows = fedlora.run(experiment(world, "lora", rounds=2), tmp_path).rows
    told = [text for text in rows[2].warnings if "did not move" in text]
    assert len(told) == 1
    assert told[0].endswith(
        "it did before, so the model has probably diverged; lower the learning rates of clients and server (on "
        "convolutions, to a tenth)"
    )


def test_one_client_that_does_not_move_stops_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def check(ready: Ready, trained: LocalResult, delta: Tree) -> tuple[str, ...]:
        seen.append(ready.job.client)
        return ("adapter",) if len(seen) == 1 else check_trained(ready, trained, delta)

    monkeypatch.setattr(turn, "check_trained", check)
    assert fedlora.run(experiment(world, rounds=1), tmp_path).rounds == 1
    assert len(seen) == 3


def test_a_site_reports_what_did_not_move(world: Path) -> None:
    head = {"run": "r", "ticket": "t", "client": 0, "progress": [0, 1]}
    recipe = experiment(world).phases[0].recipe
    job = Job(recipe, 0, 0, 0, (0, 1), 0, "fp32", b"", None, None, ClientState())
    asked = envelopes.Envelope({"kind": "job", **head}, {})
    for unmoved in ((), ("adapter",), ("adapter", "head")):
        raw = envelopes.of_reply(Reply(b"raw", ClientState(), 1.0, unmoved=unmoved), asked)
        assert (b"unmoved" in raw) == bool(unmoved)
        assert envelopes.to_reply(envelopes.read(raw), job, "r", "t").unmoved == unmoved
    for said in ("adapter", {"adapter": 1}, ["another", 3, None], 7):
        reply = {"kind": "reply", **head, "seconds": 1.0, "refused": "", "lost": False, "kept": "", "unmoved": said}
        assert envelopes.to_reply(envelopes.Envelope(reply, {"raw": b""}), job, "r", "t").unmoved == ()
