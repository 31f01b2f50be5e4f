"""What a site accepts of a server's settings: endings and lists, no regular expressions, no paths, no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures.fake_transport import Post, shared_sites
from fixtures.tiny import experiment, ledger, tiny_world

import fedlora
from fedlora.core.errors import ConfigError
from fedlora.federation.deploy.federate import federate
from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.server import remote
from fedlora.rounds.checkpoint import load_state
from fedlora.testing import tiny_model
from fedlora.tuning import Bottleneck, LoRA, Peft
from fedlora.tuning.accepted import PEFT_TYPES, objection
from fedlora.tuning.targets import endings, find, shortest_endings

world = pytest.fixture(scope="module")(tiny_world)


@pytest.mark.parametrize(
    "tuning",
    [
        "{kind='lora', rank=2, targets='.*(query|layer.0.output.dense)'}",
        "{kind='peft', config={peft_type='LORA', r=2, target_modules='.*layer.1.*(key|value)'}}",
    ],
)
def test_a_pattern_is_resolved_before_it_is_sent_and_gives_the_same_bits(
    world: Path, tmp_path: Path, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "POLL", 0.001)
    chosen = experiment(world, "bitfit", f"method.tuning={tuning}", "method.memory='init'", rounds=1)
    assert chosen.phases[0].recipe.tuning.has_pattern
    fedlora.run(chosen, tmp_path / "serial")
    post = Post(shared_sites(tmp_path / "sites", 3))
    federate(chosen, tmp_path / "run", post, ServerPolicy())
    assert ledger(tmp_path / "run") == ledger(tmp_path / "serial")
    left, right = (load_state(tmp_path / name / "checkpoints" / "round-000001")[0] for name in ("run", "serial"))
    assert all(torch.equal(left.params[name], right.params[name]) for name in right.params)
    heads = [envelopes.read(raw).head for raw in post.sent]
    assert len(heads) >= 6
    assert all(objection(head) == "" and "(" not in str(head.get("recipe", "")) for head in heads)


def test_endings_are_short_and_select_the_same_modules() -> None:
    model = tiny_model("bert")
    pattern = r".*layer\.\d+\.attention\.self\.(query|value)"
    assert sorted(endings(model, pattern, frozenset())) == ["query", "value"]
    for one in (pattern, r".*layer\.1\..*dense", r".*embeddings.*"):
        found = endings(model, one, frozenset())
        assert find(model, found, frozenset()).keys() == find(model, one, frozenset()).keys()
    with pytest.raises(ConfigError, match="cannot be distinguished from other modules"):
        shortest_endings(["b.c"], ["b.c", "a.b.c"])


def test_bottlenecks_are_resolved_too() -> None:
    tuning = Bottleneck(width=2, targets=r".*layer\.\d+\.output\.dense").without_pattern(tiny_model(), frozenset())
    assert tuning == Bottleneck(width=2, targets=("0.output.dense", "1.output.dense"))
    assert not Bottleneck().has_pattern
    assert not LoRA(targets=("query",)).has_pattern


def lora(**fields: Any) -> dict[str, Any]:
    return {"recipe": {"tuning": {"kind": "peft", "config": {"peft_type": "LORA", **fields}}}}


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({"phases": [{"recipe": {"tuning": {"kind": "lora", "targets": "(a+)+b"}}}]}, "is a regular expression"),
        ({"task": {"kind": "instruction", "answer_pattern": "(x+x+)+y"}}, "is a regular expression"),
        (lora(target_modules="(q|v)"), "target_modules"),
        (lora(target_modules=["q.*"]), "target_modules"),
        (lora(layers_pattern="(a+)+"), "layers_pattern"),
        (lora(rank_pattern={"(a+)+": 3}), "rank_pattern"),
        (lora(megatron_core="evil.code"), "megatron_core"),
        (lora(auto_mapping={"parent_library": "evil"}), "auto_mapping"),
        (lora(base_model_name_or_path="someone/else"), "base_model_name_or_path"),
        (lora(init_lora_weights="/etc/passwd"), "init_lora_weights"),
        (lora(trainable_token_indices=[1]), "trainable_token_indices"),
        ({"kind": "peft", "config": {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "x/y"}}, "peft_type"),
        ({"kind": "peft", "config": {"peft_type": "XLORA", "adapters": {"a": "/tmp"}}}, "peft_type"),
        ({"kind": "peft", "config": None}, "peft_type"),
        ({"kind": "peft", "config": {"peft_type": ["LORA"]}}, "peft_type"),
    ],
)
def test_patterns_paths_and_code_are_not_accepted(document: dict[str, Any], why: str) -> None:
    assert why in objection({"deep": [document]})


def test_what_needs_none_of_these_is_accepted() -> None:
    assert objection(lora(r=4, target_modules=["query", "self.value"], bias="none", init_lora_weights=True)) == ""
    assert objection(lora(target_modules="all-linear", layers_to_transform=[0, 1], init_lora_weights="gaussian")) == ""
    for config in (peft.LoraConfig(r=2, target_modules=["query"]), peft.IA3Config(target_modules=["key"])):
        sent = json.loads(json.dumps(Peft.of(config).config))
        assert objection({"kind": "peft", "config": sent}) == ""
    for kind in PEFT_TYPES:
        assert kind in peft.PeftType.__members__


def test_a_site_refuses_an_opening_and_a_job_with_a_pattern(world: Path, tmp_path: Path) -> None:
    site = shared_sites(tmp_path, 1)["site-0"]
    head = {"kind": "open", "run": "0" * 8, "ticket": "x", "experiment": lora(target_modules="(q|v)")}
    told = envelopes.read(site.answer(envelopes.write(head, {}))).head
    assert "target_modules" in told["refused"]
