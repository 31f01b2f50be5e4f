"""The model card of an exported folder: what was trained, on which base, at what cost, and how it is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fedlora.config.places import located, located_model
from fedlora.core.byte_counts import add_up
from fedlora.core.later import huggingface_hub
from fedlora.core.slots import kind_of
from fedlora.recipe.modes import MODES
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.folder import RunFolder
from fedlora.tasks import Hub, Model, Sites
from fedlora.tasks.models.loading import stored_dtype
from fedlora.tasks.models.public_name import HUB_ID, PublicName, license_of, public_name

if TYPE_CHECKING:
    from fedlora.runs.inference import TrainedRun

CLASSES = "id2label.json"
"""The file beside an adapter with the name of each class, by its number."""
_PIPELINES = {"causal_lm": "text-generation", "instruction": "text-generation"}
"""Tasks whose name on the Hub is not their own with hyphens."""


def model_card(trained: TrainedRun, merged: bool) -> str:
    """The README of an exported folder, with its metadata as YAML.

    Args:
        trained: the run.
        merged: whether the folder holds a whole model.
    """
    base, federated = public_name(located_model(trained.experiment)), MODES[trained.experiment.mode].sends
    return f"""---
{_metadata(trained, base, merged).to_yaml()}
---
# {base.id or "A model"}, fine-tuned{" by federated learning" if federated else ""}

{_training(trained)}{_computed(trained, merged)}{_base(trained.experiment.model, base, trained.task.fingerprints)}

| metric on all test examples | value |
|---|---|
{_table(trained)}

{_costs(trained)}

