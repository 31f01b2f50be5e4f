"""Model folders as users bring them: pointers, cut downloads, unsafe pickles, NaN, other tokenizers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import COLOURS, WORDS, experiment, tiny_world, write_rows
from fixtures.tiny_language import TEXTS, language_world
from safetensors.torch import load_file, save_file

import fedlora
from fedlora.core.errors import ConfigError
from fedlora.tasks import CausalLM, Files, Model, QuestionAnswering, Task, TextClassification, TokenClassification
from fedlora.tasks.models.loading import load_pretrained, load_tokenizer
from fedlora.tasks.models.vocabulary import unknown_notes
from fedlora.testing import tiny_model

CPU = torch.device("cpu")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"
world = pytest.fixture(scope="module")(tiny_world)
MakeFolder = Callable[[str], Path]


class Unsafe:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def shard(folder: Path, *, whole: bool) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-{1 + (number > 4)}-of-2.safetensors" for number, name in enumerate(names)}
    for file in sorted({*files.values()})[: 2 if whole else 1]:
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def as_bin(folder: Path, content: bytes | None = None, **others: Any) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({**weights, **others}, file)
    if content is not None:
        file.write_bytes(content)
    return file


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (
        lambda at: (at / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a git-LFS pointer that stands for the real file: run `git lfs pull`",
    ),
    "pointer for a pickle": (lambda at: as_bin(at, POINTER.encode()), r"pytorch_model\.bin is a git-LFS pointer"),
    "pointer for a tokenizer": (
        lambda at: (at / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is a git-LFS pointer",
    ),
    "pointer for a configuration": (
        lambda at: (at / "config.json").write_text(POINTER),
        r"config\.json is a git-LFS pointer",
    ),
    "half": (
        lambda at: cut(at / "model.safetensors", 50_000),
        r"model\.safetensors is truncated \(50,000 bytes, its header describes \d",
    ),
    "half a header": (lambda at: cut(at / "model.safetensors", 99), r"is truncated \(99 bytes, its header alone needs"),
    "bytes too many": (
        lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes() + b"more"),
        "has bytes too many",
    ),
    "another format": (
        lambda at: (at / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(range(200))),
        "does not begin with the header of a safetensors file",
    ),
    "empty": (lambda at: (at / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty"),
    "web page": (
        lambda at: (at / "model.safetensors").write_text("<!DOCTYPE html>\n<html>404</html>"),
        "is a web page, as a failed download leaves it",
    ),
    "half a pickle": (lambda at: cut(as_bin(at), 30_000), r"pytorch_model\.bin is truncated \(it breaks off"),
    "no pickle": (lambda at: as_bin(at, b"garbage" * 99), r"pytorch_model\.bin is damaged or no file of PyTorch"),
    "unsafe": (
        lambda at: as_bin(at, extra=Unsafe()),
        r"would run code \(posix\.mkdir\), so it is refused; use a model",
    ),
    "plain unsafe pickle": (lambda at: as_bin(at, pickle.dumps(Unsafe())), r"would run code \(posix\.mkdir\)"),
    "a shard missing": (
        lambda at: shard(at, whole=False),
        r"model-2-of-2\.safetensors is missing, but the index of the weights names it",
    ),
    "half a tokenizer": (lambda at: cut(at / "tokenizer.json", 300), r"tokenizer\.json is not JSON"),
    "no tokenizer": (
        lambda at: (at / "tokenizer.json").unlink(),
        r"holds no tokenizer: put tokenizer\.json and tokenizer_config\.json",
    ),
    "an invented tokenizer": (
        lambda at: [os.remove(at / name) for name in ("tokenizer.json", "tokenizer_config.json")],
        r"holds no vocabulary, so every word would be the same unknown token",
    ),
    "an adapter": (
        lambda at: (at / "config.json").rename(at / "adapter_config.json"),
        r"holds an adapter, not a whole model: set model\.path to the model",
    ),
}


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "bert", tmp_path / "model"))


def load(world: Path, folder: Path, task: Task | None = None) -> Any:
    source = Files(train=str(world / "train.jsonl"), test=str(world / "test.jsonl"))
    return (task or TextClassification()).prepare(Model(path=str(folder)), source).load_model(0, "fp32", CPU)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_named_as_such(world: Path, folder: Path, name: str, tmp_path: Path) -> None:
    damage, expected = DAMAGES[name]
    damage(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=expected) as error:
            load(world, folder)
    assert str(folder) in str(error.value)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_tokenizer_made_up_by_transformers_is_refused(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ConfigError, match="holds no vocabulary"):
        load_tokenizer(Model(path=str(tmp_path)))


@pytest.mark.parametrize("path", ["../nowhere/model", "/nowhere/model", "~/nowhere"])
def test_a_path_that_is_no_hub_id_is_not_sought_on_the_hub(path: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no folder '{path}', from which model.path reads the model"):
        load_tokenizer(Model(path=path))


def test_sound_weights_in_other_forms_are_read(world: Path, folder: Path, tmp_path: Path) -> None:
    expected = load(world, folder)[0].state_dict()
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    as_bin(pickled)
    shard(folder, whole=True)
    for one in (folder, pickled):
        for name, value in load(world, one)[0].state_dict().items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_not_finite_are_named_with_their_file(
    world: Path, folder: Path, value: float, sharded: bool
) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(one for one in sorted(weights) if one.endswith("layer.0.output.dense.weight"))
    weights[name][0, :3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if sharded:
        shard(folder, whole=True)
    file = "model-2-of-2.safetensors" if sharded else "model.safetensors"
    with pytest.raises(ConfigError) as error:
        load(world, folder)
    assert str(error.value).startswith(
        f"the pre-trained weights of {str(folder)!r} are damaged: 3 of {weights[name].numel():,} values of "
    )
    assert f"{name} in {folder / file} are NaN or infinite" in str(error.value)


def test_a_model_in_memory_that_is_not_finite(world: Path) -> None:
    model: Any = tiny_model("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = torch.nan
    given = Model(object=model, tokenizer=load_tokenizer(Model(path=str(world / "bert"))))
    with pytest.raises(ConfigError, match=r"word_embeddings\.weight in model\.object are NaN"):
        load_pretrained("AutoModelForSequenceClassification", given, 0, CPU)


# ---- tokenizer and embedding


def shrink(folder: Path, rows: int) -> None:
    """The model's embedding has ``rows`` rows, its tokenizer 64 tokens."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["text", "tags", "questions"])
