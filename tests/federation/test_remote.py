"""Clients on sites, without a network: the same bits as one process, and what sites may do wrong."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.fake_transport import Post, Told, Trick, shared_sites
from fixtures.malformed_replies import WRONGS
from fixtures.more import some_of
from fixtures.tiny import METHODS, experiment, ledger, make_rows, tiny_world, write_rows

import fedlora
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, prepare
from fedlora.core.errors import ConfigError, QuorumError, WireError
from fedlora.federation.deploy.federate import federate
from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.policies import ServerPolicy, SiteConfig, SitePolicy
from fedlora.federation.protocol.transport import Received
from fedlora.federation.server import probes, remote
from fedlora.federation.site import site as site_module
from fedlora.federation.site.site import Site
from fedlora.rounds.checkpoint import load_state
from fedlora.runs.claim import claimed
from fedlora.runs.folder import RunFolder
from fedlora.runs.result import Result
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.models.fingerprints import base_digest
from fedlora.transport import wire

world = pytest.fixture(scope="module")(tiny_world)
ANY = ServerPolicy()
FEW = ("clients.num=3", "clients.per_round=3", "method.local.max_steps=1")
"""A client on each site, for tests of what a site says."""
FEDAVG = ("method.kind='fedavg'", "method.memory='init'", "method.tuning={kind='lora', rank=4}")
OTHERS = {
    "feedback": (
        "flasc",
        "method.precision={kind='uniform', bits=4}",
        "method.feedback=true",
        "method.memory='last_round'",
    ),
    "optimizer": ("full", *FEDAVG, "method.local.keep_optimizer=true"),
    "folds remembered": ("full", *FEDAVG, "method.aggregator.kind='product_exact'"),
    "folds of unequal ranks": (
        "flora",
        "method.tuning.rank_pattern={value=2}",
        "method.tuning.alpha_pattern={query=8.0}",
    ),
    "dora": ("flasc", "method.tuning.dora=true", "method.memory='last_round'"),
    "tiers": ("lora", "clients.tiers=[{name='weak', share=0.5, rank=1}, {name='strong', share=0.5}]"),
    "private": (
        "full",
        *FEDAVG,
        "method.privacy={kind='central_gaussian', clip_norm=0.5, noise_multiplier=0.1, delta=0.01, seed=3}",
    ),
    "fewer ranks": ("lora", "method.kind='het_lora'"),
}


READY: dict[str, FederatedData] = {}
"""What sites of one experiment prepare, all of them the same, by the experiment's digest."""


def prepared(chosen: Experiment) -> FederatedData:
    key = fedlora.config.digest(chosen)
    if key not in READY:
        READY[key] = prepare(chosen)
    return READY[key]


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL", 0.001)
    monkeypatch.setattr(site_module, "prepare", prepared)