```python
{_loading(trained, base, merged)}
```
"""


def _metadata(trained: TrainedRun, base: PublicName, merged: bool) -> Any:
    experiment, kind, data = trained.experiment, kind_of(trained.experiment.task), _hub_data(trained)
    task = _PIPELINES.get(kind, kind.replace("_", "-"))
    relation = "finetune" if merged else "adapter"
    return huggingface_hub.ModelCardData(
        base_model=base.id if base.on_hub else None,
        base_model_relation=relation if base.on_hub else None,
        datasets=[data.path] if data else None,
        eval_results=_results(trained, task, data) or None,
        library_name=_library(trained, merged),
        license=license_of(located_model(experiment)),
        model_name=f"{base.id}-{experiment.label}",
        pipeline_tag=None if ":" in kind else task,
        tags=["fedlora", *["federated-learning"] * MODES[experiment.mode].sends, experiment.label],
    )


def _library(trained: TrainedRun, merged: bool) -> str:
    """The library that loads the exported folder."""
    if merged:
        return "sentence-transformers" if trained.task.backbone_only else "transformers"
    return "fedlora" if kind_of(trained.recipe.tuning) == "bottleneck" else "peft"


def _results(trained: TrainedRun, task: str, data: Hub | None) -> list[Any]:
    """The metrics on all test examples, with the data set if others can find it."""
    if data:
        source: dict[str, Any] = {
            "dataset_type": data.path,
            "dataset_name": data.path,
            "dataset_config": data.name,
            "dataset_split": data.test_split or data.train_split,
            "dataset_revision": data.revision,
        }
    else:
        kind = kind_of(trained.experiment.data)
        source = {"dataset_type": kind, "dataset_name": f"the run's own test rows ({kind})"}
    return [
        huggingface_hub.EvalResult(task_type=task, metric_type=name, metric_name=name, metric_value=value, **source)
        for name, value in trained.metrics.items()
        if math.isfinite(value)
    ]


def _hub_data(trained: TrainedRun) -> Hub | None:
    """The data set of the run, if it is one of the Hub."""
    data, root = trained.experiment.data, trained.experiment.root
    on_hub = isinstance(data, Hub) and re.fullmatch(HUB_ID, data.path) and located(data.path, root) == data.path
    return data if on_hub and isinstance(data, Hub) else None


def _training(trained: TrainedRun) -> str:
    experiment, clients = trained.experiment, trained.experiment.clients
    manifest = RunFolder(trained.folder).read_json("manifest.json")
    found = manifest.get("partition", {}).get("num_clients", clients.num)
    mode, by_sites = MODES[experiment.mode], isinstance(experiment.data, Sites)
    if not mode.sends:
        who = "one client held all training rows" if mode.pools else "one client trained alone on its own rows"
        how = f"This is not the result of a federation: {who}, and nothing was sent."
    elif by_sites:
        how = f"The training rows stayed with {found} sites, which sent the messages counted below."
    else:
        how = (
            f"This was a simulation: the training rows were divided among {found} clients of one experiment, and were "
            "not in different hands. Bytes are the lengths of the real messages."
        )
    used = manifest.get("partitioner") or _text(clients.partition)
    partition = "" if by_sites else f"partition `{used}`, "  # sites have rows of their own
    cohort = f"{clients.per_round} of {found} clients per round, {partition}"
    return (
        f"Method `{experiment.label}`, tuning `{kind_of(trained.recipe.tuning)}`, {trained.state.round} rounds, "
        f"{cohort if mode.sends else ''}seed {experiment.seed}. {how}"
    )


def _text(component: Any) -> str:
    """A component with its settings."""
    values = {each.name: getattr(component, each.name) for each in dataclasses.fields(component) if each.name != "kind"}
    settings = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"{kind_of(component)}({settings})" if settings else kind_of(component)


def _computed(trained: TrainedRun, merged: bool) -> str:
    """The number format of training, where another one predicts slightly differently."""
    compute, base = trained.recipe.local.compute, located_model(trained.experiment)
    if compute != "fp32":
        return (
            f'\n\nIt was trained and evaluated with `compute = "{compute}"`: frozen weights in bfloat16, trained ones '
            "in float32, under autocast to bfloat16. Computed in another format, predictions differ by rounding."
        )
    stored = None if base.path == "smollm2" else stored_dtype(base)  # ``_base`` says how that one is stored
    if stored in (None, torch.float32):
        return ""
    name = str(stored).removeprefix("torch.")
    how = "are rounded to that" if merged else 'stay in that unless `from_pretrained` is given `dtype="float32"`'
    return (
        f"\n\nIt was trained and evaluated in float32. The base model is stored in {name}, and the weights {how}; "
        "predictions then differ by rounding."
    )


def _base(model: Model, base: PublicName, fingerprints: Mapping[str, str]) -> str:
    """What is to be known of a base model that no hub id identifies, or whose weights are not exactly those."""
    if model.path == "smollm2":
        return (
            f"\n\nThe weights of the base model were those of {base.id} rounded to 4 bits (a GGUF file). On the "
            "original weights predictions differ slightly."
        )
    named = (
        f"`{base.id}` is the name of a local folder or file, not a hub id: load the base model from a copy of it"
        if base.id
        else "load the base model that it was trained on"
    )
    if model.object:
        known = "" if base.on_hub else f"; {named}"
        return (
            f"\n\nThe base model was passed from Python: class and fingerprint `{model.object.fingerprint}`{known}. "
            "The trained values belong to these weights; keep both if the weights were changed after loading."
        )
    return "" if base.on_hub else f"\n\n{named}. The fingerprint of its weights is `{fingerprints['model']}`."


def _table(trained: TrainedRun) -> str:
    return "\n".join(f"| {name} | {value:.4f} |" for name, value in trained.metrics.items())


def _costs(trained: TrainedRun) -> str:
    """What was sent, and what it discloses."""
    rows = RunFolder(trained.folder).rows(trained.state.round)
    if not rows:
        return "The ledger of the run was missing, so its bytes and its privacy budget are unknown."
    lines = [f"- {line}" for line in (*_bytes(trained, rows), *_privacy(trained, rows[-1]))]
    if trained.state.round < trained.experiment.rounds and not rows[-1].stopped:
        lines.append(f"- The run is unfinished: {trained.experiment.rounds} rounds were planned.")
    return "\n".join(lines)


def _bytes(trained: TrainedRun, rows: list[RoundRecord]) -> Iterator[str]:
    if rows[-1].epsilon is not None or rows[-1].example_epsilon is not None:
        yield "Bytes sent are left out, since sizes of messages depend on the clients' data."
    elif MODES[trained.experiment.mode].sends:
        down, up = (add_up(getattr(row, way) for row in rows) for way in ("down_bytes", "up_bytes"))
        yield f"Sent in all: {sum(down.values()):,} bytes to clients, {sum(up.values()):,} bytes from clients."


def _privacy(trained: TrainedRun, last: RoundRecord) -> Iterator[str]:
    if last.epsilon is None and last.example_epsilon is None:
        yield "No differential privacy: the trained values may disclose training examples."
        return
    manifest = RunFolder(trained.folder).read_json("manifest.json")
    if last.epsilon is not None:
        account = manifest["privacy"]
        noise = ", ".join(dict.fromkeys(account["noise"]))
        yield (
            f"Differential privacy of clients: epsilon = {last.epsilon:.3g} at delta = {account['delta']:.3g}; the "
            f"noise came from {noise}."
        )
    if last.example_epsilon is not None:
        accounts = [one for one in manifest["example_privacy"] if one]
        noise = ", ".join(dict.fromkeys(one["noise"] for one in accounts))
        yield (
            f"Differential privacy of examples: epsilon = {last.example_epsilon:.3g} at delta = "
            f"{max(one['delta'] for one in accounts):.3g}; the noise came from {noise}."
        )


def _loading(trained: TrainedRun, base: PublicName, merged: bool) -> str:
    """Source text that loads the exported folder."""
    task, auto_class = trained.task, trained.task.auto_class
    if kind_of(trained.recipe.tuning) == "bottleneck" and not merged:
        return '# bottleneck adapters are not a PEFT type: fedlora predict RUN "a text"'
    if merged:
        return f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("THIS FOLDER")'
    revision = f', revision="{base.revision}"' if base.revision else ""
    lines = ["from peft import PeftModel", f"from transformers import {auto_class}", ""]
    if "=names" in task.load_arguments:
        lines = ["import json", "from pathlib import Path", "", *lines]
        read = f'json.loads(Path("THIS FOLDER", "{CLASSES}").read_text("utf-8"))'
        lines += [f"names = {{int(n): name for n, name in {read}.items()}}"]
    lines += [
        f'base = {auto_class}.from_pretrained("{base.id or "BASE_MODEL"}"{revision}{task.load_arguments})',
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
    ]
    return "\n".join(lines)