def test_ids_beyond_the_embedding_are_refused_before_training(
    world: Path, folder: Path, tmp_path: Path, kind: str
) -> None:
    shrink(folder, 50)
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": f"w1 {colour}", "label": colour} for colour in COLOURS],
        "tags": [{"tokens": ["w1", colour], "tags": ["O", "B-c"]} for colour in COLOURS],
        "questions": [
            {"context": f"w1 {colour}", "question": "w2", "answers": {"text": ["w1"], "answer_start": [0]}}
            for colour in COLOURS
        ],
    }
    tasks: dict[str, Task] = {
        "text": TextClassification(),
        "tags": TokenClassification(),
        "questions": QuestionAnswering(max_length=16, stride=2),
    }
    file = str(write_rows(tmp_path / "rows.jsonl", rows[kind]))
    prepared = tasks[kind].prepare(Model(path=str(folder)), Files(train=file, test=file))
    with pytest.raises(ConfigError) as error:
        prepared.load_model(0, "fp32", CPU)
    assert str(error.value) == (
        f"the tokenizer of {str(folder)!r} gives the token 'red' the number 63, but the model's embedding has 50 rows, "
        "for the numbers below 50: put the tokenizer there that belongs to the model, or enlarge the model with "
        "resize_token_embeddings(64) and save it"
    )


