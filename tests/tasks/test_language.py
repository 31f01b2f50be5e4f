"""Language modelling: blocks and packing by hand, the model and its head, federated runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fixtures.shared import shared
from fixtures.tiny import LOCAL, save_model, write_rows
from fixtures.tiny_language import (
    BOS,
    CPU,
    EOS,
    METHODS,
    PAD,
    TEXTS,
    WORDS,
    ids,
    language_world,
    model_of,
    peft_agrees,
    prepare,
    save_language_model,
    targets,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fedlora
from fedlora import config
from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import CausalLM, Files, Model

world = pytest.fixture(scope="module")(language_world)


# ---- blocks


def test_a_text_is_cut_into_blocks_that_share_one_token(world: Path) -> None:
    batch = prepare(world, block_size=4).batch(np.array([0]), CPU)
    whole = [BOS, *ids(TEXTS[0]), EOS]
    assert batch["input_ids"].tolist() == [whole[:4], whole[3:7], whole[6:10], [*whole[9:11], PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 4] * 3 + [[1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, *whole[1:4]],
        [-100, *whole[4:7]],
        [-100, *whole[7:10]],
        [-100, whole[10], -100, -100],
    ]


@pytest.mark.parametrize("block_size", [2, 3, 5, 11, 12, 32])
@pytest.mark.parametrize("packing", [False, True])
def test_every_token_but_the_first_is_asked_for_once(world: Path, block_size: int, packing: bool) -> None:
    task = prepare(world, block_size=block_size, packing=packing)
    batch = task.batch(np.arange(4), CPU)
    assert targets(batch) == sorted(token for text in TEXTS[:4] for token in [*ids(text), EOS])
    assert batch["input_ids"].shape[1] <= block_size
    assert (batch["attention_mask"].sum(1) >= 2).all()


def test_all_blocks_of_an_example_come_in_the_order_of_the_rows(world: Path) -> None:
    task = prepare(world, block_size=4)
    batch = task.batch(np.array([1, 0, 3]), CPU)
    assert batch["input_ids"][:, 0].tolist() == [BOS, BOS, *(ids(TEXTS[0])[place] for place in (2, 5, 8)), BOS]


def test_the_end_of_a_text_is_learnt_unless_it_is_not_wanted(world: Path) -> None:
    with_end = prepare(world).batch(np.array([3]), CPU)
    without = prepare(world, end_of_text=False).batch(np.array([3]), CPU)
    assert with_end["labels"].tolist() == [[-100, *ids("w13 w14"), EOS, *[-100] * 4]]
    assert without["labels"].tolist() == [[-100, *ids("w13 w14"), *[-100] * 5]]


def test_an_end_that_the_tokenizer_puts_there_is_not_doubled(world: Path) -> None:
    save_language_model(world / "ending", adds="<s> $A </s>")
    assert targets(prepare(world, "ending").batch(np.array([3]), CPU)) == sorted([*ids("w13 w14"), EOS])


def test_texts_with_nothing_to_predict_are_left_out_and_told_of(world: Path) -> None:
    save_language_model(world / "bare", adds="$A")
    task = prepare(world, "bare", end_of_text=False)
    assert task.num_examples("train") == len(TEXTS) - 1
    assert task.texts("train")[:2] == [TEXTS[0], TEXTS[2]]
    assert task.labels.tolist() == [0] * (len(TEXTS) - 1)
    assert task.column("speaker", "train").tolist()[:3] == ["s0", "s2", "s3"]
    assert task.batch(np.array([1]), CPU)["input_ids"][0, :3].tolist() == ids("w10 w11 w12")
    with torch.no_grad():
        found = task.evaluate(model_of(task), np.arange(3), "test", CPU)
    assert found.warnings == (
        "1 of 16 train rows have fewer than two tokens and are left out",
        "1 of 6 test rows have fewer than two tokens and are left out",
    )


def test_data_without_anything_to_predict_are_refused(world: Path, tmp_path: Path) -> None:
    save_language_model(world / "bare", adds="$A")
    short = write_rows(tmp_path / "short.jsonl", [{"text": "w1"}, {"text": ""}])
    with pytest.raises(DataError, match="all 2 train rows have fewer than two tokens, so nothing can be learnt"):
        prepare(world, "bare", short, end_of_text=False)


def test_an_empty_text_is_a_begin_and_an_end(world: Path, tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [{"text": ""}])
    batch = prepare(world, source=empty).batch(np.array([0]), CPU)
    assert batch["labels"].tolist() == [[-100, EOS, *[-100] * 6]]


# ---- packing


def test_sequences_are_joined_into_full_blocks(world: Path) -> None:
    # with begin and end they have 11, 3, 5 and 4 tokens
    batch = prepare(world, block_size=12, packing=True).batch(np.arange(4), CPU)
    whole, one, three, two = ([BOS, *ids(text), EOS] for text in TEXTS[:4])
    assert batch["input_ids"].tolist() == [[*whole, PAD], [*three, *two, *one]]
    # the begin of a text is never asked for, nor is attention told where texts meet
    asked = [-100, *three[1:], -100, *two[1:], -100, *one[1:]]
    assert batch["labels"].tolist() == [[-100, *whole[1:], -100], asked]
    assert batch["attention_mask"].tolist() == [[1] * 11 + [0], [1] * 12]


def test_packing_spares_padding(world: Path) -> None:
    rows = np.arange(len(TEXTS))
    sizes = [
        prepare(world, block_size=32, packing=packing).batch(rows, CPU)["input_ids"].numel()
        for packing in (False, True)
    ]
    assert sizes[1] < sizes[0] * 0.7


# ---- the model


def test_a_pre_trained_last_matrix_is_no_head(world: Path) -> None:
    model, head = prepare(world).load_model(0, "fp32", CPU)
    assert "lm_head.weight" in dict(model.named_parameters())
    assert head == frozenset()


def test_a_last_matrix_that_is_the_embedding_is_no_head_either(world: Path) -> None:
    save_language_model(world / "gpt2", "gpt2")
    assert prepare(world, "gpt2").load_model(0, "fp32", CPU)[1] == frozenset()


def test_what_the_checkpoint_lacks_is_the_head_and_starts_from_the_seed(world: Path, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    task = CausalLM().restore(Model(path=str(folder)), [])
    loaded = [task.load_model(seed, "fp32", CPU) for seed in (0, 0, 1)]
    assert [head for _, head in loaded] == [{"lm_head.weight"}] * 3
    first, again, other = (model.get_parameter("lm_head.weight") for model, _ in loaded)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_blocks_longer_than_the_model_reads_are_refused(world: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "long.jsonl", [{"text": " ".join(["w1"] * 60)}])
    with pytest.raises(
        ConfigError,
        match=r"sequences of 62 tokens, but .*llama' reads 32 at most: set task.max_length .or task.block_size. = 32",
    ):
        prepare(world, source=rows, block_size=100).load_model(0, "fp32", CPU)
    prepare(world, source=rows, block_size=32).load_model(0, "fp32", CPU)
    prepare(world, block_size=100).load_model(0, "fp32", CPU)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(tmp_path: Path) -> None:
    task = CausalLM().restore(Model(path=str(save_model(tmp_path / "bert"))), [])
    with pytest.raises(ConfigError, match="sees the tokens that it is to predict, as encoders such as BERT do"):
        task.load_model(0, "fp32", CPU)


def test_the_second_time_nothing_is_tokenised(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    first = prepare(world, block_size=6).batch(np.arange(5), CPU)
    made = len(list((tmp_path / "tokens").iterdir()))
    monkeypatch.setattr("fedlora.tasks.lm.language._tokenise", None)
    again = prepare(world, block_size=6).batch(np.arange(5), CPU)
    assert made == 2
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(TypeError):
        prepare(world, block_size=7)
    with pytest.raises(TypeError):
        prepare(world, block_size=6, end_of_text=False)


@pytest.mark.parametrize("packing", [False, True])
def test_embeddings_are_means_over_blocks(world: Path, packing: bool) -> None:
    task = prepare(world, block_size=4, packing=packing)
    found = task.embeddings("test", CPU)
    model = model_of(task)
    assert found.shape == (6, 32)
    with torch.no_grad():
        for row in (0, 1):
            tokens = [BOS, *ids(TEXTS[row]), EOS]
            blocks = [tokens[first : first + 4] for first in range(0, len(tokens) - 1, 3)]
            means = [model.model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in blocks]  # type: ignore
            np.testing.assert_allclose(found[row], torch.stack(means).mean(0).numpy(), atol=1e-5)


# ---- whole runs


def document(world: Path, method: str, **task: Any) -> dict[str, Any]:
    return {
        "label": method,
        "model": {"path": str(world / "llama")},
        "task": {"kind": "causal_lm", "block_size": 6, "max_new_tokens": 4, **task},
        "data": {"kind": "files", "train": str(world / "texts.jsonl"), "test": str(world / "test.jsonl")},
        "clients": {"per_round": 2, "partition": {"kind": "natural", "column": "speaker"}},
        "evaluate": {"every": 1},
        "method": {**METHODS[method], "rank": 4, "alpha": 12.0, "rounds": 2, "local": LOCAL},
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("method", ["flasc", "federa"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_federated_run_learns_and_is_exported(world: Path, tmp_path: Path, method: str, packing: bool) -> None:
    result = fedlora.run(config.parse(document(world, method, packing=packing)), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert result.main_metric == "accuracy"
    # where there is no head, none travels
    assert "head" not in {**result.down_bytes, **result.up_bytes}
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    assert not settings["modules_to_save"]
    peft_agrees(tmp_path / "run", world / "llama")
    trained = fedlora.load_run(tmp_path / "run")
    assert trained.evaluate(world / "test.jsonl").metrics["loss"] == pytest.approx(result.after["loss"], abs=1e-4)
    assert set(trained.predict(["w1 w2"])[0]) == {"continuation"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_pre_trained_module_may_be_head(world: Path, tmp_path: Path) -> None:
    chosen = document(world, "flasc")
    chosen["model"]["head"] = ["model.norm"]
    result = fedlora.run(config.parse(chosen), tmp_path / "run")
    assert result.up_bytes["head"] > 0
    peft_agrees(tmp_path / "run", world / "llama")
    chosen["model"]["train_head"] = False
    assert "head" not in fedlora.run(config.parse(chosen), tmp_path / "frozen").up_bytes
    peft_agrees(tmp_path / "frozen", world / "llama")


@pytest.mark.parametrize(
    "method",
    [
        {
            "kind": "slora",
            "rank": 4,
            "density": 0.2,
            "warm_rounds": 1,
            "rounds": 2,
            "local": LOCAL,
            "warm_local": LOCAL,
        },
        {"kind": "full", "rounds": 2, "local": LOCAL},
        {"kind": "lora", "rank": 4, "rounds": 2, "local": {**LOCAL, "compute": "bf16"}},
    ],
    ids=["slora", "full", "bf16"],
)
def test_other_methods_run_without_a_head(world: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    result = fedlora.run(config.parse({**document(world, "lora"), "method": method}), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert "head" not in {**result.down_bytes, **result.up_bytes}
    assert set(fedlora.load_run(tmp_path / "run").predict(["w1 w2"])[0]) == {"continuation"}


def test_a_merged_model_needs_nothing(world: Path, tmp_path: Path) -> None:
    fedlora.run(config.parse(document(world, "federa")), tmp_path / "run")
    trained = fedlora.load_run(tmp_path / "run")
    trained.export(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        ours = trained.workspace.model.eval()(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, ours, atol=1e-4, rtol=0)
    assert merged.generation_config.eos_token_id == [EOS, WORDS.index("w57")]


# ---- what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "w1"}], "have no column 'text', only body"),
        ([{"text": "w1"}, {"text": None}], "column 'text' has no value in 1 of 2"),
        ([{"text": 3}], "holds int64, not text"),
        ([{"text": ["w1", "w2"]}], "not text"),
    ],
)
def test_garbage_is_refused(world: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(world, source=write_rows(tmp_path / "rows.jsonl", rows))


def test_a_block_of_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.*block_size = 1: input should be greater than or equal to 2"):
        config.parse({"task": {"kind": "causal_lm", "block_size": 1}})


# ---- a real model on real text


@pytest.fixture(scope="module")
def plays(world: Path) -> Path:
    """The first turns of the plays; all of them would take most of the time."""
    rows = datasets.Dataset.from_json(str(shared("data/shakespeare_by_speaker.jsonl.gz")), cache_dir=str(world))
    return write_rows(world / "plays.jsonl", list(rows.select(range(500))))


def test_a_real_model_tells_stories_and_not_plays(plays: Path) -> None:
    path = shared("models/stories260K")
    task = CausalLM(max_new_tokens=40).prepare(Model(path=str(path)), Files(train=str(plays)))
    model, head = task.load_model(0, "fp32", CPU)
    assert head == frozenset()
    with torch.inference_mode():
        (told,) = task.predict(model.eval(), ["Once upon a time, there was a little"], CPU)
        found = task.evaluate(model, np.arange(60), "test", CPU)
    assert told["continuation"].startswith(" girl named Lily.")
    assert 4.0 < found.metrics["loss"] < 6.0
    assert 0.1 < found.metrics["accuracy"] < 0.3


def test_a_real_model_learns_from_speakers(plays: Path, tmp_path: Path) -> None:
    values = {
        "model": {"path": str(shared("models/stories260K"))},
        "task": {"kind": "causal_lm", "block_size": 64},
        "data": {"kind": "files", "train": str(plays)},
        "clients": {
            "per_round": 2,
            "test_clients": 0.2,
            "partition": {"kind": "natural", "column": "speaker", "min_examples": 8},
        },
        "evaluate": {"every": 2},
        "method": {**METHODS["flasc"], "rank": 8, "rounds": 2, "local": {**LOCAL, "max_steps": 6}},
    }
    result = fedlora.run(config.parse(values), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"] - 0.3
