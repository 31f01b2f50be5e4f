"""Text classification: tokens, batches, the head, and warnings about models that learnt nothing."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import COLOURS, make_rows, save_model, tiny_world, write_rows
from fixtures.tiny_language import EOS, save_language_model
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import Files, Model, TextClassification
from fedlora.tasks.models.complete import NOTES
from fedlora.tasks.models.encoded import group_lengths
from fedlora.tasks.models.loading import head_names, load_tokenizer
from fedlora.tasks.text import PreparedText
from fedlora.testing import tiny_model

CPU = torch.device("cpu")
SECOND = {"text_pair": "second"}
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module")
def pairs(world: Path) -> Path:
    rows = [{**row, "second": f"w{number % 50} red"} for number, row in enumerate(make_rows(30, 3))]
    return write_rows(world / "pairs.jsonl", rows)


def prepare(world: Path, task: TextClassification | None = None, **source: Any) -> PreparedText:
    files = Files(**{"train": str(world / "train.jsonl"), "test": str(world / "test.jsonl"), **source})
    prepared = (task or TextClassification()).prepare(Model(path=str(world / "bert")), files)
    assert isinstance(prepared, PreparedText)
    return prepared


def model_of(task: PreparedText) -> nn.Module:
    return task.load_model(0, "fp32", CPU)[0].eval()


# ---- batches


def test_a_batch_is_padded_to_its_longest_text_and_a_multiple_of_eight(world: Path) -> None:
    task = prepare(world)
    tokenizer = AutoTokenizer.from_pretrained(world / "bert")
    for rows in (np.array([0, 1, 2]), np.array([5]), np.arange(20)):
        texts = [task.table()["text"][int(row)] for row in rows]
        expected = tokenizer(texts, padding="longest", pad_to_multiple_of=8, return_tensors="pt")
        batch = task.batch(rows, CPU)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert batch["labels"].tolist() == task.labels[rows].tolist()
        assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_batch_may_be_padded_to_a_fixed_length(world: Path) -> None:
    batch = prepare(world, TextClassification(max_length=24, pad_to=24)).batch(np.arange(3), CPU)
    assert batch["input_ids"].shape == (3, 24)


def test_texts_are_cut_at_max_length(world: Path) -> None:
    task = prepare(world, TextClassification(max_length=5))
    batch = task.batch(np.arange(72), CPU)
    assert batch["input_ids"].shape == (72, 5)
    lengths = batch["attention_mask"].sum(1)
    assert all(batch["input_ids"][row, lengths[row] - 1] == 3 for row in range(72))


def test_a_fixed_length_below_max_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="no room for texts of up to max_length = 128"):
        TextClassification(pad_to=64)


def test_pairs_carry_the_types_of_their_tokens(world: Path, pairs: Path) -> None:
    task = prepare(world, train=str(pairs), test=str(pairs), columns=SECOND)
    rows = np.array([3, 4, 11])
    first, second = (task.table()[name] for name in ("text", "text_pair"))
    expected = AutoTokenizer.from_pretrained(world / "bert")(
        [first[int(row)] for row in rows],
        [second[int(row)] for row in rows],
        padding="longest",
        pad_to_multiple_of=8,
        return_tensors="pt",
    )
    batch = task.batch(rows, CPU)
    assert int(expected["token_type_ids"].sum()) > 0
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], expected[name])


# ---- the cache


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *texts: Any, **settings: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*texts, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Counting]:
    """The tokenizers that were loaded since, and a cache that is empty."""
    loaded: list[Counting] = []

    def load(model: Model) -> Counting:
        loaded.append(Counting(load_tokenizer(model)))
        return loaded[-1]

    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedlora.tasks.data.tokenized.load_tokenizer", load)
    return loaded


def test_the_second_time_nothing_is_tokenised(world: Path, counting: list[Counting]) -> None:
    batches = [prepare(world).batch(np.arange(10), CPU, "test") for _ in range(3)]
    assert [tokenizer.calls for tokenizer in counting] == [2, 0, 0]
    assert torch.equal(batches[0]["input_ids"], batches[2]["input_ids"])


def test_another_length_is_tokenised_anew(world: Path, counting: list[Counting]) -> None:
    prepare(world)
    prepare(world, TextClassification(max_length=4))
    assert [tokenizer.calls for tokenizer in counting] == [2, 2]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    world: Path, counting: list[Counting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "file" / "cache"))
    assert prepare(world).num_examples("train") == 72


def test_a_damaged_cache_is_made_anew(
    world: Path, counting: list[Counting], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = prepare(world).batch(np.arange(5), CPU)["input_ids"]
    for file in (tmp_path / "cache" / "tokens").iterdir():
        os.truncate(file, 20)
    assert torch.equal(prepare(world).batch(np.arange(5), CPU)["input_ids"], expected)
    assert counting[1].calls == 2
    caplog.clear()
    for file in (tmp_path / "cache" / "tokens").iterdir():
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
    assert torch.equal(prepare(world).batch(np.arange(5), CPU)["input_ids"], expected)
    assert counting[2].calls == 2
    told = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(told) == 2
    assert all(one.endswith("is damaged, and is made anew") for one in told)


# ---- the model


def test_the_head_is_what_lies_outside_the_backbone(world: Path) -> None:
    assert prepare(world).load_model(0, "fp32", CPU)[1] == {"classifier.weight", "classifier.bias"}


def test_what_the_checkpoint_lacks_belongs_to_the_head(world: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    task = TextClassification(pooling="model").restore(Model(path=str(folder)), list(COLOURS))
    head = task.load_model(0, "fp32", CPU)[1]
    assert head == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert head_names(tiny_model(), set()) == {"classifier.weight", "classifier.bias"}


def test_a_head_of_another_size_starts_anew_from_the_seed(world: Path) -> None:
    task = TextClassification().restore(Model(path=str(world / "bert")), ["a", "b", "c", "d", "e"])
    weights = [task.load_model(seed, "fp32", CPU)[0].get_parameter("classifier.weight") for seed in (0, 0, 1)]
    assert weights[0].shape == (5, 32)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_loading_a_model_moves_no_global_generator(world: Path) -> None:
    task = prepare(world)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    task.load_model(5, "fp32", CPU)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("own", "note"), [(COLOURS[::-1], ""), (["x", *COLOURS[1:]], "is of other classes (x, "), (None, "")]
)
def test_a_checkpoint_s_classifier_has_its_rows_in_the_task_s_order(
    world: Path, tmp_path: Path, own: list[str] | None, note: str
) -> None:
    folder, model = save_model(tmp_path / "bert"), tiny_model("bert")
    if own:
        model.config.id2label = dict(enumerate(own))
        model.config.label2id = {name: number for number, name in enumerate(own)}
    model.save_pretrained(folder)
    prepared = TextClassification(pooling="model").restore(Model(path=str(folder)), list(COLOURS))
    loaded = prepared.load_model(0, "fp32", CPU)[0]
    order = [COLOURS[::-1].index(name) for name in COLOURS] if own == COLOURS[::-1] else [*range(len(COLOURS))]
    assert torch.equal(loaded.get_parameter("classifier.weight"), model.classifier.weight[order])
    assert torch.equal(loaded.get_parameter("classifier.bias"), model.classifier.bias[order])
    assert torch.equal(loaded.get_parameter("bert.pooler.dense.weight"), model.bert.pooler.dense.weight)
    assert any(note in one for one in getattr(loaded, NOTES)) == bool(note)


def test_a_blank_text_without_special_tokens_is_one_token(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gpt2", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.save_pretrained(folder)
    assert tokenizer("")["input_ids"] == []
    rows = [{"text": "", "label": "red"}, *({"text": "w1 " * 12, "label": name} for name in COLOURS)]
    files = Files(train=str(write_rows(tmp_path / "rows.jsonl", rows)), test=str(tmp_path / "rows.jsonl"))
    task = TextClassification().prepare(Model(path=str(folder)), files)
    model = model_of(task)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.isfinite(task.loss(model, task.batch(np.arange(4), CPU)))
        assert torch.isfinite(task.loss(model, task.batch(np.arange(1), CPU)))
        blanks = task.predict(model, ["", "w1", " "], CPU)
        assert blanks[0] == pytest.approx(task.predict(model, [""], CPU)[0])
        assert blanks[2] == pytest.approx(task.predict(model, [" "], CPU)[0])
        assert np.isfinite(list(task.predict(model, ['["", " "]'], CPU)[0].values())).all()
    assert np.isfinite(task.embeddings("train", CPU)).all()


def test_an_encoder_decoder_needs_one_end_in_each_text(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    tokenizer.save_pretrained(folder)
    model = tiny_model("t5", num_labels=2, head="SequenceClassification")
    model.config.eos_token_id, model.config.decoder_start_token_id = EOS, 0
    model.save_pretrained(folder)
    rows = [{"text": "w1 w2", "label": "a"}, {"text": "w1 w2 w3", "label": "b"}]
    files = Files(train=str(write_rows(tmp_path / "rows.jsonl", rows)), test=str(tmp_path / "rows.jsonl"))
    task = TextClassification().prepare(Model(path=str(folder)), files)
    loaded = model_of(task)  # type: ignore[arg-type]
    with torch.no_grad():
        pair, text = task.predict(loaded, ['["w1", "w2"]', "w1"], CPU)
        assert text == pytest.approx(task.predict(loaded, ["w1"], CPU)[0])
        assert sum(pair.values()) == pytest.approx(1)
        with pytest.raises(DataError, match="row 1 of the given rows has '</s>' in its text"):
            task.predict(loaded, ["w1", "w1 </s> w2"], CPU)
    write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "w1 </s> w2", "label": "b"}])
    with pytest.raises(DataError, match="row 2 of the train rows has '</s>' in its text"):
        TextClassification().prepare(Model(path=str(folder)), files)


def test_a_text_to_predict_is_cut_to_what_the_model_reads(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert")
    task = TextClassification(max_length=4096).restore(Model(path=str(folder)), list(COLOURS))
    with torch.no_grad():
        (found,) = task.predict(task.load_model(0, "fp32", CPU)[0].eval(), ["w1 " * 3000], CPU)
    assert sum(found.values()) == pytest.approx(1)


def test_texts_are_cut_on_the_side_that_the_tokenizer_cuts(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert")
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"text": "w1 w2 w3 w4", "label": name} for name in COLOURS]))
    found = []
    for side in ("right", "left"):
        tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side=side)
        tokenizer.save_pretrained(folder)
        task = TextClassification(max_length=4).prepare(Model(path=str(folder)), Files(train=rows, test=rows))
        found.append(tokenizer.decode(task.batch(np.arange(1), CPU)["input_ids"][0][:4]))
    assert found[0] != found[1]


def test_labels_have_their_names_in_the_model(world: Path) -> None:
    assert model_of(prepare(world)).config.id2label == dict(enumerate(COLOURS))  # type: ignore[union-attr]


def test_a_decoder_without_a_padding_token_gets_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gpt2", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    model = tiny_model("gpt2")
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    task = TextClassification().restore(Model(path=str(folder)), list(COLOURS))
    loaded = model_of(task)  # type: ignore[arg-type]
    assert loaded.config.pad_token_id == task.tokenizer.pad_token_id == 3  # type: ignore[union-attr,attr-defined]
    # beside a longer text it is padded, and must be read at its own last token all the same
    alone, (beside, _) = task.predict(loaded, ["red w1"], CPU)[0], task.predict(loaded, ["red w1", "w1 " * 9], CPU)
    assert beside == pytest.approx(alone, abs=1e-5)


def test_a_tokenizer_without_any_special_token_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gpt2", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("pad_token", "unk_token", "cls_token", "sep_token"):
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="has no token to pad with"):
        load_tokenizer(Model(path=str(folder)))


# ---- loss, evaluation, predictions


@pytest.mark.parametrize("pad_to", ["longest", 32])
def test_the_loss_is_the_cross_entropy_of_the_whole_batch(world: Path, pad_to: Any) -> None:
    task = prepare(world, TextClassification(max_length=32, pad_to=pad_to))
    model, batch = model_of(task), task.batch(np.arange(24), CPU)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = functional.cross_entropy(logits, batch["labels"])
        assert float(task.loss(model, batch)) == pytest.approx(float(expected), abs=1e-5)


def test_groups_cover_all_texts_in_order_at_the_least_cost() -> None:
    lengths = sorted([3, 90, 4, 88, 40, 41, 3])
    groups = group_lengths(lengths)
    assert [number for first, last in groups for number in range(first, last)] == list(range(7))
    assert groups == [(0, 3), (3, 7)] or sum((b - a) * lengths[b - 1] + 64 for a, b in groups) <= 7 * 90 + 64


def test_logits_come_in_the_order_of_the_rows(world: Path) -> None:
    task = prepare(world, TextClassification(eval_batch_size=4))
    model, rows = model_of(task), np.array([7, 2, 19, 0, 11, 5])
    with torch.no_grad():
        together = task.logits(model, rows, "test", CPU)
        alone = torch.cat([task.logits(model, rows[[place]], "test", CPU) for place in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_subset_of_rows_that_are_not_the_first_is_evaluated_as_such(world: Path) -> None:
    task = prepare(world)
    model, rows = model_of(task), np.array([20, 3, 23])
    with torch.no_grad():
        found = task.evaluate(model, rows, "test", CPU).metrics
        logits = torch.cat([task.logits(model, rows[[place]], "test", CPU) for place in range(3)])
    labels = task.batch(rows, CPU, "test")["labels"]
    assert found["loss"] == pytest.approx(float(functional.cross_entropy(logits, labels)), abs=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_a_model_that_predicts_one_class_only_is_told_of(world: Path) -> None:
    task = prepare(world)
    model = model_of(task)
    with torch.no_grad():
        model.classifier.weight.zero_()  # type: ignore[union-attr,operator]
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))  # type: ignore[union-attr,operator]
        found = task.evaluate(model, np.arange(24), "test", CPU)
        alike = task.evaluate(model, np.array([1, 4]), "test", CPU)
    assert found.warnings == ("the model predicts one class only, 'green': it has learnt nothing useful",)
    assert found.metrics["accuracy"] == pytest.approx(1 / 3)
    # f1 of green: precision 1/3, recall 1
    assert found.metrics["macro_f1"] == pytest.approx(0.5 / 3)
    assert (alike.warnings, alike.metrics["accuracy"]) == ((), 1.0)


def test_predictions_agree_with_the_evaluation(world: Path) -> None:
    task = prepare(world)
    model = model_of(task)
    texts = [row["text"] for row in make_rows(24, 1)]
    with torch.no_grad():
        expected = task.logits(model, np.arange(24), "test", CPU).softmax(1)
        found = task.predict(model, texts, CPU)
    shares = torch.tensor([[one[name] for name in COLOURS] for one in found])
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_models_that_know_no_types_can_predict(tmp_path: Path, family: str) -> None:
    task = TextClassification().restore(Model(path=str(save_model(tmp_path / family, family))), list(COLOURS))
    with torch.no_grad():
        (found,) = task.predict(task.load_model(0, "fp32", CPU)[0].eval(), ["red w1"], CPU)
    assert sum(found.values()) == pytest.approx(1)


def test_a_label_that_the_model_does_not_know_is_refused(world: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "w1", "label": "violet"}])
    with pytest.raises(DataError, match="labels that the model lacks: violet"):
        prepare(world).with_rows(file, {})


def test_other_rows_may_call_their_columns_otherwise(world: Path, tmp_path: Path) -> None:
    rows = [{"body": row["text"], "kind": COLOURS.index(row["label"])} for row in make_rows(24, 1)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = TextClassification().restore(Model(path=str(world / "bert")), list(COLOURS))
    found = task.with_rows(file, {"text": "body", "label": "kind"})
    model = model_of(prepare(world))
    with torch.no_grad():
        expected = prepare(world).evaluate(model, np.arange(24), "test", CPU)
        assert found.evaluate(model, np.arange(24), "test", CPU) == expected
    with pytest.raises(DataError, match=r"rows.jsonl rows have no column 'text', only body, kind: .*-c text="):
        task.with_rows(file, {})
    with pytest.raises(DataError, match="no column 'bdy', only body, kind: did you mean 'body'"):
        task.with_rows(file, {"text": "bdy"})


def test_texts_are_what_is_read(world: Path, pairs: Path) -> None:
    rows = make_rows(24, 1)
    assert prepare(world).texts("test") == [row["text"] for row in rows]
    task = prepare(world, train=str(pairs), test=str(pairs), columns=SECOND)
    assert task.texts("train")[7] == f"{make_rows(30, 3)[7]['text']} w7 red"


def test_pairs_in_json_are_predicted_as_pairs(world: Path, pairs: Path) -> None:
    task = prepare(world, TextClassification(eval_batch_size=4), train=str(pairs), test=str(pairs), columns=SECOND)
    model = model_of(task)
    rows = list(zip(*(task.data["test"][name] for name in ("text", "text_pair")), strict=True))
    with torch.no_grad():
        expected = task.logits(model, np.arange(30), "test", CPU).softmax(1)
        found = task.predict(model, [json.dumps(pair) for pair in rows], CPU)
        mixed = task.predict(model, [rows[0][0], json.dumps(rows[0]), "[1, 2]", '["red"]', "[red", "w1"], CPU)
        alone = [task.predict(model, [text], CPU)[0] for text in (rows[0][0], "[1, 2]", '["red"]', "[red", "w1")]
    shares = torch.tensor([[one[name] for name in COLOURS] for one in found])
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=0)
    assert mixed[1] == pytest.approx(found[0], abs=1e-5)
    for one, other in zip(mixed[:1] + mixed[2:], alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert mixed[0] != pytest.approx(mixed[1], abs=1e-4)


def test_one_class_is_nothing_to_tell_apart(world: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": f"w{number}", "label": "red"} for number in range(20)])
    with pytest.raises(DataError, match="all rows have the class 'red', but classification needs two or more"):
        prepare(world, train=str(file), test=str(file))


def test_the_data_have_a_name_that_follows_their_content(world: Path, tmp_path: Path) -> None:
    rows = make_rows(72, 0)
    same = write_rows(tmp_path / "same.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", [*rows[1:], rows[0]])
    assert prepare(world, train=str(same)).fingerprint == prepare(world).fingerprint
    assert prepare(world, train=str(other)).fingerprint != prepare(world).fingerprint


def test_the_tokenizer_is_saved_without_the_marks_of_its_last_call(world: Path, tmp_path: Path) -> None:
    task = prepare(world)
    task.save_pretrained(tmp_path / "before")
    task.predict(model_of(task), ["red", "w1 w2 w3"], CPU)
    task.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("before", "after"))
    assert before == after
