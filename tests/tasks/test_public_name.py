"""The names by which others find a base model: never a path of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora import config
from fedlora.core.errors import ConfigError
from fedlora.tasks import Model
from fedlora.tasks.models.public_name import PublicName, license_of, public_name
from fedlora.testing import tiny_model

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model(), PublicName("sentence-transformers/all-MiniLM-L6-v2", None, True)),
        (Model(path="smollm2"), PublicName("HuggingFaceTB/SmolLM2-135M-Instruct", None, True)),
        (Model(path="owner/name", revision="v1"), PublicName("owner/name", "v1", True)),
        (Model(path="gpt2"), PublicName("gpt2", None, True)),
        (Model(path="here/llama"), PublicName("llama")),
        (Model(path="./here/llama/"), PublicName("llama")),
        (Model(path="here/llama", revision="v1"), PublicName("llama")),
        (Model(path="here/llama", hub_id="meta/llama", revision="v1"), PublicName("meta/llama", "v1", True)),
        (Model(path=f"hub/models--owner--name/snapshots/{COMMIT}"), PublicName("owner/name", COMMIT, True)),
        (Model(path="/not/here/llama"), PublicName("llama")),
        (Model(path="here/tiny.gguf"), PublicName("tiny.gguf")),
    ],
    ids=lambda value: value.path if isinstance(value, Model) else "",
)
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, expected: PublicName) -> None:
    (tmp_path / "here" / "llama").mkdir(parents=True)
    # what the folder's model was made from has other weights
    (tmp_path / "here" / "llama" / "config.json").write_text('{"_name_or_path": "someone/else"}')
    (tmp_path / "here" / "tiny.gguf").touch()
    (tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(model) == expected


def test_the_home_folder_is_a_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llama").mkdir()
    assert public_name(Model(path="~/llama")) == PublicName("llama")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [("", PublicName("")), ("owner/name", PublicName("owner/name", None, True)), ("/tmp/llama", PublicName("llama"))],
)
def test_names_of_objects(origin: str, expected: PublicName) -> None:
    model = tiny_model("bert")
    given = Model(object=model, tokenizer="tokenizer:0")  # type: ignore[arg-type]
    model.config.name_or_path = origin
    object.__setattr__(model, "name_or_path", origin)
    assert public_name(given) == expected


def test_a_hub_id_is_no_path() -> None:
    with pytest.raises(ConfigError, match="hub_id"):
        config.parse({"model": {"path": "llama", "hub_id": "/srv/models/llama"}})


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: [a, b\n---\n", None),
        ("no metadata", None),
    ],
)
def test_the_license_is_read_from_the_card_of_the_base(tmp_path: Path, card: str, expected: str | None) -> None:
    assert license_of(Model(path=str(tmp_path))) is None
    (tmp_path / "README.md").write_text(card)
    assert license_of(Model(path=str(tmp_path))) == expected


def test_the_license_of_a_built_in_model_is_known() -> None:
    assert license_of(Model()) == license_of(Model(path="smollm2")) == "apache-2.0"