def test_a_larger_tokenizer_is_no_fault_until_its_last_tokens_are_read(
    world: Path, folder: Path, tmp_path: Path
) -> None:
    shrink(folder, 63)  # every token but `red`
    train = write_rows(tmp_path / "t.jsonl", [{"text": f"w{n} w1", "label": COLOURS[n % 2]} for n in range(12)])
    settings = [f'model.path="{folder}"', f'data.train="{train}"', f'data.test="{train}"', "clients.num=3"]
    fedlora.run(experiment(world, "lora", *settings, rounds=1), tmp_path / "run")
    trained = fedlora.load_run(tmp_path / "run")
    assert len(trained.predict(["w1 blue"])) == 1
    with pytest.raises(ConfigError, match="gives the token 'red' the number 63"):
        trained.predict(["w1 red"])
    file = write_rows(tmp_path / "other.jsonl", [{"text": "w1 red", "label": "blue"}])
    with pytest.raises(ConfigError, match="gives the token 'red' the number 63"):
        trained.evaluate(file)


def test_a_token_to_pad_with_beyond_the_embedding(world: Path, folder: Path) -> None:
    tokenizer: Any = load_tokenizer(Model(path=str(folder)))
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="gives the token '<new>' the number 64"):
        load(world, folder)


language = pytest.fixture(scope="module")(language_world)


def test_a_language_model_with_a_larger_tokenizer(language: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(language / "llama", tmp_path / "model"))
    shrink(folder, 20)
    file = str(write_rows(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS]))
    prepared = CausalLM().prepare(Model(path=str(folder)), Files(train=file, test=file))
    with pytest.raises(ConfigError, match=r"has 20 rows, for the numbers below 20"):
        prepared.load_model(0, "fp32", CPU)
    alone = CausalLM(max_new_tokens=2).restore(Model(path=str(folder)), [])
    model, _ = alone.load_model(0, "fp32", CPU)
    with pytest.raises(ConfigError, match="gives the token 'w57'"):
        alone.predict(model, ["w1 w57"], CPU)


def test_unknown_tokens_are_reported_with_the_first_row(world: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{'x' * (1 + n % 5)} w{n} w1 w2", "label": COLOURS[n % 3]} for n in range(12)]
    file = write_rows(tmp_path / "t.jsonl", rows)
    settings = [f'data.train="{file}"', f'data.test="{file}"', "clients.num=3"]
    result = fedlora.run(experiment(world, "lora", *settings, rounds=1), tmp_path / "run")
    said = [sentence for sentence in result.rows[0].warnings if "unknown" in sentence]
    assert said[0].startswith(f"25% of the tokens are unknown to the tokenizer of {str(world / 'bert')!r} ([UNK]): ")
    assert not [sentence for row in result.rows[1:] for sentence in row.warnings if "unknown" in sentence]
    assert fedlora.load_run(tmp_path / "run").evaluate(file).warnings[0] == said[0]


def test_a_tenth_of_unknown_tokens_is_no_reason_for_a_note(world: Path, tmp_path: Path) -> None:
    def notes(text: str) -> list[str]:
        file = str(write_rows(tmp_path / "t.jsonl", [{"text": text, "label": one} for one in COLOURS]))
        found = TextClassification().prepare(Model(path=str(world / "bert")), Files(train=file, test=file)).notes
        return [one for one in found if "unknown" in one]

    assert notes(" ".join(["x", *WORDS[:9]])) == []
    assert len(notes(" ".join(["x", *WORDS[:8]]))) == 1


def test_a_token_of_several_uses_is_not_counted_as_unknown(language: Path) -> None:
    tokenizer: Any = load_tokenizer(Model(path=str(language / "llama")))
    tokenizer.unk_token = tokenizer.eos_token
    assert unknown_notes([], tokenizer, "model") == ()
