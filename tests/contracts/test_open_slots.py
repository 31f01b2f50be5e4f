"""Classes that are not fedlora's, in every slot: from Python, as TOML, by entry points; and classes that lie."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fixtures import strangers
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora import testing
from fedlora.config import digest, parse, resolved, to_toml
from fedlora.config.federated_data import prepare
from fedlora.core import slots
from fedlora.core.errors import CheckpointError, ConfigError, DataError
from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.federation.site.site import Site
from fedlora.population.clients import Clients
from fedlora.population.partitions import PARTITIONS
from fedlora.population.skew import Classes
from fedlora.privacy import PRIVACY
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import CLIENT_OPTIMIZERS, Local
from fedlora.server.aggregate import AGGREGATORS, Mean
from fedlora.server.optimizers import SERVER_OPTIMIZERS
from fedlora.tasks import Prepared
from fedlora.transport import PRECISIONS, SPARSIFIERS, Link
from fedlora.tuning import LORA_INITS, TUNINGS, LoRA

world = pytest.fixture(scope="module")(tiny_world)
SETTINGS: dict[str, Any] = {
    "norm_bound": {"norm": 1.0},
    "top_k": {"density": 0.5},
    "random_k": {"density": 0.5},
    "threshold": {"value": 1e-4},
    "rank_slice": {"rank": 1},
    "central_gaussian": {"clip_norm": 1.0, "noise_multiplier": 0.0},
    "natural": {"column": "owner"},
    "quantity": {"min_examples": 2},
}
CHECKS: dict[str, tuple[Callable[..., None], Any]] = {
    "aggregator": (testing.check_aggregator, AGGREGATORS),
    "sparsify": (testing.check_sparsifier, {k: v for k, v in SPARSIFIERS.items() if k != "rank_slice"}),
    "precision": (testing.check_precision, PRECISIONS),
    "server": (testing.check_server_optimizer, SERVER_OPTIMIZERS),
    "client_optimizer": (testing.check_client_optimizer, CLIENT_OPTIMIZERS),
    "privacy": (testing.check_privacy, PRIVACY),
    "partition": (testing.check_partition, PARTITIONS),
    "lora_init": (testing.check_lora_init, {k: v for k, v in LORA_INITS.items() if k != "svd_of_delta"}),
    "tuning": (testing.check_tuning, {k: v for k, v in TUNINGS.items() if k not in ("peft", "head_only")}),
}
STRANGERS: dict[str, Any] = {
    "aggregator": strangers.MajoritySign(),
    "sparsify": strangers.EveryOther(),
    "precision": strangers.Thousandths(),
    "server": strangers.SignSteps(),
    "client_optimizer": strangers.RmsProp(),
    "privacy": strangers.ClipOnly(),
    "partition": strangers.InTurn(),
    "skew": strangers.Halves(),
    "lora_init": strangers.Eye(),
    "tuning": strangers.SomeBiases(),
}


@pytest.mark.parametrize(
    ("slot", "kind"),
    # other tests train with every value: the checks are shown here on one of each slot that is no default
    [
        pytest.param(slot, kind, marks=[pytest.mark.slow] if number != 1 else [])
        for slot, (_, table) in CHECKS.items()
        for number, kind in enumerate(table)
    ],
)
def test_what_comes_with_fedlora_passes_the_checks(slot: str, kind: str) -> None:
    check, table = CHECKS[slot]
    # adaptive optimisers of the server, and SGD on clients, take more than four rounds with their defaults
    slow = {"learns": False} if slot in ("server", "client_optimizer") else {}
    check(table[kind](**SETTINGS.get(kind, {})), **slow)


@pytest.mark.parametrize("slot", STRANGERS)
def test_a_class_of_ones_own_passes_the_checks(slot: str) -> None:
    check = CHECKS[slot][0] if slot in CHECKS else testing.check_skew
    check(STRANGERS[slot])


def strange(world: Path) -> Any:
    """An experiment with a stranger in every slot that a run has, but privacy, which goes with few others."""
    recipe = Recipe(
        tuning=LoRA(rank=2, init=strangers.Eye()),
        up=Link(sparsify=strangers.EveryOther(), precision=strangers.Thousandths()),
        aggregator=strangers.MajoritySign(step=0.01),
        server=strangers.SignSteps(),
        local=Local(optimizer=strangers.RmsProp(), max_steps=1),
    )
    given = experiment(world)
    return dataclasses.replace(
        given,
        task=strangers.Shouting(),
        data=strangers.Colours(),
        clients=Clients(num=3, per_round=2, partition=strangers.InTurn(), skew=strangers.Halves()),
        phases=(Phase(recipe=recipe, rounds=2),),
    )


def test_strangers_in_all_slots_run_resume_and_predict(world: Path, tmp_path: Path) -> None:
    chosen = strange(world)
    assert parse(tomllib.loads(to_toml(chosen))) == chosen
    fedlora.run(chosen, tmp_path / "run", until=1)
    fedlora.run(chosen, tmp_path / "run")
    text = (tmp_path / "run" / "config.toml").read_text()
    for cls in (strangers.MajoritySign, strangers.Eye, strangers.RmsProp, strangers.InTurn, strangers.Colours):
        assert f'kind = "fixtures.strangers:{cls.__name__}"' in text
        assert f'source = "{slots.digest_of(cls)}"' in text
    assert fedlora.load_run(tmp_path / "run").predict(["all is red here"])


@dataclasses.dataclass(frozen=True)
class Bare(strangers.Colours):
    def load(self) -> Any:
        return super().load().train


@dataclasses.dataclass(frozen=True)
class Wrong(strangers.Halves):
    fault: str

    def classes(self, task: Prepared, seed: int, device: torch.device) -> Any:
        numbers, names = super().classes(task, seed, device)
        faults = {"type": numbers, "number": Classes(numbers + 1, names), "length": Classes(numbers[1:], names)}
        return (faults | {"dtype": Classes(numbers + 0.5, names)})[self.fault]  # type: ignore[arg-type]


def test_what_a_strangers_source_and_skew_return_is_checked(world: Path) -> None:
    given = strange(world)
    with pytest.raises(DataError, match=r"load of the source Bare returned Dataset\("):
        prepare(dataclasses.replace(given, data=Bare()))
    for fault in ("type", "number", "length", "dtype"):
        clients = dataclasses.replace(given.clients, skew=Wrong(fault))
        with pytest.raises(DataError, match=r"classes of the skew Wrong returned .* for each of 48 training rows"):
            prepare(dataclasses.replace(given, clients=clients))


def test_a_subclass_never_passes_as_its_parent() -> None:
    mine = Recipe(aggregator=strangers.HeavierMean())
    found = resolved(fedlora.Experiment(phases=(Phase(recipe=mine),)))["phases"][0]["recipe"]["aggregator"]
    assert found["kind"] == "fixtures.strangers:HeavierMean"
    assert found["weighting"] == Mean().weighting
    whole = [digest(fedlora.Experiment(phases=(Phase(recipe=one),))) for one in (mine, Recipe(aggregator=Mean()))]
    assert whole[0] != whole[1]
    again = parse({"phases": [{"recipe": {"aggregator": found}}]}).phases[0].recipe.aggregator
    assert type(again) is strangers.HeavierMean


def test_another_source_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = strange(world)
    fedlora.run(chosen, tmp_path / "run", until=1)
    monkeypatch.setattr(slots, "digest_of", lambda cls: "another")
    with pytest.raises(ConfigError, match=r"the source of fixtures.strangers:\w+ differs from the one"):
        fedlora.load(tmp_path / "run")
    with pytest.raises((CheckpointError, ConfigError), match="the source of"):
        fedlora.run(chosen, tmp_path / "run")


def test_an_entry_point_names_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("majority", "fixtures.strangers:MajoritySign", "fedlora.aggregator")
    monkeypatch.setattr(slots, "_installed", lambda slot: {point.name: point.value} if slot == "aggregator" else {})
    found = parse({"method": {"kind": "lora", "aggregator": {"kind": "majority", "step": 0.5}}})
    assert found.phases[0].recipe.aggregator == strangers.MajoritySign(step=0.5)
    assert slots.named({"kind": "majority"}) == {"fixtures.strangers:MajoritySign"}


def test_what_a_peer_names_is_found_in_every_slot_and_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        slots, "_installed", lambda slot: {"same": f"{slot}s:Class"} if slot in ("data", "task") else {}
    )
    deep: Any = {"kind": "same"}
    for _ in range(100_000):
        deep = [{"inner": deep}]
    assert slots.named(deep) == {"datas:Class", "tasks:Class"}
    assert slots.named({"a": [{"kind": "x:Y"}], "kind": "mean", "b": {"kind": 3}}) == {"x:Y"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "nowhere.at_all:Rule"}, r"cannot be imported \(No module named 'nowhere'\); install its package"),
        ({"kind": "fixtures.strangers:Nothing"}, "has no attribute 'Nothing'"),
        ({"kind": "fixtures.strangers:Eye"}, "is no Aggregator: derive it from fedlora.parts.Aggregator, and define"),
        ({"kind": "fixtures.strangers:MajoritySign", "step": "long"}, "does not take these settings: step: "),
        ({"kind": "fixtures.strangers:MajoritySign", "stride": 1}, "has no setting 'stride'; known: step"),
        ({"kind": "majority"}, "'majority' is not known"),
        ({"kind": ":"}, "cannot be imported"),
    ],
)
def test_a_class_that_cannot_be_had_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"method": {"kind": "lora", "aggregator": table}})


@pytest.mark.parametrize(("line", "message"), [("x = (", "SyntaxError: "), ("x = y", "NameError: name 'y' is not")])
def test_a_file_with_a_mistake_is_named(tmp_path: Path, monkeypatch: Any, line: str, message: str) -> None:
    (tmp_path / "mistaken.py").write_text(line, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"mistaken cannot be imported \({message}.*\); correct its file"):
        parse({"method": {"kind": "lora", "aggregator": {"kind": "mistaken:Rule"}}})


@dataclasses.dataclass(frozen=True)
class Undeclared(strangers.MajoritySign.__base__):  # type: ignore[misc, name-defined]
    def begin(self, *arguments: Any) -> Any:
        return strangers.Signs(1.0)


def test_a_class_that_lacks_what_its_slot_declares_is_refused() -> None:
    message = r"test_open_slots:Undeclared does not set 'needs', .* add `needs: ClassVar\[Needs\] = ...` to the class"
    with pytest.raises(ConfigError, match=message):
        Recipe(aggregator=Undeclared())
    with pytest.raises(ConfigError, match=message):
        parse({"method": {"kind": "lora", "aggregator": {"kind": "test_open_slots:Undeclared"}}})


def test_values_that_can_change_or_come_from_nowhere_are_refused() -> None:
    @dataclasses.dataclass
    class Loose(strangers.EveryOther.__base__):  # type: ignore[misc, name-defined]
        facts: Any = None

        def choose(self, *arguments: Any) -> Any:
            return {}

    with pytest.raises(ConfigError, match="is not a frozen dataclass"):
        Link(sparsify=Loose())
    made = type("Made", (strangers.MajoritySign,), {"__module__": "__main__"})
    with pytest.raises(ConfigError, match="the source of __main__:Made cannot be read"):
        Recipe(aggregator=made())


@dataclasses.dataclass(frozen=True)
class Taken(strangers.Thousandths):
    code: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(strangers.MajoritySign):
    """Settings that a configuration holds, and some that it cannot."""

    cap: float | None = 0.5
    among: Sequence[int] = (1, 2)
    weights: Any = None
    kind: str = "signs"
    seen: list[int] = dataclasses.field(default_factory=list, init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sourced(strangers.MajoritySign):
    source: str = "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cap": None}, "has cap = None, which a configuration cannot hold: read again, it would be 0.5"),
        ({"kind": "votes"}, "has kind = 'votes', which a configuration cannot hold: read again, it would be 'signs'"),
        ({"step": "long"}, "cannot be written to a configuration and read again: step: input should be a valid number"),
        ({"weights": len}, "cannot be written to a configuration and read again: Unable to serialize"),
    ],
)
def test_settings_that_a_configuration_would_lose_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(aggregator=Settings(**settings))


def test_settings_of_any_plain_type_are_kept() -> None:
    chosen = fedlora.Experiment(phases=(Phase(recipe=Recipe(aggregator=Settings(among=[3], step=1))),))
    found = parse(tomllib.loads(to_toml(chosen)))
    assert found == chosen
    assert digest(found) == digest(chosen)


def test_classes_whose_values_no_configuration_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="has a field source, a name that configurations use"):
        Recipe(aggregator=Sourced())

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Inner(strangers.MajoritySign):
        pass

    with pytest.raises(ConfigError, match="is defined inside a function, where a run that resumes cannot import it"):
        Recipe(aggregator=Inner())


@dataclasses.dataclass(frozen=True)
class Same(strangers.Thousandths):
    pass


def test_a_format_of_ones_own_keeps_its_codes() -> None:
    with pytest.raises(ConfigError, match="formats of your own have codes from 128 to 255"):
        Link(precision=Taken())

    with pytest.raises(ConfigError, match=r"Same and .*Thousandths have the code 200"):
        Link(precision=Same(), head_precision=strangers.Thousandths())


def test_a_site_imports_what_its_owner_listed_alone(tmp_path: Path) -> None:
    site = Site(SiteConfig(name="clinic", rows="rows.csv", state=str(tmp_path)))
    recipe = {"aggregator": {"kind": "fixtures.strangers:MajoritySign"}}
    opening = {"kind": "open", "run": "r", "ticket": "t", "experiment": {"phases": [{"recipe": recipe}]}}
    answer = envelopes.read(site.answer(envelopes.write(opening, {})))
    assert "the class 'fixtures.strangers:MajoritySign' is not accepted here; limits.classes" in answer.head["refused"]
    reply = envelopes.read(site.answer(envelopes.write({"kind": "job", "recipe": recipe}, {})))
    assert "limits.classes" in reply.head["refused"]
    listed = SiteConfig(name="c", rows="r.csv", limits={"classes": ["fixtures.strangers:MajoritySign"]})  # type: ignore[arg-type]
    listed.limits.check_settings(opening)


@dataclasses.dataclass(frozen=True)
class Biased(strangers.EveryOther):
    @property
    def facts(self) -> Any:
        return super().facts._replace(unbiased=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful(strangers.MajoritySign):
    def begin(self, params: Any, schema: Any, store: Any) -> Any:
        CALLS.append(1)
        return strangers.Signs(self.step * len(CALLS))


def test_checks_find_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="is not the input"):
        testing.check_sparsifier(Biased())
    CALLS.clear()
    with pytest.raises(AssertionError):
        testing.check_aggregator(Forgetful())


CALLS: list[int] = []
