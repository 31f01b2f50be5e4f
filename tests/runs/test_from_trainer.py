"""Experiments made of a Trainer: the same steps and figures as its own, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from fixtures.tiny import ledger, make_rows, save_model, write_rows
from fixtures.tiny_language import save_chat_model

import fedlora
from fedlora.core.errors import CheckpointError, ConfigError, DataError
from fedlora.population.partitions import Natural
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe.local import AdamW
from fedlora.recipe.local import Sgd as ClientSgd
from fedlora.server.optimizers import Sgd
from fedlora.tasks.models.loading import quiet_transformers
from fedlora.testing import tiny_model

# peft and trl use names that transformers 5 changed
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated")
EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted({row["label"] for row in make_rows(72, 0)})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tiny models and their tokenizers; no progress bars."""
    root = tmp_path_factory.mktemp("world")
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch, quiet_transformers():
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        save_model(root / "bert")
        save_chat_model(root / "llama")
        tiny_model("llama", head="CausalLM").save_pretrained(str(root / "llama"))
        yield root
    datasets.enable_progress_bars()


def encoded(world: Path, count: int, seed: int, user: bool = True) -> datasets.Dataset:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(world / "bert"))
    rows = [
        {**tokenizer(row["text"]), "labels": NAMES.index(row["label"]), **({"user": row["user"]} if user else {})}
        for row in make_rows(count, seed)
    ]
    return datasets.Dataset.from_list(rows)


def bert(world: Path, **settings: Any) -> Any:
    settings = {"num_labels": len(NAMES), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **settings}
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(str(world / "bert"), **settings)


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def half_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch / 2


def make(world: Path, cls: Any = transformers.Trainer, model: Any = None, **settings: Any) -> Any:
    """A Trainer over the tiny rows; ``settings`` are its arguments, or entries of ``TrainingArguments``."""
    own = {"train_dataset": encoded(world, 72, 0), "eval_dataset": encoded(world, 24, 1, user=False)}
    own |= {"model": model or bert(world), "compute_metrics": accuracy}
    own |= {"processing_class": transformers.AutoTokenizer.from_pretrained(str(world / "bert"))}
    known = {"callbacks", "data_collator", "compute_loss_func", "optimizers", "preprocess_logits_for_metrics", *own}
    own |= {name: value for name, value in settings.items() if name in known}
    rest = {name: value for name, value in settings.items() if name not in known}
    args = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
    return cls(args=transformers.TrainingArguments(str(world / "out"), **(args | rest)), **own)


