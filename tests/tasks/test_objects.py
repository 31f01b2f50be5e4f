"""Copies of models and processors that were handed over, against what the same folders give."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures.more import some_of
from fixtures.tiny import save_model

from fedlora.core.errors import ConfigError
from fedlora.tasks import ImageClassification, Model
from fedlora.tasks.images.pixels import load_processor
from fedlora.tasks.models.loading import load_pretrained, load_tokenizer, quiet_transformers
from fedlora.tasks.qa.questions import _renamed_backbone
from fedlora.testing import FAMILIES, IMAGE_FAMILIES, default_head, tiny_model

CPU = torch.device("cpu")
PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 16, "width": 16}}


def both(folder: Path, auto_class: str) -> tuple[Model, Model]:
    """A model by its path, and the same loaded."""
    with quiet_transformers():
        own = getattr(transformers, auto_class).from_pretrained(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    return Model(path=str(folder)), Model(object=own, tokenizer=tokenizer)


def check(by_path: Any, by_object: Any) -> None:
    (one, head), (other, other_head) = by_path, by_object
    assert type(one) is type(other)
    assert head == other_head
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert not other.training
    assert one.config._attn_implementation == other.config._attn_implementation
    assert one.config.id2label == other.config.id2label


LOADED_AS = ("its own head", "AutoModel")
EVERY = (*FAMILIES, *IMAGE_FAMILIES)


# each family in one of both ways, and in the other with the slow tests
@pytest.mark.parametrize(
    ("family", "loaded_as"), some_of(product(EVERY, LOADED_AS), {(f, LOADED_AS[i % 2]) for i, f in enumerate(EVERY)})
)
def test_a_copy_is_what_the_folder_gives(family: str, loaded_as: str, tmp_path: Path) -> None:
    auto_class = f"AutoModelFor{default_head(family)}"
    save_model(tmp_path, family)
    own_class = auto_class if loaded_as == "its own head" else "AutoModel"
    with quiet_transformers():  # the backbone alone, where that is what was loaded
        getattr(transformers, own_class).from_pretrained(str(tmp_path)).save_pretrained(str(tmp_path))
    found = [
        load_pretrained(auto_class, model, 3, CPU, {"id2label": {number: f"c{number}" for number in range(4)}})
        for model in both(tmp_path, own_class)
    ]
    check(*found)


def test_a_copy_takes_what_settings_ask(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    tiny_model("llama", head="CausalLM").save_pretrained(str(tmp_path))
    by_path, by_object = both(tmp_path, "AutoModelForCausalLM")
    renamed = _renamed_backbone(by_path)
    assert renamed == _renamed_backbone(by_object) != {}
    settings = {"num_labels": 2, "key_mapping": renamed}
    check(*(load_pretrained("AutoModelForQuestionAnswering", one, 0, CPU, settings) for one in (by_path, by_object)))
    check(*(load_pretrained("AutoModelForCausalLM", one, 0, CPU, fresh_head=False) for one in (by_path, by_object)))
    assert load_tokenizer(by_object)("w1 w2") == load_tokenizer(by_path)("w1 w2")
    with pytest.raises(ConfigError, match="transformers has no AutoModelForImageClassification for a LlamaForCausalLM"):
        load_pretrained("AutoModelForImageClassification", by_object, 0, CPU)


def test_an_image_processor_is_handed_over_in_place_of_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    tiny_model("vit").save_pretrained(str(tmp_path))
    own = transformers.ViTImageProcessorPil(**PROCESSOR)
    own.save_pretrained(str(tmp_path))
    with quiet_transformers():
        vit = transformers.AutoModel.from_pretrained(str(tmp_path))
    by_path, by_object = Model(path=str(tmp_path)), Model(object=vit, tokenizer=own)
    for size in (None, 32):
        one, other = load_processor(by_path, size), load_processor(by_object, size)
        assert one.size == other.size
        assert (one.scale == other.scale).all()
        assert one.own.to_dict() == other.own.to_dict()
    assert ImageClassification().restore(by_object, ["a", "b"]).label_names == ["a", "b"]
    with pytest.raises(ConfigError, match="but this task reads text: pass a tokenizer"):
        load_tokenizer(by_object)
    save_model(tmp_path / "bert")
    with pytest.raises(ConfigError, match="but this task reads images: pass the model's image processor"):
        load_processor(both(tmp_path / "bert", "AutoModel")[1], None)
