"""The heads of classes that name no module as their backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fedlora.tasks.models.loading import head_names
from fedlora.tuning import LoRA

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 16, "num_patches": 4}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
TWO_SIDES = {"vision_config": VISION, "text_config": {**SIZES, **IDS}, "num_labels": 3}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    **{f"{one}ForImageClassification": (f"{one}Config", TWO_SIDES, "classifier") for one in ("CLIP", "MetaClip2")},
    **{f"{one}ForImageClassification": (f"{one}Config", TWO_SIDES, "classifier") for one in ("Siglip", "Siglip2")},
    "HGNetV2ForImageClassification": ("HGNetV2Config", {"num_labels": 3}, "fc"),
    "PPLCNetForImageClassification": ("PPLCNetConfig", {"num_labels": 3}, "head"),
    **{f"{one}ForQuestionAnswering": (f"{one}Config", T5, "qa_outputs") for one in ("T5", "MT5", "UMT5")},
}


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_the_classifier_and_the_rest_gets_adapters(name: str) -> None:
    config, settings, head = CASES[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    expected = {f"{head}.weight", f"{head}.bias"}
    assert head_names(model, set()) == expected
    assert head_names(model, {"a name that is not there", f"{head}.bias"}) == expected
    assert not head_names(model, set(), fresh_head=False)


def test_adapters_go_to_the_backbone_of_such_a_class() -> None:
    model = transformers.CLIPForImageClassification(transformers.CLIPConfig(**TWO_SIDES))
    installed = LoRA(rank=2).install(model, head_names(model, set()), 0)
    trained = set(installed.parameters)
    assert {name for name in trained if "lora" not in name} == {"classifier.weight", "classifier.bias"}
    assert any(name.startswith("vision_model.") for name in trained)