# ---- what is carried over


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "constant"},
        {"optim": "sgd", "max_grad_norm": 0.1, "label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
        {"compute_loss_func": half_loss, "adam_beta1": 0.5, "adam_epsilon": 1e-3},
    ],
    ids=["adamw", "sgd", "own loss"],
)
def test_one_client_in_one_round_takes_the_trainers_own_steps(
    settings: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    # all rows in each batch, so that their order does not matter
    batch = 72 // settings.get("gradient_accumulation_steps", 1)
    fixed = {"lr_scheduler_type": "constant", "per_device_train_batch_size": batch, "learning_rate": 1e-3}
    trainer = make(world, **(fixed | settings))
    method = fedlora.full(rounds=1, server=Sgd(lr=1.0), local=fedlora.Local(epochs=3))
    experiment = fedlora.from_trainer(trainer, clients=1, method=method)
    result = fedlora.run(experiment, tmp_path / "run")
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(result.before["loss"], rel=1e-4)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(result.after["loss"], rel=1e-3)
    assert after["eval_accuracy"] == result.after["accuracy"]
    assert result.adapter
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(str(result.adapter)).state_dict()
    for name, value in trainer.model.state_dict().items():
        moved = value - start[name]
        torch.testing.assert_close(trained[name] - start[name], moved, atol=2e-4, rtol=0.05)
    assert any(bool((value != start[name]).any()) for name, value in trained.items())


def test_the_arguments_are_those_of_local_training(world: Path) -> None:
    trainer = make(
        world, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=4, weight_decay=0.1,
        warmup_steps=9, lr_scheduler_type="cosine", max_grad_norm=0.5, seed=7, bf16=True, adam_beta2=0.95,
        metric_for_best_model="eval_accuracy", per_device_eval_batch_size=5,
    )  # fmt: skip
    experiment = fedlora.from_trainer(trainer, clients=18)
    local = experiment.phases[0].recipe.local
    assert local.optimizer == AdamW(lr=1e-2, beta2=0.95, weight_decay=0.1)
    assert (local.batch_size, local.accumulate, local.clip_norm, local.dropout) == (8, 2, 0.5, True)
    assert local.compute == "bf16"
    # 9 of the 4 * 72 / 8 steps
    assert local.schedule == fedlora.Schedule(shape="cosine", warmup=0.25)
    assert (experiment.seed, experiment.device, experiment.label) == (7, "cpu", "flasc")
    # four passes over 18 clients, ten in a round
    assert experiment.rounds == 8
    assert (experiment.clients.num, experiment.clients.per_round) == (18, 10)
    task: Any = experiment.task
    assert (task.main_metric, task.higher_is_better, task.eval_batch_size) == ("accuracy", True, 5)
    assert task.columns == ("input_ids", "token_type_ids", "attention_mask", "labels")
    sgd = make(world, optim="sgd", max_steps=27, max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=3)
    experiment = fedlora.from_trainer(sgd, clients=4, method="lora")
    local = experiment.phases[0].recipe.local
    assert (local.optimizer, local.clip_norm) == (ClientSgd(lr=1e-2, momentum=0.0), None)
    assert local.schedule == fedlora.Schedule()
    assert experiment.rounds == 3


def test_a_column_names_the_clients_and_a_run_resumes_with_the_same_trainer(world: Path, tmp_path: Path) -> None:
    def again(metrics: Callable[[Any], Any] = accuracy) -> fedlora.Experiment:
        trainer = make(world, num_train_epochs=2, compute_metrics=metrics, metric_for_best_model="accuracy")
        return fedlora.from_trainer(trainer, clients="user", method="lora")

    experiment = again()
    num = len({row["user"] for row in make_rows(72, 0)})
    assert experiment.clients.partition == Natural(column="user")
    assert (experiment.clients.per_round, experiment.rounds) == (num, 2)
    fedlora.run(experiment, tmp_path / "run", until=1)
    result = fedlora.run(again(), tmp_path / "run")
    assert [row["round"] for row in ledger(tmp_path / "run")] == [0, 1, 2]
    whole = fedlora.run(experiment, tmp_path / "whole")
    assert result.after == whole.after
    assert result.main_metric == "accuracy"
    assert result.adapter
    loaded = peft.PeftModel.from_pretrained(bert(world), str(result.adapter))
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    with pytest.raises(ConfigError, match=r"task\.collator and task\.metrics were passed from Python"):
        fedlora.run(fedlora.load(tmp_path / "run"), tmp_path / "run")
    with pytest.raises((CheckpointError, ConfigError), match=r"task\.metrics|another configuration"):
        fedlora.run(again(lambda found: {"accuracy": 0.5}), tmp_path / "run")


def test_without_rows_to_evaluate_on_some_are_held_out(world: Path) -> None:
    trainer = make(world, eval_dataset=None)
    one = fedlora.prepare(fedlora.from_trainer(trainer, clients=4))
    assert 4 < one.task.num_examples("test") < 30
    experiment = fedlora.from_trainer(trainer, clients="user")
    found = fedlora.prepare(experiment)
    assert experiment.clients.test_clients == 0.2
    assert len(found.population) == experiment.clients.per_round == 7
    named = fedlora.Clients(partition=fedlora.Dirichlet(alpha=1.0), num=3, per_round=2)
    skewed = fedlora.prepare(fedlora.from_trainer(trainer, clients=named))
    assert skewed.classes.names == ["LABEL_0", "LABEL_1", "LABEL_2"][: len(NAMES)]


def test_an_adapter_of_peft_is_the_tuning(world: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query"], lora_dropout=0.1)
    plain = bert(world)
    before = copy.deepcopy(plain.state_dict())
    trainer = make(world, model=peft.get_peft_model(plain, config), num_train_epochs=1)
    experiment = fedlora.from_trainer(trainer, clients=3, method="lora")
    tuning = experiment.phases[0].recipe.tuning
    assert tuning == fedlora.LoRA(rank=4, alpha=6, targets=("query",), dropout=0.1)
    assert experiment.model.train_head
    result = fedlora.run(experiment, tmp_path / "run")
    assert result.after["loss"] != result.before["loss"]
    now = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(value, now[name.replace("query.", "query.base_layer.")])
               for name, value in before.items() if name.startswith("bert."))  # fmt: skip
    # of the same adapter; and of another one
    fedlora.from_trainer(trainer, clients=3, method=experiment.phases)
    with pytest.raises(ConfigError, match="the model has an adapter with rank = 4, alpha = 6"):
        fedlora.from_trainer(trainer, clients=3, method=fedlora.flasc())
    with pytest.raises(ConfigError, match="the method 'full' has no alpha"):
        fedlora.from_trainer(trainer, clients=3, method="full")


def test_further_settings_of_an_adapter_are_those_of_the_tuning(world: Path, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {"value": 2},
        "alpha_pattern": {r"^bert\.encoder.layer.1.attention.self.query": 3},
    }
    further: dict[str, Any] = {"use_rslora": True, "use_dora": True, "layers_to_transform": 1, **patterns}
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"], **further)
    trainer = make(world, model=peft.get_peft_model(bert(world), config), num_train_epochs=1)
    experiment = fedlora.from_trainer(trainer, clients=3, method="lora")
    assert experiment.phases[0].recipe.tuning == fedlora.LoRA(
        rank=4, alpha=6, targets=("query", "value"), rslora=True, dora=True, layers_to_transform=(1,),
        rank_pattern={"value": 2}, alpha_pattern={"bert.encoder.layer.1.attention.self.query": 3},
    )  # fmt: skip
    result = fedlora.run(experiment, tmp_path / "run")
    assert result.adapter
    settings = peft.PeftConfig.from_pretrained(str(result.adapter))
    assert (settings.use_rslora, settings.use_dora, settings.layers_to_transform) == (True, True, [1])


def test_a_head_that_peft_leaves_frozen_stays_frozen(world: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query"])
    trainer = make(world, model=peft.get_peft_model(bert(world), config))
    assert not fedlora.from_trainer(trainer, clients=3).model.train_head


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude_modules": ["key"]}, r"LoraConfig\.exclude_modules = .* has no counterpart"),
        ({"rank_pattern": {"quer.": 2}}, r"rank_pattern has 'quer\.', which is no name"),
        ({"rank_pattern": {"query": 2, "0.attention.self.query": 3}}, "the rank 2 and the scale 4, but"),
        ({"bias": "all"}, r"LoraConfig\.bias = 'all' has no counterpart"),
        ({"modules_to_save": ["pooler"]}, r"modules_to_save trains .*, but not all of the head"),
    ],
)
def test_adapters_that_lora_cannot_be_are_refused(settings: dict[str, Any], message: str, world: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query"], **settings)
    trainer = make(world, model=peft.get_peft_model(bert(world), config))
    with pytest.raises(ConfigError, match=message):
        fedlora.from_trainer(trainer, clients=3)


def test_an_adapter_that_is_trained_is_refused(world: Path) -> None:
    model = peft.get_peft_model(bert(world), peft.LoraConfig(r=4, target_modules=["query"]))
    next(value for name, value in model.named_parameters() if "lora_B" in name).data.fill_(1.0)
    with pytest.raises(ConfigError, match="is trained already"):
        fedlora.from_trainer(make(world, model=model), clients=3)


def test_a_language_model_trains_on_its_own_loss(world: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(world / "llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(world / "llama"))
    rows = datasets.Dataset.from_list([dict(tokenizer(row["text"])) for row in make_rows(40, 0)])
    trainer = make(
        world, model=model, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, compute_metrics=None,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False), num_train_epochs=1,
    )  # fmt: skip
    experiment = fedlora.from_trainer(trainer, clients=2)
    result = fedlora.run(experiment, tmp_path / "run")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(result.before["loss"], rel=1e-3)
    assert result.after["loss"] < result.before["loss"]
    assert (result.main_metric, result.higher_is_better) == ("loss", False)


def test_noise_for_examples_reads_them_one_by_one(world: Path, tmp_path: Path) -> None:
    noise = ExampleNoise(clip_norm=0.5, noise_multiplier=1.0, seed=1)
    method = fedlora.dense_lora(rounds=1, local=fedlora.Local(example_privacy=noise))
    experiment = fedlora.from_trainer(make(world, max_grad_norm=0.0), clients=3, method=method)
    result = fedlora.run(experiment, tmp_path / "run")
    assert result.rows[-1].example_epsilon
    assert result.after["loss"] != result.before["loss"]


# ---- what is refused


class Scaled(transformers.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Watching(transformers.TrainerCallback):
    pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": True}, r"args\.fp16 = True changes what the Trainer learns"),
        ({"neftune_noise_alpha": 5.0}, r"args\.neftune_noise_alpha = 5\.0 changes"),
        ({"dataloader_drop_last": True}, r"args\.dataloader_drop_last = True changes"),
        ({"optim": "adafactor"}, r"args\.optim = 'adafactor' is no optimiser of clients"),
        ({"lr_scheduler_type": "polynomial"}, r"args\.lr_scheduler_type = 'polynomial' is no schedule"),
        ({"max_steps": 3, "warmup_steps": 3}, "is the whole training of 3 steps"),
        ({"cls": Scaled}, "Scaled replaces compute_loss of Trainer"),
        ({"callbacks": [Watching()]}, "the Trainer has the callback Watching"),
        ({"callbacks": [transformers.EarlyStoppingCallback()]}, "has the callback EarlyStoppingCallback"),
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else "",
)
def test_what_an_experiment_cannot_do_is_refused(settings: dict[str, Any], message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fedlora.from_trainer(make(world, **settings), clients=3)


def test_rows_and_objects_that_cannot_be_read_are_refused(world: Path) -> None:
    def refused(message: str, kind: type[Exception] = DataError, clients: Any = 3, **settings: Any) -> None:
        with pytest.raises(kind, match=message):
            fedlora.from_trainer(make(world, **settings), clients=clients)

    rows = encoded(world, 72, 0)
    refused("has no rows by number", train_dataset=rows.to_iterable_dataset(), max_steps=4)
    refused("eval_dataset is a mapping of a, b", eval_dataset={"a": rows, "b": rows})
    refused("changes its rows as they are read", train_dataset=rows.with_transform(lambda row: row))
    refused("a row of train_dataset is of type tuple, but a dict of columns", train_dataset=[(1, 0), (2, 1)])
    refused("has no column 'author'", clients="author")
    own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    refused("has an optimizer of its own", ConfigError, optimizers=(own, None))
    with pytest.raises(ConfigError, match="a str was passed, but one of Trainer"):
        fedlora.from_trainer("trainer", clients=3)
    with pytest.raises(ConfigError, match="there is no method 'flask'"):
        fedlora.from_trainer(make(world), clients=3, method="flask")
    trainer = make(world)
    trainer.training_step = lambda model, inputs, num: None
    with pytest.raises(ConfigError, match="Trainer replaces training_step"):
        fedlora.from_trainer(trainer, clients=3)


def test_a_data_set_of_torch_is_read_row_by_row(world: Path) -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> Any:
            return {name: torch.tensor(value) for name, value in self.rows[number].items()}

    rows = encoded(world, 24, 1, user=False)
    one, other = (make(world, train_dataset=given, eval_dataset=rows) for given in (Rows(rows), rows))
    tasks = [fedlora.prepare(fedlora.from_trainer(trainer, clients=2)).task for trainer in (one, other)]
    assert tasks[0].fingerprint == tasks[1].fingerprint


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"main_metric": "f1"}, ConfigError, "is not among the metrics that task.metrics gives: accuracy"),
        ({"metrics": lambda found: [1]}, ConfigError, "a mapping of names to numbers was expected"),
        ({"columns": ("input_ids", "user", "labels")}, DataError, r"task\.collator makes no batch of the train rows"),
        ({"collator": lambda rows: {"text": "a"}}, DataError, "is of type str, but a model reads tensors"),
        ({"columns": ("input_ids", "attention_mask")}, ConfigError, "gave no loss for batches with input_ids"),
    ],
    ids=["metric", "metrics", "column", "no tensor", "no labels"],
)
def test_a_fault_in_what_the_task_is_given_is_one_sentence(
    change: dict[str, Any], error: type[Exception], message: str, world: Path, tmp_path: Path
) -> None:
    trainer = make(world, eval_dataset=encoded(world, 24, 1))
    experiment = fedlora.from_trainer(trainer, clients=3)
    task: Any = experiment.task
    faulty = dataclasses.replace(experiment, task=dataclasses.replace(task, **change))
    with pytest.raises(error, match=message):
        fedlora.run(faulty, tmp_path / "run")


