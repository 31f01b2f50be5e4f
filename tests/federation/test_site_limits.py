"""What a site does at most, over all runs and restarts, and what it says of messages that it cannot take."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures.fake_transport import Post, shared_sites
from fixtures.malformed_replies import reply_of
from fixtures.tiny import experiment, tiny_world

from fedlora.config.files import read
from fedlora.core.errors import CheckpointError, ConfigError, QuorumError, WireError
from fedlora.federation.deploy.federate import federate
from fedlora.federation.deploy.file_templates import SITE
from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.envelopes import Envelope
from fedlora.federation.protocol.policies import ServerPolicy, SiteConfig, SitePolicy, parse_as
from fedlora.federation.server import remote
from fedlora.federation.server.remote import Remote
from fedlora.federation.site import site as site_module
from fedlora.federation.site import usage
from fedlora.federation.site.site import Site
from fedlora.federation.site.usage import Usage
from fedlora.privacy import CentralGaussian
from fedlora.privacy.accountant import composed_epsilon
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local

world = pytest.fixture(scope="module")(tiny_world)
NOISY = Recipe(local=Local(example_privacy={"clip_norm": 1.0, "noise_multiplier": 2.0}, batch_size=2))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL", 0.001)


# ---- limits over all runs


def test_runs_and_rounds_are_counted_across_restarts(tmp_path: Path) -> None:
    limits = SitePolicy(max_runs=2, max_rounds=3, min_cohort=2)
    for name in ("aaaaaaaa", "aaaaaaaa", "bbbbbbbb"):  # the same run may be opened again
        Usage(tmp_path, limits).open_run(name, 2)
    with pytest.raises(ConfigError, match=r"limit of max_runs = 2 runs is reached; its owner may raise it"):
        Usage(tmp_path, limits).open_run("cccccccc", 2)
    with pytest.raises(ConfigError, match="1 clients are asked in a round, and 2 must be averaged here"):
        Usage(tmp_path, limits).open_run("aaaaaaaa", 1)
    for round in (0, 0, 1, 2):  # a repeated round counts once
        Usage(tmp_path, limits).begin_turn("aaaaaaaa", round, Recipe(), 10, 0)
    with pytest.raises(ConfigError, match="max_rounds = 3 rounds"):
        Usage(tmp_path, limits).begin_turn("aaaaaaaa", 3, Recipe(), 10, 0)


def test_a_server_that_repeats_a_round_for_ever_is_counted(tmp_path: Path) -> None:
    limits = SitePolicy(max_rounds=1)
    for client in (0, 1):  # each client of a site has as many turns
        for _ in range(usage.REPEATS):
            Usage(tmp_path, limits).begin_turn("aaaaaaaa", 0, Recipe(), 10, client)
    with pytest.raises(ConfigError, match="max_rounds = 1 rounds"):
        Usage(tmp_path, limits).begin_turn("aaaaaaaa", 0, Recipe(), 10, 1)


@pytest.mark.parametrize(
    ("limits", "recipe", "why"),
    [
        (SitePolicy(max_epsilon=8.0), "examples", "known to the server"),
        (SitePolicy(min_example_noise=0.5), "examples", "known to the server"),
        (SitePolicy(min_noise=0.5), "clients", "every site is told"),
    ],
)
def test_noise_from_a_seed_protects_nothing_here(limits: SitePolicy, recipe: str, why: str) -> None:
    def noisy(seed: int | None) -> Recipe:
        if recipe == "clients":
            return Recipe(privacy=CentralGaussian(clip_norm=1.0, noise_multiplier=1.0, seed=seed))
        return Recipe(local=Local(example_privacy=ExampleNoise(clip_norm=1.0, noise_multiplier=1.0, seed=seed)))

    assert limits.refusal(noisy(None), 10) == ""
    assert why in limits.refusal(noisy(7), 10)


def test_a_site_s_model_is_found_beside_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path, found in (("m", str(tmp_path / "site" / "m")), ("org/model", "org/model"), ("embedded", "embedded")):
        (tmp_path / "site" / "site.toml").write_text(f'name = "a"\nrows = "r.jsonl"\nmodel = {{ path = "{path}" }}\n')
        chosen = SiteConfig.load(Path("site/site.toml")).model
        assert chosen is not None
        assert chosen.path == found


def test_epsilon_adds_up_over_runs_and_needs_noise(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    one = composed_epsilon([(2.0, 0.2, 5)], usage.DELTA)
    two = composed_epsilon([(2.0, 0.2, 10)], usage.DELTA)
    assert 0 < one < two
    limits = SitePolicy(max_epsilon=two)
    Usage(tmp_path, limits).begin_turn("aaaaaaaa", 0, NOISY, 10, 0)
    Usage(tmp_path, limits).begin_turn("bbbbbbbb", 0, NOISY, 10, 0)
    with pytest.raises(ConfigError, match="max_epsilon = "):
        Usage(tmp_path, limits).begin_turn("bbbbbbbb", 1, NOISY, 10, 0)
    with pytest.raises(ConfigError, match="the recipe adds no noise to examples"):
        Usage(tmp_path, limits).begin_turn("bbbbbbbb", 1, Recipe(), 10, 0)


def test_bytes_are_counted_by_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SitePolicy(max_megabytes_per_day=1.0)
    Usage(tmp_path, limits).add_bytes(600_000)
    with pytest.raises(ConfigError, match="max_megabytes_per_day = 1 MB"):
        Usage(tmp_path, limits).add_bytes(600_000)
    monkeypatch.setattr(time, "strftime", lambda form, when: "2100-01-01")
    Usage(tmp_path, limits).add_bytes(600_000)


def test_a_damaged_count_allows_nothing_and_no_limit_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / usage.FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="so no job is accepted"):
        Usage(tmp_path, SitePolicy(max_runs=1)).open_run("aaaaaaaa", 2)
    free = Usage(tmp_path / "other", SitePolicy())
    free.open_run("aaaaaaaa", 1)
    free.begin_turn("aaaaaaaa", 0, Recipe(), 10, 0)
    free.add_bytes(10)
    free.begin_work("t")
    assert not (tmp_path / "other").exists()


def test_work_that_ended_the_process_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SitePolicy(max_seconds=60.0)
    Usage(tmp_path, limits).begin_work("t")
    Usage(tmp_path, limits).begin_work("t")  # after another cause, soon
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(ConfigError, match="it took longer than max_seconds = 60"):
        Usage(tmp_path, limits).begin_work("t")
    Usage(tmp_path, limits).begin_work("u")


def test_work_that_was_done_is_done_again_however_late_its_reply_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = shared_sites(tmp_path, 1, SitePolicy(max_seconds=60.0))["site-0"]
    late = time.time() + 61
    with site._limited(Envelope({"ticket": "t"}, {})):
        pass
    monkeypatch.setattr(time, "time", lambda: late)
    with site._limited(Envelope({"ticket": "t"}, {})):
        pass


def test_a_run_on_sites_stops_at_their_limits_with_their_sentence(world: Path, tmp_path: Path) -> None:
    sites = shared_sites(tmp_path / "sites", 3, SitePolicy(max_rounds=2, max_seconds=600.0, max_megabytes_per_day=50.0))
    chosen = experiment(world, "head_only", "clients.per_round=9")
    with pytest.raises(QuorumError, match=r"0 of 9 clients answered.*max_rounds = 2 rounds is reached"):
        federate(chosen, tmp_path / "run", Post(sites), ServerPolicy(attempts=1))
    held = json.loads((tmp_path / "sites" / "site-0" / usage.FILE).read_text())
    assert held["rounds"] == 2
    assert held["bytes"] > 1000
    few = shared_sites(tmp_path / "few", 3, SitePolicy(min_cohort=10))
    with pytest.raises(QuorumError, match="9 clients are asked in a round, and 10 must be averaged here"):
        federate(chosen, tmp_path / "other", Post(few), ServerPolicy(round_timeout=0.5))


def test_a_watchdog_ends_a_process_that_hangs_in_a_regular_expression() -> None:
    code = (
        "import re\nfrom fedlora.federation.site import watchdog\nwatchdog.GRACE = 0.0\n"
        "with watchdog.time_limit(None): pass\n"
        "with watchdog.time_limit(5.0): pass\n"
        "with watchdog.time_limit(0.5): re.fullmatch('(a+)+b', 'a' * 60)\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert time.monotonic() - begun < 50


def test_a_turn_ends_at_the_site_s_own_time_limit(world: Path, tmp_path: Path) -> None:
    sites = shared_sites(tmp_path / "sites", 3)
    sites["site-1"] = Site(replace(sites["site-1"].settings, limits=SitePolicy(max_seconds=1e-6)))
    chosen = experiment(world, "head_only", "clients.per_round=9", rounds=1)
    result = federate(chosen, tmp_path / "run", Post(sites), ServerPolicy())
    assert set(result.rows[1].late) == {1, 4, 7}


def test_memory_that_runs_out_is_a_refusal_with_its_remedy(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = site_module.run_job

    def full(job: Any, *arguments: Any) -> Any:
        if job.client == 4:
            raise MemoryError("13 GB")
        return real(job, *arguments)

    monkeypatch.setattr(site_module, "run_job", full)
    chosen = experiment(world, "head_only", "clients.per_round=9", rounds=1)
    result = federate(chosen, tmp_path / "run", Post(shared_sites(tmp_path / "sites", 3)), ServerPolicy())
    assert list(result.rows[1].refused) == ["4"]
    assert "memory ran out (13 GB): lower method.local.batch_size" in result.rows[1].refused["4"]


def test_the_site_file_that_init_writes_has_limits_switched_on(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE.format(name="clinic"))
    limits = parse_as(SiteConfig, read(tmp_path / "site.toml").values, tmp_path).limits
    on = (limits.tunings, limits.max_megabytes, limits.max_steps, limits.max_seconds, limits.min_cohort)
    assert None not in (*on, limits.max_runs, limits.max_rounds, limits.max_megabytes_per_day)


# ---- messages


@pytest.mark.parametrize(
    "raw",
    [
        envelopes.write({"kind": "probe", "ticket": "t" * 600_000}, {}),
        envelopes.write({"kind": "open", "ticket": "t", "more": "m" * 600_000}, {}),
        envelopes.write({"kind": "job", "ticket": "t", "more": "m" * 600_000}, {}),
        envelopes.write({"kind": "other" * 120_000}, {}),
        b"garbage" * 90_000,
    ],
)
def test_each_message_counts_whatever_it_holds(tmp_path: Path, raw: bytes) -> None:
    site = shared_sites(tmp_path, 1, SitePolicy(max_megabytes_per_day=1.0))["site-0"]
    for _ in range(2):
        with contextlib.suppress(WireError):
            site.answer(raw)
    opening = envelopes.write({"kind": "open", "run": "0" * 8, "ticket": "t"}, {})
    assert "max_megabytes_per_day = 1 MB is reached" in envelopes.read(site.answer(opening)).head["refused"]
    probe = envelopes.write({"kind": "probe", "ticket": "t"}, {})
    assert envelopes.read(site.answer(probe)).head == {"kind": "probed"}


def twice(raw: bytes) -> bytes:
    """The message with its first key a second time."""
    head = raw[8 : 8 + int.from_bytes(raw[4:8], "little")]
    more = b'{"kind": "x", ' + head[1:]
    return raw[:4] + len(more).to_bytes(4, "little") + more + raw[8 + len(head) :]


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ({}, "an opening cannot be read (KeyError"),
        ({"experiment": 7, "base": ""}, "an opening cannot be read"),
        ({"experiment": {"clients": []}, "base": ""}, "clients"),
        ({"experiment": {}, "more": 1}, "a message of the kind 'open' has the unknown key 'more'"),
    ],
)
def test_a_malformed_opening_gets_a_sentence(tmp_path: Path, head: dict[str, Any], why: str) -> None:
    site = shared_sites(tmp_path, 1)["site-0"]
    raw = envelopes.write({"kind": "open", "run": "0" * 8, "ticket": "t", **head}, {})
    told = envelopes.read(site.answer(raw)).head
    assert told["refused"].startswith("site-0: ")
    assert why in told["refused"]
    assert (told["kind"], told["ticket"]) == ("opened", "t")


def test_a_malformed_job_gets_a_sentence(tmp_path: Path) -> None:
    site = shared_sites(tmp_path, 1)["site-0"]
    for head, blobs, why in (
        ({}, {}, "a job cannot be read"),
        ({"more": 1}, {}, "the unknown key 'more'"),
        ({}, {"other": b""}, "the unknown key 'other'"),
    ):
        told = envelopes.read(site.answer(envelopes.write({"kind": "job", "ticket": "t", **head}, blobs))).head
        assert (told["kind"], told["ticket"]) == ("reply", "t")
        assert why in told["refused"]


def test_a_key_that_is_there_twice_is_refused_on_both_sides() -> None:
    raw = envelopes.write({"kind": "probe", "more": {}}, {})
    with pytest.raises(WireError, match="has the key 'kind' twice"):
        envelopes.read(twice(raw))
    with pytest.raises(WireError, match="unknown key 'x'"):
        envelopes.check_keys(Envelope({"kind": "opened", "x": 1}, {}), "opened")


def unknown(answer: bytes) -> bytes:
    return reply_of(answer, more=1)


@pytest.mark.parametrize(("change", "why"), [(twice, "has the key 'kind' twice"), (unknown, "the unknown key 'more'")])
def test_a_server_names_unknown_and_repeated_keys_and_counts_the_bytes(
    world: Path, tmp_path: Path, change: Callable[[bytes], bytes], why: str
) -> None:
    sizes = []

    def trick(name: str, envelope: bytes, answer: bytes | None) -> bytes | None:
        if envelopes.read(envelope).head["kind"] == "job" and name == "site-1" and answer:
            sizes.append(len(change(answer)))
            return change(answer)
        return answer

    chosen = experiment(world, "head_only", "clients.num=3", rounds=1)
    result = federate(chosen, tmp_path / "run", Post(shared_sites(tmp_path / "s", 3), trick), ServerPolicy())
    assert why in result.rows[1].refused["1"]
    assert result.rows[1].up_bytes["refused"] == sizes[0]


def test_a_round_waits_for_a_multiple_of_the_longest_turn() -> None:
    served = Remote(Post({}), ServerPolicy(), "0" * 8)
    assert served.round_timeout == 3600.0
    served._longest = 1.0
    assert served.round_timeout == 600.0
    served._longest = 200.0
    assert served.round_timeout == 2000.0
    assert Remote(Post({}), ServerPolicy(round_timeout=7.0), "0" * 8).round_timeout == 7.0


def test_turns_are_measured(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SHORTEST_TIMEOUT", 0.0)
    seen: list[float] = []

    class Watched(Post):
        def send(self, address: int, raw: bytes, seconds: float) -> str | None:
            seen.append(seconds)
            return super().send(address, raw, seconds)

    chosen = experiment(world, "head_only", rounds=2)
    federate(chosen, tmp_path / "run", Watched(shared_sites(tmp_path / "s", 3)), ServerPolicy())
    assert max(seen) > 3000
    assert seen[-1] < 3000
