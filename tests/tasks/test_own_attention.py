"""Families whose attention is not the plain softmax, and those that read sequences of any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.tasks.models import cpu
from fedlora.tasks.models.loading import positions

SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 32},
}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "cap": ("Gemma2Config", {"attn_logit_softcapping": 0.01}),
    "sinks": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


def own(kind: str, **changes: Any) -> Any:
    name, settings = OWN[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**SMALL, **{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() == 2 else 1.0)
    return model


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_caps_and_sinks_of_attention_are_kept(kind: str, compute: torch.dtype) -> None:
    model = own(kind)
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        before = model(tokens).logits
        cpu.speed_up(model, attention=True)
        assert torch.equal(model(tokens).logits, before)


def test_the_cap_has_an_effect() -> None:
    tokens = torch.arange(1, 10)[None]
    capped, free = (own("cap", attn_logit_softcapping=cap) for cap in (0.01, None))
    assert not torch.allclose(capped(tokens).logits, free(tokens).logits, atol=1e-3)


def test_a_model_without_a_bound_on_positions_has_none() -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=32)
    assert config.max_position_embeddings == -1
    assert positions(AutoModelForSequenceClassification.from_config(config)) is None
