"""fedlora on one GPU, in under seven minutes: ``python -m benchmarks.gpu`` (``--device cpu --tiny`` to try it here).

Parts run in the order of their worth until the time is up; the figures so far are written after each. Nothing is
downloaded, and no setting of the card is changed. What is compared runs in turns on the same model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import re
import shutil
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers

import fedlora
from benchmarks.graphs import gains, unpacked
from fedlora import config
from fedlora.client.workspace import Workspace
from fedlora.config.federated_data import FederatedData, in_mode, prepare
from fedlora.core import tree
from fedlora.core.devices import pick_device
from fedlora.core.state import ServerState
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.tasks import Model
from fedlora.tasks.base import Batch, Positions
from fedlora.tasks.models.loading import load_pretrained

RESULTS = Path(__file__).parent / "results"
# a capture that fails may leave its stream and its memory in use, so that part is the last
PARTS = ("card", "turn", "waits", "load", "overhead", "memory", "small", "methods", "graphs")


@dataclass(frozen=True)
class Size:
    """The model, and how much is measured.

    Args:
        hidden, layers, heads, kv, inner, vocab: of a Llama with random weights.
        block: tokens of a sequence.
        batch: sequences of a step.
        steps: of a turn.
        rank: of adapters on queries and values, in the measurement of training.
        wide: rank of adapters on all matrices, in the measurement of messages.
        side: of the square matrices that measure the card's rate.
        repeats: of each measurement.
    """

    hidden: int
    layers: int
    heads: int
    kv: int
    inner: int
    vocab: int
    block: int
    batch: int
    steps: int
    rank: int
    wide: int
    side: int
    repeats: int = 3


# 1.04 billion weights; adapters of rank 60 on all matrices have 42 million entries, as those of rank 16 on Llama-3.1-8B
LARGE = Size(2048, 16, 32, 8, 8192, 32000, 256, 16, 10, 16, 60, 8192)
LIKE_MINILM = Size(384, 6, 12, 12, 1536, 30522, 128, 16, 10, 16, 16, 8192)
TINY = Size(64, 2, 4, 2, 160, 600, 32, 4, 3, 4, 4, 256, 2)


@dataclass
class Bench:
    """What the parts share.

    Args:
        device: where to measure.
        tiny: whether only to try the code.
        deadline: when to stop, as a ``time.monotonic`` value.
        folder: for models, texts and runs; removed at the end.
        found: the figures so far, by part.
    """

    device: torch.device
    tiny: bool
    deadline: float
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def fresh(self) -> None:
        """Frees what the last measurement left."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """The most GiB of the device so far; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None

    def seconds(self, repeats: int, **functions: Callable[[], object]) -> dict[str, float]:
        """The median seconds of each function, which are run in turns after one run that does not count."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for repeat in range(repeats + 1):
            for name, function in functions.items():
                self.sync()
                start = time.perf_counter()
                function()
                self.sync()
                if repeat:
                    times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}

    def large(self) -> tuple[Size, Path]:
        return self.model(TINY if self.tiny else LARGE, "large")

    def model(self, size: Size, name: str) -> tuple[Size, Path]:
        """A Llama of random weights, a tokenizer of single words, and sequences of exactly one block."""
        folder = self.folder / name
        if not (folder / "train.jsonl").exists():
            write_model(folder, size, self.device)
        return size, folder


def write_model(folder: Path, size: Size, device: torch.device) -> None:
    words = {f"w{number}": number + 3 for number in range(min(size.vocab, 2000) - 3)}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, **words}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        settings = transformers.LlamaConfig(
            vocab_size=size.vocab, hidden_size=size.hidden, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.kv, intermediate_size=size.inner,
            max_position_embeddings=max(512, size.block), tie_word_embeddings=True, pad_token_id=1, eos_token_id=2,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(folder)
    draw = random.Random(0)
    for split, count in (("test", 2 * size.batch), ("train", 4 * size.batch * size.steps)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                first, step = draw.randrange(len(words)), draw.choice((1, 2))
                text = [f"w{(first + step * place) % len(words)}" for place in range(size.block - 1)]
                file.write(json.dumps({"text": " ".join(text)}) + "\n")


def document(bench: Bench, size: Size, folder: Path, method: dict[str, Any], **tables: Any) -> dict[str, Any]:
    """A configuration over ``folder``."""
    local = {"compute": "bf16", "batch_size": size.batch, "max_steps": size.steps, "epochs": 100}
    local |= {"optimizer": {"kind": "adamw", "lr": 1e-3}}
    return {
        "device": str(bench.device),
        "model": {"path": str(folder), **tables.get("model", {})},
        "task": {"kind": "causal_lm", "block_size": size.block, "eval_batch_size": size.batch},
        "data": {"kind": "files", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "clients": {"num": 4, "per_round": 2, "partition": {"kind": "iid"}},
        "evaluate": {"every": 1000},
        "method": {"rank": size.rank, "rounds": 2, **method, "local": local | method.get("local", {})},
    }


class Opened:
    """A model with a method's tuning, before its first round."""

    def __init__(self, bench: Bench, values: dict[str, Any]) -> None:
        experiment = in_mode(config.parse(values))
        self.federated: FederatedData = prepare(experiment)
        self.recipe: Recipe = experiment.phases[0].recipe
        self.workspace = Workspace(self.federated.task, 0, self.federated.device, experiment.deterministic)
        self.state: ServerState = open_phase(self.workspace, 0, self.recipe, 0, 0, None)[0]
        self.engine = Serial(self.workspace, self.federated.population)

    def round(self, clients: tuple[int, ...] = (0,)) -> None:
        self.state, self.row = run_round(self.recipe, self.state, clients, self.engine, seed=0, rounds=1)