# ---- the task by itself


def test_settings_of_the_task_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.main_metric = 'f1' is computed by no function"):
        fedlora.Collated(collator=accuracy, main_metric="f1")
    with pytest.raises(ConfigError, match=r"task.label_smoothing = 0.1 changes the model's own loss"):
        fedlora.Collated(collator=accuracy, label_smoothing=0.1, loss_function=half_loss)
    with pytest.raises(ConfigError, match=r"task.collator is of type int"):
        fedlora.Collated(collator=3)
    with pytest.raises(ConfigError, match=r"task.kind = 'collated' reads rows that are encoded for a model in memory"):
        fedlora.prepare(fedlora.Experiment(task=fedlora.Collated(collator=accuracy)))


def test_functions_are_told_apart_by_what_they_compute(world: Path) -> None:
    def scaled(by: int) -> Callable[[Any], Any]:
        return lambda found: {"n": by}

    def mark(function: Any) -> str:
        task: Any = fedlora.Collated(collator=function)
        return str(task.collator.fingerprint)

    assert mark(accuracy) == mark(accuracy) != mark(half_loss)
    assert mark(scaled(1)) == mark(scaled(1)) != mark(scaled(2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(world / "bert"))
    collators = [transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=n) for n in (8, 8, None)]
    assert mark(collators[0]) == mark(collators[1]) != mark(collators[2])


