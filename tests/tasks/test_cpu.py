"""The faster pieces for CPUs compute what PyTorch's own do."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from fedlora.tasks.models import cpu
from fedlora.testing import FAMILIES, tiny_model

PLAIN = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation_and_the_share(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    inputs = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    result = cpu.drop(inputs, p)
    values = result.detach().double()
    kept = values != 0
    assert values[kept].unique().numel() == 1
    assert float(values[kept][0]) == pytest.approx(1 / (1 - p), rel=1e-6 if dtype == torch.float32 else 4e-3)
    error = 5 * math.sqrt(p / (1 - p) / values.numel())
    assert float(values.mean()) == pytest.approx(1.0, abs=error + 2e-4)
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=5e-3)
    result.sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, result.detach())


def test_dropout_draws_from_the_default_generator() -> None:
    inputs = torch.randn(64, 256)
    torch.manual_seed(1)
    first, second = cpu.drop(inputs, 0.3), cpu.drop(inputs, 0.3)
    torch.manual_seed(1)
    assert torch.equal(cpu.drop(inputs, 0.3), first)
    assert not torch.equal(first, second)


def test_dropped_entries_are_independent() -> None:
    torch.manual_seed(2)
    kept = (cpu.drop(torch.ones(1 << 20), 0.5) != 0).double() - 0.5
    for lag in (1, 2, 3, 4, 5, 8):
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 0.25 * 6 / 1024


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_the_ends(p: float) -> None:
    inputs = torch.randn(128, 128)
    assert torch.equal(cpu.drop(inputs, p), inputs * (1 - p))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 4099)])
def test_dropout_of_odd_shapes(shape: tuple[int, ...]) -> None:
    assert cpu.drop(torch.ones(shape), 0.2).shape == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_did(family: str) -> None:
    model, tokens = tiny_model(family).eval(), torch.randint(1, 64, (3, 9))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    names = [name for name, _ in model.named_parameters()]

    def results(compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
            logits = model(input_ids=tokens, attention_mask=mask).logits.float()
        logits.square().sum().backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return logits.detach(), torch.cat(gradients)

    before = [results(dtype) for dtype in PLAIN]
    cpu.speed_up(model, attention=True)
    for dtype, (logits, gradient), tolerance in zip(PLAIN, before, (1e-5, 0.1), strict=True):
        after, changed = results(dtype)
        torch.testing.assert_close(after, logits, rtol=tolerance, atol=tolerance)
        cosine = torch.nn.functional.cosine_similarity(gradient, changed, dim=0)
        assert float(cosine) > 1 - tolerance / 10
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("dtype", PLAIN)
def test_attention_with_dropout_is_the_plain_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    query, key, value = (torch.randn(2, 4, 40, 8, dtype=dtype) for _ in range(3))
    mask = torch.zeros(2, 1, 40, 40, dtype=dtype).index_fill_(3, torch.tensor([38, 39]), torch.finfo(dtype).min)
    torch.manual_seed(4)
    found, _ = cpu.attend(nn.Module(), query, key, value, mask, scaling=0.25, dropout=0.5)
    torch.manual_seed(4)
    weights = cpu.drop(torch.softmax(query.double() @ key.double().transpose(2, 3) * 0.25 + mask, -1).to(dtype), 0.5)
    expected = (weights @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_dropout_modules_are_replaced_in_a_model() -> None:
    model = tiny_model("bert")
    cpu.speed_up(model, attention=False)
    kinds = {type(module) for module in model.modules()}
    assert cpu.Dropout in kinds
    assert nn.Dropout not in kinds
    assert model.config._attn_implementation != cpu.ATTENTION
    model.train()
    torch.manual_seed(0)
    tokens = torch.randint(1, 64, (16, 24))
    assert not torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_says_nothing_of_it_on_disk(family: str, tmp_path) -> None:
    model = tiny_model(family)
    cpu.speed_up(model, attention=True)
    model.save_pretrained(tmp_path)
    assert cpu.ATTENTION not in (tmp_path / "config.json").read_text()
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