# ---- parts


def card(bench: Bench) -> dict[str, Any]:
    """The card, and the rate of its bfloat16 products of large matrices."""
    side = (TINY if bench.tiny else LARGE).side
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    took = bench.seconds(10, product=lambda: left @ right)["product"]
    found: dict[str, Any] = {"bf16 TFLOP/s": 2 * side**3 / took / 1e12}
    if bench.cuda:
        facts = torch.cuda.get_device_properties(bench.device)
        found |= {"name": facts.name, "GiB": facts.total_memory / 2**30}
    return found


def turn(bench: Bench, which: tuple[Size, Path] | None = None) -> dict[str, Any]:
    """Tokens per second of a client's turn, of a plain PyTorch loop over the same model, and of one over peft's."""
    size, folder = which or bench.large()
    tokens = size.steps * size.batch * size.block
    bench.fresh()
    found, took = ours_and_plain(bench, size, folder)
    bench.fresh()
    try:
        took["peft"] = peft_loop(bench, size, folder)
        found["peft's peak GiB"] = bench.peak()
    except Exception as error:  # what was measured counts without it
        found["peft"] = failure(error)
    found |= {f"tokens/s, {name}": tokens / seconds for name, seconds in took.items()}
    found |= {f"fedlora / {name}, time": took["fedlora"] / took[name] for name in took if name != "fedlora"}
    # a product with each matrix forward, and one for the gradient by its input
    rate = 4e6 * found["matrices, M"] * tokens / took["fedlora"] / 1e12
    found["useful TFLOP/s"] = rate
    if "bf16 TFLOP/s" in bench.found.get("card", {}):
        found["share of the card's rate"] = rate / bench.found["card"]["bf16 TFLOP/s"]
    return found