def test_rows_and_texts_are_predicted(world: Path, tmp_path: Path) -> None:
    experiment = fedlora.from_trainer(make(world), clients=3)
    data = fedlora.prepare(experiment)
    model, _ = data.task.load_model(0, "fp32", torch.device("cpu"))
    model.eval()
    row = encoded(world, 1, 5).select_columns(["input_ids", "attention_mask"])
    by_row, by_text = data.task.predict(
        model, [*data.task.inputs_of(row, "rows"), make_rows(1, 5)[0]["text"]], data.device
    )
    assert by_row == by_text
    assert set(by_row) == {"LABEL_0", "LABEL_1", "LABEL_2"} or len(by_row) == len(NAMES)
    write_rows(tmp_path / "rows.jsonl", list(encoded(world, 12, 3)))
    again = data.task.with_rows(tmp_path / "rows.jsonl", {})
    assert again.num_examples("test") == 12
    assert set(again.evaluate(model, torch.arange(12).numpy(), "test", data.device).metrics) == {"loss", "accuracy"}


def test_the_model_of_a_run_is_exported_without_the_functions(world: Path, tmp_path: Path) -> None:
    trainer = make(world, num_train_epochs=1)
    fedlora.run(fedlora.from_trainer(trainer, clients=3), tmp_path / "run")
    trained = fedlora.load_run(tmp_path / "run", (trainer.model, trainer.processing_class))
    trained.export(tmp_path / "model", merge=True)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "model"))
    assert loaded.config.num_labels == len(NAMES)
    with pytest.raises(ConfigError, match=r"task\.collator was passed from Python.*, task=\.\.\.\), FOLDER"):
        trained.predict(["w1 red"])