@pytest.fixture
def _seldom(_no_rest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that wait for a deadline: nothing is there to be found more often."""
    monkeypatch.setattr(remote, "POLL", 0.05)


def params(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    state, _ = load_state(newest)
    return {**state.params, **{f"fold {name}": value for name, value in state.folds.total.items()}}


def without_notes(folder: Path) -> list[dict[str, Any]]:
    """The ledger without the first row's warnings: notes about training rows are made only where the rows are."""
    rows = ledger(folder)
    rows[0].pop("warnings")
    return rows


def assert_same(one: Path, other: Path) -> None:
    assert without_notes(one) == without_notes(other)
    left, right = params(one), params(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def tried(
    chosen: Experiment,
    folder: Path,
    trick: Trick | None = None,
    rules: ServerPolicy = ANY,
    **given: Any,
) -> tuple[Result, Post]:
    post = Post(shared_sites(folder / "sites", 3, given.pop("limits", SitePolicy())), trick)
    return federate(chosen, folder / "run", post, rules, **given), post


@pytest.mark.parametrize("method", some_of(METHODS, ("lora", "flasc", "slora", "fedex", "flora", "full", "peft")))
def test_sites_give_the_bits_of_one_process(world: Path, tmp_path: Path, method: str) -> None:
    chosen = experiment(world, method)
    fedlora.run(chosen, tmp_path / "serial")
    tried(chosen, tmp_path)
    assert_same(tmp_path / "run", tmp_path / "serial")


@pytest.mark.parametrize("name", OTHERS)
def test_what_sites_remember_is_what_one_process_remembers(world: Path, tmp_path: Path, name: str) -> None:
    method, *overrides = OTHERS[name]
    chosen = experiment(world, method, *overrides, "clients.per_round=6", rounds=4)
    fedlora.run(chosen, tmp_path / "serial")
    tried(chosen, tmp_path)
    assert_same(tmp_path / "run", tmp_path / "serial")


def test_a_run_and_its_sites_go_on_after_all_processes_are_gone(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, *OTHERS["feedback"], "clients.per_round=6", rounds=4)
    fedlora.run(chosen, tmp_path / "serial")

    def stop(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        if envelopes.read(envelope).head.get("progress", [0])[0] == 2:
            raise KeyboardInterrupt
        return answer

    with pytest.raises(fedlora.runs.experiment.Stopped):
        tried(chosen, tmp_path, stop)
    tried(chosen, tmp_path)  # with new sites over the same folders
    assert_same(tmp_path / "run", tmp_path / "serial")


def test_a_site_that_lost_its_memory_is_told_so_and_told_everything_anew(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, *OTHERS["feedback"], "clients.per_round=9", rounds=4)
    forgot = []

    def forget(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["progress"][0] == 0:
            for file in (tmp_path / "sites" / "site-1").rglob("*.safetensors"):
                file.unlink()
                forgot.append(file)
        return answer

    result, _ = tried(chosen, tmp_path, forget)
    refused = [row.refused for row in result.rows[1:]]
    assert forgot
    assert refused[0] == {}
    assert set(refused[1]) == {"1", "4", "7"}
    assert "no longer here" in refused[1]["1"]
    assert refused[2:] == [{}, {}]


# ---- sites that do what they should not


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_wrong_answer_is_refused_named_and_the_round_goes_on(world: Path, tmp_path: Path, wrong: str) -> None:
    chosen = experiment(world, "lora", *FEW)
    change, why = WRONGS[wrong]
    old: list[bytes] = []

    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["client"] == 1 and answer:
            old.append(answer)
            return change(answer, old) if head["progress"][0] == 1 else answer
        return answer

    result, _ = tried(chosen, tmp_path, trick)
    assert [list(row.refused) for row in result.rows[1:]] == [[], ["1"], []]
    assert re.search(why, result.rows[2].refused["1"])
    assert all(torch.isfinite(value).all() for value in params(tmp_path / "run").values())


@pytest.mark.usefixtures("_seldom")
@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (SitePolicy(tunings=("head_only",)), "tuning 'lora' is not accepted"),
        (SitePolicy(max_steps=0), "steps were requested"),
        (SitePolicy(min_noise=1.0), "noise 0, but 1 is required"),
        (SitePolicy(min_example_noise=1.0), "examples get noise 0"),
    ],
)
def test_a_site_takes_no_part_in_what_it_does_not_accept(
    world: Path, tmp_path: Path, limits: SitePolicy, why: str
) -> None:
    with pytest.raises(QuorumError, match=why):
        tried(experiment(world), tmp_path, limits=limits, rules=ServerPolicy(round_timeout=0.2))


def test_a_job_beyond_a_site_s_limits_is_refused(world: Path, tmp_path: Path) -> None:
    sites = shared_sites(tmp_path / "sites", 3)
    limits = SitePolicy(max_megabytes=0.003)
    sites["site-1"] = Site(replace(sites["site-1"].settings, limits=limits))
    chosen = experiment(world, "lora", "clients.per_round=9")
    result = federate(chosen, tmp_path / "run", Post(sites), ServerPolicy())
    assert all(set(row.refused) == {"1", "4", "7"} for row in result.rows[1:])
    assert "MB, but at most 0.003" in result.rows[1].refused["4"]


# ---- sites that are slow, lost, or few


def test_a_site_that_is_lost_and_comes_back_is_asked_again(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, *OTHERS["feedback"], "clients.per_round=9")
    fedlora.run(chosen, tmp_path / "serial")
    lost: list[bytes] = []

    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | Received | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and name == "site-2" and head["progress"][0] == 1 and len(lost) < 3:
            lost.append(envelope)
            return Received("", None, "its process died", again=True)
        return answer

    result, _ = tried(chosen, tmp_path, trick)
    assert len(lost) == 3
    assert [row.refused for row in result.rows] == [{}] * 4
    assert_same(tmp_path / "run", tmp_path / "serial")


@pytest.mark.parametrize("client", [2, 8])
def test_a_letter_lost_on_the_way_is_sent_again(
    world: Path, tmp_path: Path, client: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of site-2's clients 8 is the last to be asked, so that nothing later is answered but a probe
    monkeypatch.setattr(probes, "FIRST_SILENCE", 0.01)
    chosen = experiment(world, *OTHERS["feedback"], "clients.per_round=9")
    fedlora.run(chosen, tmp_path / "serial")
    lost: list[bytes] = []

    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if not lost and head["kind"] == "job" and head["client"] == client and head["progress"][0] == 1:
            lost.append(envelope)
        return None if envelope in lost else answer

    result, post = tried(chosen, tmp_path, trick)
    assert [(row.refused, row.late) for row in result.rows] == [({}, ())] * 4
    assert_same(tmp_path / "run", tmp_path / "serial")
    again = [raw for raw in post.sent if envelopes.read(raw).head["ticket"] == envelopes.read(lost[0]).head["ticket"]]
    assert len(again) == 2


def test_a_lost_invitation_is_sent_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "FIRST_SILENCE", 0.01)
    lost: list[bytes] = []

    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        if name == "site-1" and not lost:
            lost.append(envelope)
        return None if envelope in lost else answer

    result, post = tried(experiment(world, "lora"), tmp_path, trick, ServerPolicy(min_available=9, round_timeout=30.0))
    assert result.rounds == 3
    assert [envelopes.read(raw).head["kind"] for raw in post.sent].count("open") == 4


def test_a_busy_site_is_probed_ever_more_seldom_and_not_asked_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "FIRST_SILENCE", 0.01)
    looks: list[str] = []

    def busy(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        if name == "site-1" and envelopes.read(envelope).head["kind"] != "open":
            looks.append(name)
        return None if 0 < len(looks) < 500 else answer

    _, post = tried(experiment(world, "lora", "clients.per_round=9"), tmp_path, busy)
    kinds = [envelopes.read(raw).head["kind"] for raw in post.sent]
    assert (kinds.count("open"), kinds.count("job")) == (3, 27)
    assert 2 <= kinds.count("probe") < 50


def test_a_site_that_stays_away_is_left_out_and_not_asked_in_the_next_round(world: Path, tmp_path: Path) -> None:
    post = Post(shared_sites(tmp_path / "sites", 3))

    def leave(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        if envelopes.read(envelope).head.get("progress", [0])[0] == 1:
            post.away.add("site-2")
        return answer

    post.trick = leave
    chosen = experiment(world, "lora", "clients.per_round=9")
    result = federate(chosen, tmp_path / "run", post, ServerPolicy(rejoin_timeout=0.0))
    assert set(result.rows[2].refused) | set(map(str, result.rows[2].late)) <= {"2", "5", "8"}
    assert sorted(result.rows[3].cohort) == [0, 1, 3, 4, 6, 7]


@pytest.mark.usefixtures("_seldom")
def test_a_site_that_is_there_and_takes_no_letters_is_given_up(world: Path, tmp_path: Path) -> None:
    class Closed(Post):
        def send(self, address: int, raw: bytes, seconds: float) -> str | None:
            shut = address == 0 and envelopes.read(raw).head["kind"] == "job"
            return None if shut else super().send(address, raw, seconds)

    chosen = experiment(world, "lora", "clients.per_round=9", rounds=1)
    result = federate(
        chosen, tmp_path / "run", Closed(shared_sites(tmp_path / "sites", 3)), ServerPolicy(rejoin_timeout=0.5)
    )
    assert [set(row.refused) for row in result.rows[1:]] == [{"0", "3", "6"}]


@pytest.mark.usefixtures("_seldom")
def test_who_answers_late_is_dropped_and_told_so(world: Path, tmp_path: Path) -> None:
    told = Told()

    def slow(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        return None if head["kind"] == "job" and head["client"] == 1 else answer

    chosen = experiment(world, "lora", *FEW, rounds=1)
    result, _ = tried(chosen, tmp_path, slow, ServerPolicy(round_timeout=1.5), callbacks=[told])
    assert [row.late for row in result.rows[1:]] == [(1,)]
    assert any("client 1 (site-1) is late" in line for line in told.messages)


def test_the_first_to_answer_count_where_more_are_asked(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "clients.per_round=4", rounds=2)
    result, _ = tried(chosen, tmp_path, rules=ServerPolicy(over_sample=1.5))
    assert [(len(row.cohort), len(row.late)) for row in result.rows[1:]] == [(6, 2), (6, 2)]


def test_a_round_with_too_few_answers_is_tried_again_and_changes_nothing(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "clients.per_round=9")
    fedlora.run(chosen, tmp_path / "serial")
    once: list[str] = []

    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["progress"][0] == 1 and len(once) < 7:
            once.append(name)
            return b"nonsense"
        return answer

    result, _ = tried(chosen, tmp_path, trick, ServerPolicy(min_clients=5))
    assert any("was tried again: 2 of 9 clients answered" in text for text in result.rows[2].warnings)
    left, right = params(tmp_path / "run"), params(tmp_path / "serial")
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_run_ends_with_a_sentence_where_nobody_answers(world: Path, tmp_path: Path) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        return answer if envelopes.read(envelope).head["kind"] == "open" else b"nonsense"

    with pytest.raises(QuorumError, match="0 of 3 clients answered, but 1 are required"):
        tried(experiment(world), tmp_path, trick)


def test_a_deadline_travels_with_a_job(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "clients.per_round=1", "method.local.epochs=100000", rounds=1)
    with pytest.raises(QuorumError, match="out of time"):
        tried(chosen, tmp_path, rules=ServerPolicy(round_timeout=0.5, attempts=1))


# ---- rows of sites' own


def own_sites(world: Path, folder: Path, **settings: Any) -> dict[str, Site]:
    rows = make_rows(72, 0)
    sites = {}
    for number, name in enumerate(("clinic", "hospital", "practice")):
        file = write_rows(folder / f"{name}.jsonl", rows[number * 24 : number * 24 + 24])
        given = {"model": {"path": str(world / "bert")}, "tier": ("weak", "strong")[number % 2], **settings}
        text = {"name": name, "rows": str(file), "state": str(folder / "state" / name), **given}
        sites[name] = Site(remote_config(text))
    return sites


def remote_config(values: dict[str, Any]) -> SiteConfig:
    from fedlora.federation.protocol.policies import parse_as

    return parse_as(SiteConfig, values, Path("site.toml"))


def sites_experiment(world: Path, *overrides: str) -> Experiment:
    return experiment(
        world, "lora", f"data={{kind='sites', test='{world / 'test.jsonl'}'}}", "clients.num=3", *overrides
    )


def test_rows_of_sites_train_as_they_would_here(world: Path, tmp_path: Path) -> None:
    rows = [{**row, "site": "abc"[number // 24]} for number, row in enumerate(make_rows(72, 0))]
    file = write_rows(tmp_path / "all.jsonl", rows)
    natural = experiment(
        world, "lora", f"data.train={file}", "clients.partition={kind='natural', column='site'}", "clients.num=3"
    )
    fedlora.run(natural, tmp_path / "serial")
    post = Post(own_sites(world, tmp_path))
    chosen = replace(sites_experiment(world), root=str(world))
    federate(chosen, tmp_path / "run", post, ServerPolicy(min_clients=3), names=list(post.homes))
    assert without_notes(tmp_path / "run") == without_notes(tmp_path / "serial")
    left, right = params(tmp_path / "run"), params(tmp_path / "serial")
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    # no row of a site is in what it sent or was sent
    assert not any(row["text"].encode() in raw for row in rows for raw in post.sent)
    # nor where anything lies on the server
    assert not any(str(world).encode() in raw for raw in post.sent)


@pytest.mark.parametrize("head", ["model.train_head=false", "model.head=['pooler']"])
def test_what_is_head_is_for_the_server_to_say(world: Path, tmp_path: Path, head: str) -> None:
    file = write_rows(
        tmp_path / "all.jsonl", [{**row, "site": "abc"[n // 24]} for n, row in enumerate(make_rows(72, 0))]
    )
    by_site = ("clients.partition={kind='natural', column='site'}", "clients.num=3", f"data.train={file}")
    pooling = (
        "task={kind='text_classification', pooling='mean'}" if "train" in head else "task.kind=text_classification"
    )
    fedlora.run(experiment(world, "lora", *by_site, head, pooling), tmp_path / "serial")
    post = Post(own_sites(world, tmp_path))
    chosen = sites_experiment(world, head, pooling)
    federate(chosen, tmp_path / "run", post, ServerPolicy(min_clients=3), names=list(post.homes))
    assert_same(tmp_path / "run", tmp_path / "serial")


def test_what_a_site_says_it_is_decides_its_tier(world: Path, tmp_path: Path) -> None:
    tiers = "clients.tiers=[{name='small', values=['weak'], rank=1}, {name='large', values=['strong']}]"
    chosen = sites_experiment(world, tiers, "clients.tier_column=tier")
    post = Post(own_sites(world, tmp_path))
    result = federate(chosen, tmp_path / "run", post, ServerPolicy(min_clients=3), names=list(post.homes))
    assert {name: share["clients"]["num"] for name, share in result.rows[1].tiers.items()} == {"small": 2, "large": 1}


def test_another_pre_trained_model_is_found_out_before_training(world: Path, tmp_path: Path) -> None:
    from fixtures.tiny import save_model

    other = save_model(tmp_path / "other", "distilbert")
    assert base_digest(fedlora.Model(path=str(other))) != base_digest(fedlora.Model(path=str(world / "bert")))
    post = Post(own_sites(world, tmp_path, model={"path": str(other)}))
    with pytest.raises(QuorumError, match="the pre-trained model here"):
        federate(
            sites_experiment(world), tmp_path / "run", post, ServerPolicy(round_timeout=0.5), names=list(post.homes)
        )
    assert not (tmp_path / "run").exists()


def test_a_server_in_a_folder_that_is_in_use_is_refused_before_sites_hear_of_it(world: Path, tmp_path: Path) -> None:
    chosen, heard = experiment(world), []
    post = Post(shared_sites(tmp_path / "sites", 3), lambda name, envelope, answer: heard.append(name) or answer)
    with claimed(RunFolder(tmp_path / "run"), chosen), pytest.raises(ConfigError, match="is in use by process"):
        federate(chosen, tmp_path / "run", post, ANY)
    assert heard == []
    federate(chosen, tmp_path / "run", post, ANY)
    assert heard


def test_a_server_does_not_choose_which_files_a_site_reads(world: Path, tmp_path: Path) -> None:
    post = Post(own_sites(world, tmp_path, model=None))
    with pytest.raises(QuorumError, match=r"set model\.path in the site's file"):
        federate(
            sites_experiment(world), tmp_path / "run", post, ServerPolicy(round_timeout=0.5), names=list(post.homes)
        )


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("clients.num=4",), "clients.num = 4, and 3 sites are registered"),
        (("clients.holdout=0.2",), "sites keep their rows"),
        (("mode=centralised",), "no work for sites"),
    ],
)
def test_what_makes_no_sense_on_sites_is_refused(
    world: Path, tmp_path: Path, overrides: tuple[str, ...], why: str
) -> None:
    post = Post(own_sites(world, tmp_path))
    with pytest.raises(ConfigError, match=why):
        federate(sites_experiment(world, *overrides), tmp_path / "run", post, ServerPolicy(), names=list(post.homes))
    assert not (tmp_path / "run").exists()


def test_a_server_does_not_wait_for_more_clients_than_there_are(world: Path, tmp_path: Path) -> None:
    post = Post(own_sites(world, tmp_path))
    with pytest.raises(ConfigError, match="min_available = 4 clients are waited for, but there are only 3"):
        federate(
            sites_experiment(world),
            tmp_path / "run",
            post,
            ServerPolicy(min_available=4, round_timeout=0.5),
            names=list(post.homes),
        )


def test_a_site_that_refused_is_asked_again_when_it_comes_back(world: Path, tmp_path: Path) -> None:
    class Mended(Post):
        """The owner of a site stops it, corrects its file, and starts it with the same key, so at the same address."""

        stopped = 0.0

        def sites(self) -> Mapping[str, int]:
            if not self.stopped and any(b"is not accepted here" in (each or b"") for each in self.answers.values()):
                self.stopped = time.monotonic()
                self.away.add("site-0")
            elif self.away and time.monotonic() > self.stopped + 0.3:
                self.homes["site-0"] = shared_sites(tmp_path, 3)["site-0"]
                self.away.clear()
            return super().sites()

    homes = shared_sites(tmp_path, 3)
    homes["site-0"] = shared_sites(tmp_path, 3, SitePolicy(tunings=("full",)))["site-0"]
    chosen = experiment(world, "lora", *FEW)
    result = federate(chosen, tmp_path / "run", Mended(homes), ServerPolicy(min_available=3, round_timeout=5.0))
    assert [row.refused for row in result.rows] == [{}] * len(result.rows)


def test_a_site_that_refused_and_restarted_unseen_is_asked_again_later(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unseen(Post):
        """A site refuses twice, and restarts with another file while nobody looks, as it does during a round."""

        def sites(self) -> Mapping[str, int]:
            refusals = [each for each in self.answers.values() if b"is not accepted here" in (each or b"")]
            if len(refusals) == 2:
                self.homes["site-0"] = shared_sites(tmp_path, 3)["site-0"]
            return super().sites()

    monkeypatch.setattr(remote, "ASK_AGAIN", 0.3)
    homes, told = shared_sites(tmp_path, 3), Told()
    homes["site-0"] = shared_sites(tmp_path, 3, SitePolicy(tunings=("full",)))["site-0"]
    rules = ServerPolicy(min_available=3, round_timeout=5.0)
    result = federate(experiment(world, "lora", *FEW), tmp_path / "run", Unseen(homes), rules, callbacks=[told])
    assert [row.refused for row in result.rows] == [{}] * len(result.rows)
    assert sum("is not admitted" in message for message in told.messages) == 1


def test_rows_of_sites_cannot_be_trained_on_here(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedlora serve"):
        fedlora.run(sites_experiment(world), tmp_path / "run")


# ---- messages


def test_a_job_comes_back_from_its_letter(world: Path, tmp_path: Path) -> None:
    _, post = tried(experiment(world, *OTHERS["folds remembered"], "clients.per_round=9", rounds=4), tmp_path)
    jobs = [envelopes.read(raw) for raw in post.sent]
    found = [envelopes.to_job(envelope) for envelope in jobs if envelope.head["kind"] == "job"]
    assert len(found) == 36
    assert {job.fold.version for job in found if job.fold} == {1, 2}
    again = [envelopes.to_job(envelopes.read(envelopes.of_job(job, "ab" * 4, "t", None))) for job in found]
    for one, other in zip(found, again, strict=True):
        assert one._replace(fold=None) == other._replace(fold=None)


@pytest.mark.parametrize("raw", [b"", b"FLL", b"FLL\x01\x02\0\0\0{}", b"FLL\x02\x02\0\0\0{}", b"FLL\x02\x02\0\0\0[]"])
def test_what_is_no_letter_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        envelopes.read(raw)


def test_a_letter_is_as_long_as_it_says() -> None:
    raw = envelopes.write({"kind": "reply"}, {"raw": b"12345"})
    assert envelopes.read(raw).blobs == {"raw": b"12345"}
    with pytest.raises(WireError, match="bytes after its head"):
        envelopes.read(raw + b"6")
    with pytest.raises(WireError, match="bytes after its head"):
        envelopes.read(raw[:-1])
    head = json.dumps({"blobs": {"a": -5, "b": 10}}).encode()
    with pytest.raises(WireError, match="bytes after its head"):
        envelopes.read(envelopes._START.pack(b"FLL", 2, len(head)) + head + b"12345")


def test_a_site_s_file_is_explained_where_it_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text("name = 'a'\nrows = 'rows.csv'\ndelimiter = ';'\nencoding = 'latin-1'\n")
    assert SiteConfig.load(file).reading == Reading(delimiter=";", encoding="latin-1")
    loaded = SiteConfig.load(file)
    assert loaded.rows == str(tmp_path / "rows.csv")
    assert loaded.state == str(tmp_path / "state")
    file.write_text("name = 'a'\nrowz = 'rows.csv'\n")
    with pytest.raises(ConfigError, match="unknown key 'rowz', did you mean 'rows'; known here: name, rows"):
        SiteConfig.load(file)
    file.write_text("name = 'a'\nrows = 'rows.csv'\n[limits]\nmax_stepps = 5\n")
    with pytest.raises(
        ConfigError, match=r"unknown key 'limits\.max_stepps', did you mean 'max_steps'; known here: tun"
    ):
        SiteConfig.load(file)
    file.write_text("name = 'a'\nrows = 'rows.csv'\n[limits]\nmax_steps = 'few'\n")
    with pytest.raises(ConfigError, match=r"limits\.max_steps = 'few': input should be a valid integer"):
        SiteConfig.load(file)
    file.write_text("name = 'a'\nshare = {number = 2, of = 2}\n")
    with pytest.raises(ConfigError, match="number = 2 of 2 sites; sites are numbered from 0 to 1"):
        SiteConfig.load(file)
    file.write_text("name = 'a'\n")
    with pytest.raises(ConfigError, match="give one of them"):
        SiteConfig.load(file)
    file.write_text("name = '../a'\nrows = 'x'\n")
    with pytest.raises(ConfigError, match="name"):
        SiteConfig.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteConfig.load(tmp_path / "none.toml")


# ---- what a review of these halves found


@pytest.mark.parametrize(
    "head",
    [
        b'{"kind": "reply", "blobs": {"a": 1e999}}',
        b'{"kind": "reply", "blobs": {"a": "x"}}',
        b'{"kind": "reply", "blobs": 5}',
    ],
)
def test_numbers_without_bounds_are_no_fault_of_the_server(head: bytes) -> None:
    with pytest.raises(WireError):
        envelopes.read(envelopes._START.pack(b"FLL", 2, len(head)) + head)


def test_a_reply_that_took_for_ever_is_refused(world: Path, tmp_path: Path) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["client"] == 1 and answer:
            told = envelopes.read(answer)
            lengths = json.dumps({name: len(blob) for name, blob in told.blobs.items()})
            text = json.dumps({**told.head, "seconds": 7}).replace('"seconds": 7', '"seconds": 1' + "0" * 400)
            raw = (text[:-1] + f', "blobs": {lengths}}}').encode()
            return envelopes._START.pack(b"FLL", 2, len(raw)) + raw + b"".join(told.blobs.values())
        return answer

    result, _ = tried(experiment(world, "lora", *FEW, rounds=1), tmp_path, trick)
    assert list(result.rows[1].refused) == ["1"]


@pytest.mark.parametrize("sizes", [{"0": 5, "999": 3}, {"0": 10**15}, {"0": -1}, {"-1": 4}, {"0": 1e999}, [3]])
def test_a_site_stands_for_no_clients_that_do_not_exist(world: Path, tmp_path: Path, sizes: Any) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        if envelopes.read(envelope).head["kind"] == "open" and name == "site-0" and answer:
            told = envelopes.read(answer)
            text = json.dumps({**told.head, "sizes": sizes, "blobs": {}}).encode()
            return envelopes._START.pack(b"FLL", 2, len(text)) + text
        return answer

    told = Told()
    result, _ = tried(experiment(world, "lora", *FEW), tmp_path, trick, callbacks=[told])
    assert any("site-0 is not admitted" in line for line in told.messages)
    assert {client for row in result.rows[1:] for client in row.cohort} == {1, 2}


def test_a_site_does_not_speak_for_another(world: Path, tmp_path: Path) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        if envelopes.read(envelope).head["kind"] == "open" and name == "hospital" and answer:
            told = envelopes.read(answer)
            return envelopes.write({**told.head, "sizes": {"0": 24, "1": 24, "2": 24}}, {})
        return answer

    post = Post(own_sites(world, tmp_path), trick)
    told = Told()
    names = list(post.homes)
    result = federate(sites_experiment(world), tmp_path / "run", post, ServerPolicy(), names=names, callbacks=[told])
    assert any("hospital is not admitted: it claims clients that are not its own" in line for line in told.messages)
    assert set(result.rows[1].cohort) == {0, 2}


def test_a_client_counts_no_more_examples_than_it_said_it_has(world: Path, tmp_path: Path) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["client"] == 1 and answer:
            like = wire_template(envelope, tmp_path)
            told = envelopes.read(answer)
            parts = wire.unpack(told.blobs["raw"], like)
            parts["report"]["examples"] = torch.tensor(1e9)
            return envelopes.write(told.head, {"raw": wire.pack(parts, {}).raw})
        return answer

    result, _ = tried(experiment(world, "lora", *FEW, rounds=1), tmp_path, trick)
    assert "it reports training on 1e+09 examples" in result.rows[1].refused["1"]


@pytest.mark.parametrize("below", [60.0, -1.0, 0.5])
def test_one_site_does_not_move_the_clip_of_all(world: Path, tmp_path: Path, below: float) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["client"] == 1 and answer:
            told = envelopes.read(answer)
            parts = wire.unpack(told.blobs["raw"], wire_template(envelope, tmp_path))
            parts["report"]["below"] = torch.tensor(below)
            return envelopes.write(told.head, {"raw": wire.pack(parts, {}).raw})
        return answer

    adapting = OTHERS["private"][-1].replace("seed=3", "seed=3, quantile=0.5")
    chosen = experiment(world, "full", *FEDAVG, adapting, *FEW, rounds=1)
    result, _ = tried(chosen, tmp_path, trick)
    assert "0 or 1" in result.rows[1].refused["1"]


def test_what_a_site_sends_is_clipped_again(world: Path, tmp_path: Path) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["client"] == 1 and answer:
            told = envelopes.read(answer)
            parts = wire.unpack(told.blobs["raw"], wire_template(envelope, tmp_path))
            long = {part: {name: 1e3 * value for name, value in tree.items()} for part, tree in parts.items()}
            return envelopes.write(told.head, {"raw": wire.pack(long | {"report": parts["report"]}, {}).raw})
        return answer

    clip = "method.privacy={kind='central_gaussian', clip_norm=0.5, noise_multiplier=0.0}"
    chosen = experiment(world, "full", *FEDAVG, clip, *FEW, rounds=1)
    result, _ = tried(chosen, tmp_path, trick)
    assert 0 < result.rows[1].update_norm <= 0.5 * (1 + 1e-5)


def wire_template(envelope: bytes, tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of a reply, as the server expects them: what the site's own workspace has."""
    from fedlora.client.jobs import empty_report

    job = envelopes.to_job(envelopes.read(envelope))
    site = Site(replace(shared_sites(tmp_path / "sites", 3)["site-1"].settings))
    site.answer(envelope)
    assert site._run is not None
    installed = site._run.workspace.installed
    like = {name: value.detach() for name, value in installed.parameters.items()}
    return {**installed.schema.split(like), "report": empty_report(job.recipe)}


def test_a_silent_site_holds_nobody_up(world: Path, tmp_path: Path) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        return None if name == "site-2" else answer

    chosen = experiment(world, "lora", "clients.per_round=6")
    result, post = tried(chosen, tmp_path, trick, ServerPolicy(round_timeout=600, min_available=6))
    assert result.rounds == 3
    assert sum(envelopes.read(raw).head["kind"] == "open" for raw in post.sent) == 3


def test_a_site_takes_no_noise_that_the_server_can_take_off_again() -> None:
    seeded = {"noise_multiplier": 1.0, "clip_norm": 1.0, "seed": 3}
    kinds = {seed: recipe_with(example={**seeded, "seed": seed}) for seed in (3, None)}
    limits = SitePolicy(min_example_noise=0.5)
    assert "from a seed known to the server" in limits.refusal(kinds[3], 10)
    assert limits.refusal(kinds[None], 10) == ""
    pending = recipe_with(central={"kind": "central_gaussian", "clip_norm": 1.0, "target_epsilon": 1e9})
    assert SitePolicy(min_noise=0.5).refusal(pending, 10, opening=True) == ""
    assert "gets noise 0" in SitePolicy(min_noise=0.5).refusal(pending, 10)


def recipe_with(example: dict[str, Any] | None = None, central: dict[str, Any] | None = None) -> Any:
    method: dict[str, Any] = {"kind": "fedavg", "local": {}, "aggregator": {"kind": "mean", "weighting": "uniform"}}
    if example:
        method["local"]["example_privacy"] = {name: value for name, value in example.items() if value is not None}
    if central:
        method["privacy"] = central
    return fedlora.config.parse({"method": method}).phases[0].recipe


def test_a_server_hears_nothing_that_quotes_rows(world: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": "SECRET-DIAGNOSIS"} for row in make_rows(24, 0)]
    sites = own_sites(world, tmp_path)
    write_rows(tmp_path / "clinic.jsonl", rows)
    post = Post(sites)
    told = Told()
    federate(sites_experiment(world), tmp_path / "run", post, ServerPolicy(), names=list(post.homes), callbacks=[told])
    assert any("clinic is not admitted" in line for line in told.messages)
    assert not any("SECRET" in line for line in told.messages)
    assert not any(b"SECRET" in answer for answer in post.answers.values() if answer)


def test_a_run_whose_round_needs_all_sites_gets_over_a_lost_memory(world: Path, tmp_path: Path) -> None:
    import shutil

    chosen = experiment(world, *OTHERS["feedback"], "clients.per_round=9", rounds=4)
    forgot = []

    def forget(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["progress"][0] == 1 and name == "site-1" and not forgot:
            shutil.rmtree(tmp_path / "sites" / "site-1")
            forgot.append(name)
        return answer

    result, _ = tried(chosen, tmp_path, forget, ServerPolicy(min_clients=9))
    assert forgot
    assert result.rounds == 4
    assert any("tried again" in text for row in result.rows for text in row.warnings)


def test_an_empty_poisson_draw_ends_no_run(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "clients.sampling=poisson", "clients.per_round=1", rounds=6)
    fedlora.run(chosen, tmp_path / "serial")
    assert any(not row["cohort"] for row in ledger(tmp_path / "serial")[1:])
    tried(chosen, tmp_path)
    assert_same(tmp_path / "run", tmp_path / "serial")


def test_who_is_drawn_under_noise_is_not_replaced(world: Path, tmp_path: Path) -> None:
    post = Post(shared_sites(tmp_path / "sites", 3))
    post.away.add("site-2")
    chosen = experiment(world, *OTHERS["private"], "clients.per_round=6")
    result = federate(chosen, tmp_path / "run", post, ServerPolicy(rejoin_timeout=0.0))
    undisturbed = fedlora.run(chosen, tmp_path / "serial")
    assert [row.cohort for row in result.rows] == [row.cohort for row in undisturbed.rows]


def test_a_job_that_kills_its_site_every_time_is_given_up(world: Path, tmp_path: Path) -> None:
    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | Received | None:
        head = envelopes.read(envelope).head
        if head["kind"] == "job" and head["client"] == 1:
            return Received("", None, "its process died", again=True)
        return answer

    result, post = tried(experiment(world, "lora", *FEW, rounds=1), tmp_path, trick)
    assert result.rows[1].refused == {"1": "site-1: its process died"}
    sent = [envelopes.read(raw).head for raw in post.sent]
    assert sum(head["kind"] == "job" and head["client"] == 1 for head in sent) == remote.TRIES


EXAMPLE_NOISE = (
    "clients.per_round=3",
    "method.local.example_privacy={clip_norm=1.0, noise_multiplier=2.0, delta=1e-5}",
    "method.aggregator={kind='mean', weighting='uniform'}",
)


class Fewer(Post):
    """A site restarts with fewer rows after a number of turns of all sites.

    Args:
        sites: by name.
        turns: the number.
    """

    def __init__(self, sites: Mapping[str, Site], turns: int) -> None:
        super().__init__(sites)
        self.turns = turns

    def collect(self, tickets: Sequence[str]) -> list[Received]:
        done = super().collect(tickets)
        if sum(envelopes.read(each or b"").head["kind"] == "reply" for each in self.answers.values()) == self.turns:
            self.turns = -1
            settings = self.homes["clinic"].settings
            write_rows(Path(str(settings.rows)), make_rows(8, 0))
            self.homes["clinic"] = Site(settings)
        return done


def test_a_site_that_has_fewer_rows_says_so(world: Path, tmp_path: Path) -> None:
    post, told = Fewer(own_sites(world, tmp_path), 3), Told()
    chosen = sites_experiment(world, "clients.per_round=3")
    result = federate(chosen, tmp_path / "run", post, ServerPolicy(), names=list(post.homes), callbacks=[told])
    assert "its number of rows is no longer the one that it reported" in result.rows[2].refused["0"]
    assert "clinic connected with 8 examples of 1 clients" in told.messages
    assert result.rows[3].refused == {}


def test_the_privacy_of_examples_is_accounted_for_the_rows_that_a_site_has(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    post, told = Fewer(own_sites(world, tmp_path), 3), Told()
    chosen = sites_experiment(world, *EXAMPLE_NOISE)
    result = federate(chosen, tmp_path / "run", post, ServerPolicy(), names=list(post.homes), callbacks=[told])
    assert any("clinic is not admitted: it has 8 examples, and had 24 when" in message for message in told.messages)
    assert sorted(result.rows[3].cohort) == [1, 2]


def test_a_resumed_run_accounts_for_the_rows_that_a_site_has(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")

    class Killed(Post):
        def send(self, address: int, raw: bytes, seconds: float) -> str | None:
            if len(self.sent) == 3 + 3:
                raise RuntimeError("killed")
            return super().send(address, raw, seconds)

    chosen, rules = sites_experiment(world, *EXAMPLE_NOISE), ServerPolicy(min_available=3, round_timeout=0.5)
    names = list(own_sites(world, tmp_path))
    with pytest.raises(RuntimeError, match="killed"):
        federate(chosen, tmp_path / "run", Killed(own_sites(world, tmp_path)), rules, names=names)
    post = Post(own_sites(world, tmp_path))
    write_rows(tmp_path / "clinic.jsonl", make_rows(8, 0))
    with pytest.raises(QuorumError, match="it has 8 examples, and had 24 when the run began"):
        federate(chosen, tmp_path / "run", post, rules, names=names)
    write_rows(tmp_path / "clinic.jsonl", make_rows(72, 0)[:24])
    assert (
        federate(chosen, tmp_path / "run", Post(own_sites(world, tmp_path)), rules, names=names).rows[3].refused == {}
    )


@pytest.mark.parametrize(
    ("weighting", "rules", "counts"),
    [
        ("examples", ServerPolicy(min_clients=3), 24),
        ("examples", ServerPolicy(min_clients=3, max_weight=9.0), None),
        ("examples", ServerPolicy(min_clients=3, max_weight=9.0, max_examples=10), 10),
        ("uniform", ServerPolicy(min_clients=3), None),
    ],
)
def test_a_site_does_not_outweigh_the_others_by_its_own_word(
    world: Path, tmp_path: Path, weighting: str, rules: ServerPolicy, counts: int | None
) -> None:
    post = Post(own_sites(world, tmp_path))
    for name, count in zip(sorted(post.homes), (12, 12, 60), strict=True):
        write_rows(Path(str(post.homes[name].settings.rows)), make_rows(count, 5))
    chosen = sites_experiment(world, f"method.aggregator={{kind='mean', weighting='{weighting}'}}")
    result = federate(chosen, tmp_path / "run", post, rules, names=list(post.homes))
    said = [text for text in result.rows[1].warnings if "outweigh" in text]
    assert len(said) == (counts == 24) + 3 * (counts == 10)
    assert counts is None or f"client 2 reports 60 examples and counts for {counts}," in " ".join(said)
    if counts == 10:  # where all count for as much, weights change nothing
        uniform = sites_experiment(world, "method.aggregator={kind='mean', weighting='uniform'}")
        again = Post(own_sites(world, tmp_path, state=str(tmp_path / "again")))
        for name, count in zip(sorted(again.homes), (12, 12, 60), strict=True):
            write_rows(Path(str(again.homes[name].settings.rows)), make_rows(count, 5))
        federate(uniform, tmp_path / "uniform", again, rules, names=list(again.homes))
        left, right = params(tmp_path / "run"), params(tmp_path / "uniform")
        assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)