def ours_and_plain(bench: Bench, size: Size, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """A turn, with and without deterministic kernels, and a plain loop."""
    opened = Opened(bench, document(bench, size, folder, {"kind": "lora"}))
    rows, task, workspace = opened.federated.population.rows_of(0), opened.federated.task, opened.workspace
    values = list(workspace.installed.parameters.values())

    def plain() -> None:
        loop(bench, size, rows, values, lambda part: task.loss(workspace.model, task.batch(part, bench.device)))

    def free() -> None:
        workspace.deterministic = False
        opened.round()
        workspace.deterministic = True

    assert len(rows) >= size.batch
    opened.round()
    found: dict[str, Any] = {"peak GiB": bench.peak()}
    took = bench.seconds(size.repeats, fedlora=opened.round, plain=plain, **{"fedlora, not deterministic": free})
    trained = {id(value) for value in values}
    frozen = (value for value in workspace.model.parameters() if value.dim() == 2 and id(value) not in trained)
    return found | {"matrices, M": sum(value.numel() for value in frozen) / 1e6}, took


def peft_loop(bench: Bench, size: Size, folder: Path) -> float:
    """Seconds of the plain loop over peft's modules."""
    federated = prepare(config.parse(document(bench, size, folder, {"kind": "lora"})))
    task, rows = federated.task, federated.population.rows_of(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(bench.device).train()
    settings = peft.LoraConfig(r=size.rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft reads a name that transformers 5 changed
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(model, settings)
    values = [value for value in model.parameters() if value.requires_grad]

    def loss_of(part: Any) -> torch.Tensor:
        batch = task.batch(part, bench.device)
        loss: torch.Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        return loss

    bench.fresh()
    return bench.seconds(size.repeats, peft=lambda: loop(bench, size, rows, values, loss_of))["peft"]


def loop(
    bench: Bench, size: Size, rows: Positions, values: list[torch.nn.Parameter], loss_of: Callable[[Any], torch.Tensor]
) -> None:
    """The steps of a turn, written plainly."""
    optimizer = torch.optim.AdamW(values, lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(size.steps):
        first = step * size.batch % (len(rows) - size.batch + 1)
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = loss_of(rows[first : first + size.batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def small(bench: Bench) -> dict[str, Any]:
    """The same for a model of MiniLM's size, which launches of kernels hold up."""
    return turn(bench, bench.model(TINY if bench.tiny else LIKE_MINILM, "small"))


def graphs(bench: Bench) -> dict[str, Any]:
    """A step of the small model from a CUDA graph, and with several clients in one batch."""
    size, folder = bench.model(TINY if bench.tiny else LIKE_MINILM, "small")
    opened = Opened(bench, document(bench, size, folder, {"kind": "lora"}))
    task, model, rows = opened.federated.task, opened.workspace.model, opened.federated.population.rows_of(0)

    def loss_of(batch: Batch) -> torch.Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, cache_enabled=False):  # a graph would keep old casts
            return task.loss(model, batch)

    firsts = range(0, min(len(rows) - size.batch + 1, size.steps * size.batch), size.batch)
    batches = [task.batch(rows[first : first + size.batch], bench.device) for first in firsts]
    values = list(opened.workspace.installed.parameters.values())
    opened.round()  # a factor of zeros beside another would never move
    with opened.workspace.kernels(), unpacked():  # others differ in bits by themselves
        return gains(partial(bench.seconds, size.repeats), loss_of, values, batches)


def waits(bench: Bench) -> dict[str, Any]:
    """How often the host waits for the device in a step, by the line that waits; only CUDA can tell."""
    size, folder = bench.large()
    counts: list[Counter[str]] = []
    for steps in (size.steps, 2 * size.steps):
        opened = Opened(bench, document(bench, size, folder, {"kind": "lora", "local": {"max_steps": steps}}))
        opened.round()
        counts.append(Counter())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                opened.round()
            finally:
                if bench.cuda:
                    torch.cuda.set_sync_debug_mode("default")
        for one in seen:
            if "called a synchronizing" in str(one.message):  # not the mode itself, which says once what it misses
                counts[-1][f"{Path(one.filename).name}:{one.lineno}"] += 1
        del opened
        bench.fresh()
    more = {line: (counts[1][line] - number) / size.steps for line, number in counts[0].items()}
    more |= {line: number / size.steps for line, number in counts[1].items() if line not in counts[0]}
    per_step = {line: number for line, number in sorted(more.items(), key=lambda each: -each[1]) if number}
    return {"per step": sum(more.values()), "by line": per_step, "per turn, by line": dict(counts[0].most_common(12))}


def load(bench: Bench) -> dict[str, Any]:
    """Seconds and memory of loading, against the size of the weights in bfloat16."""
    _, folder = bench.large()
    bench.fresh()
    start = time.perf_counter()
    model, _ = load_pretrained(
        "AutoModelForCausalLM", Model(path=str(folder)), 0, bench.device, fresh_head=False, compute="bf16"
    )
    bench.sync()
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    weights = 2 * sum(value.numel() for value in model.parameters()) / 2**30
    peak = bench.peak()
    return found | {"GiB in bfloat16": weights, "peak / weights": None if peak is None else peak / weights}


def overhead(bench: Bench) -> dict[str, Any]:
    """Milliseconds per client that trains nothing, its values nudged so that all entries travel."""
    size, folder = bench.large()
    found: dict[str, Any] = {}
    for name, kind in (("dense", "lora"), ("FLASC", "flasc")):
        method = {"kind": kind, "rank": size.wide, "targets": "all-linear", "local": {"max_steps": 0}}
        opened = Opened(bench, document(bench, size, folder, method))
        installed = opened.workspace.installed
        values = list(installed.parameters.values())

        def nudge(values: list[torch.nn.Parameter] = values) -> None:
            with torch.no_grad():
                torch._foreach_add_(values, 1e-3)

        installed.refresh = nudge
        took = bench.seconds(1, nudge=nudge, round=lambda opened=opened: opened.round((0, 1)))
        found[f"{name}, ms per client"] = 1e3 * (took["round"] / 2 - took["nudge"])
        found["entries"] = tree.num_entries(opened.state.params)
        found[f"{name}, parts in ms"] = {part: 1e3 * each / 2 for part, each in opened.row.seconds.items()}
        del opened, installed, values
        bench.fresh()
    return found


def memory(bench: Bench) -> dict[str, Any]:
    """The most memory of a turn, with activations kept or computed twice."""
    size, folder = bench.large()
    found = {}
    for name, twice in (("kept", False), ("computed twice", True)):
        method = {"kind": "lora", "local": {"max_steps": 2}}
        model = {"gradient_checkpointing": twice}
        opened = Opened(bench, document(bench, size, folder, method, model=model))
        bench.fresh()
        opened.round()
        found[f"peak GiB, activations {name}"] = bench.peak()
        del opened
        bench.fresh()
    return found


def methods(bench: Bench) -> dict[str, Any]:
    """Two rounds of each method, with evaluations."""
    size, folder = bench.large()
    found: dict[str, Any] = {}
    for kind in ("lora", "flasc", "federa", "slora"):
        if time.monotonic() > bench.deadline - 20 and not bench.tiny:
            break
        bench.fresh()
        values = document(bench, size, folder, {"kind": kind, "rounds": 2})
        if kind == "slora":
            values["method"] |= {"warm_rounds": 1, "warm_local": values["method"]["local"]}
        start = time.perf_counter()
        try:
            result = fedlora.run(config.parse(values), bench.folder / "runs" / kind)
        except Exception as error:  # the other methods go on
            found[kind] = failure(error)
            continue
        found[kind] = {
            "seconds": time.perf_counter() - start,
            "losses": [result.before["loss"], result.after["loss"]],
            "peak GiB": bench.peak(),
        }
    return found


# ---- the run


def main() -> None:
    """Reads the command line, measures until the time is up, prints a table, and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the code")
    parser.add_argument("--seconds", type=float, default=330.0, help="when to begin no further part")
    parser.add_argument(
        "--out", type=Path, help="file of the figures; by default gpu-CARD.json in $OUT or in benchmarks/results"
    )
    given = parser.parse_args()
    if unknown := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    device = pick_device(given.device)
    transformers.logging.disable_progress_bar()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}-dry-run"
    out = (
        given.out
        or Path(os.environ.get("OUT") or RESULTS) / f"gpu-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    )
    folder = Path(tempfile.mkdtemp(prefix="fedlora-gpu-"))
    os.environ["FEDLORA_CACHE"] = str(folder / "cache")
    bench = Bench(device, given.tiny, time.monotonic() + given.seconds, folder)
    took: dict[str, float] = {}
    try:
        for part in given.parts or PARTS:
            if time.monotonic() > bench.deadline:
                bench.found[part] = {"left out": "no time was left"}
                write(out, name, given.tiny, bench.found, took)
                continue
            start = time.monotonic()
            try:
                bench.found[part] = globals()[part](bench)
            except Exception as error:  # the other parts go on
                bench.found[part] = failure(error)
            took[part] = round(time.monotonic() - start, 1)
            bench.fresh()
            print(table(part, bench.found[part], took[part]), flush=True)
            write(out, name, given.tiny, bench.found, took)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if '"failed": ' in json.dumps(bench.found):
        raise SystemExit(1)


def failure(error: Exception) -> dict[str, str]:
    """Prints the error that is being handled; what stands in the place of its figures."""
    traceback.print_exc()
    return {"failed": f"{type(error).__name__}: {error}"[:400]}


def write(out: Path, name: str, tiny: bool, found: dict[str, Any], took: dict[str, float]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = {each.__name__: each.__version__ for each in (torch, transformers, peft)}
    facts = {"card": name, "tiny": tiny, "python": platform.python_version(), **versions}
    out.write_text(json.dumps({"machine": facts, "seconds": took, "parts": found}, indent=1) + "\n")


def table(part: str, figures: dict[str, Any], seconds: float) -> str:
    """A part's figures as a Markdown table."""
    doc = (globals()[part].__doc__ or "").splitlines()[0]
    lines = [f"## {part}", "", f"{doc} Took {seconds:.0f} s.", "", "| figure | value |", "| --- | ---: |"]
    for name, value in figures.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        lines += [f"| {name}{f': {key}' if key else ''} | {shown(each)} |" for key, each in nested]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