def test_sft_trains_the_loss_of_the_model_alone(world: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rows = datasets.Dataset.from_list([{"prompt": f"w{n}", "completion": f" w{n}", "user": n % 3} for n in range(24)])

    def trainer(**settings: Any) -> Any:
        own = {"use_cpu": True, "bf16": False, "report_to": [], "num_train_epochs": 1, **settings}
        args = trl.SFTConfig(str(tmp_path / "out"), **own)
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj"])
        test = rows.remove_columns("user")
        return trl.SFTTrainer(str(world / "llama"), args, train_dataset=rows, eval_dataset=test, peft_config=adapter)

    one = trainer()
    experiment = fedlora.from_trainer(one, clients="user", method="lora")
    assert experiment.phases[0].recipe.tuning == fedlora.LoRA(rank=2, alpha=8, targets=("q_proj",))
    result = fedlora.run(experiment, tmp_path / "run")
    # its figures pass through a rounding for the log
    assert float(one.evaluate()["eval_loss"]) == pytest.approx(result.before["loss"], rel=1e-3)
    for settings in ({"loss_type": "dft"}, {"packing": True}):
        with pytest.raises(ConfigError, match=rf"args\.{next(iter(settings))} = .* changes what the Trainer learns"):
            fedlora.from_trainer(trainer(**settings), clients=3)


# ---- the examples


def run_example(name: str, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_example_of_a_trainer_runs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": row["text"], "label": row["label"], "author": row["user"]} for row in make_rows(60, 0)]
    datasets.Dataset.from_list(rows).to_csv("rows.csv")
    transformers.AutoTokenizer.from_pretrained(str(world / "bert")).save_pretrained("bert")
    transformers.AutoModel.from_pretrained(str(world / "bert")).save_pretrained("bert")  # without a classifier
    torch.manual_seed(1)
    run_example("trainer.py", "bert", "rows.csv")
    said = capsys.readouterr().out
    assert "accuracy 0." in said
    assert [row["round"] for row in ledger(Path("runs/trainer"))][-1] == 3
    torch.manual_seed(2)
    run_example("trainer.py", "bert", "rows.csv")  # its new head starts alike, so it finds its run
    assert capsys.readouterr().out == said


def test_the_example_of_sft_runs_where_trl_is_installed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"w{a} w{b}", "completion": f" w{a}"} for a in range(8) for b in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_example("sft_trainer.py", str(world / "llama"), "rows.jsonl")
    assert "loss " in capsys.readouterr().out
    first, *_, last = ledger(Path("runs/sft"))
    assert last["metrics"]["loss"] < first["metrics"]["loss"]
