"""``fedlora.from_trainer``: an experiment that trains what a ``Trainer`` of ``transformers`` would, in a federation."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config import Experiment
from fedlora.core.errors import ConfigError, DataError
from fedlora.methods import METHODS
from fedlora.population.clients import Clients, num_held_out
from fedlora.population.partitions import Iid, Natural, Pooled
from fedlora.recipe import Phase
from fedlora.runs.training_arguments import check_arguments, local_training, passes
from fedlora.tasks import Collated, Model, Rows
from fedlora.tasks.collated.models import family_of
from fedlora.tasks.models.loading import head_names
from fedlora.tuning import LoRA
from fedlora.tuning.adapted import FURTHER, is_adapted, lora_of, matches, trained_beside, without_adapters

_TRAINERS = ("Trainer", "Seq2SeqTrainer", "SFTTrainer")
"""Trainers whose loss is that of the model."""
_OWN_HOOKS = frozenset({"create_model_card", "log", "push_to_hub", "save_model"})
"""What a derived trainer may define, as it changes nothing that is learnt."""
_CALLBACKS = frozenset({"DefaultFlowCallback", "NotebookProgressCallback", "PrinterCallback", "ProgressCallback"})

TEST_CLIENTS = 0.2
"""The share of natural clients that is held out where the trainer has no rows to evaluate on."""


def from_trainer(trainer: Any, *, clients: int | str | Clients, method: str | Sequence[Phase] = "flasc") -> Experiment:
    """The experiment that trains a ``Trainer``'s model on its rows, split among clients.

    The model, the tokenizer, the rows, the collator, the loss, the metrics and the arguments are the trainer's. The
    trainer itself is not run, and its model is not changed. What it has and an experiment cannot do, such as callbacks,
    is refused.

    Args:
        trainer: a ``transformers.Trainer``, or a ``trl.SFTTrainer``, whose ``train_dataset`` is encoded.
        clients: how many clients get equal shares of the shuffled rows; or the name of a column of the training rows
            whose values are the clients; or the whole settings. A number or a column lets ten clients take part in a
            round, or all if there are fewer. With a column and without an ``eval_dataset``, a fifth of the clients is
            held out to test on.
        method: the name of a method, which runs for as many rounds as give each row ``num_train_epochs`` passes on
            average (or as many as ``max_steps`` steps are); or the phases of a method, with rounds of their own. Where
            ``peft`` has put a fresh LoRA into the model, that gives the settings of the tuning.

    Returns:
        The experiment, for ``fedlora.run``. To resume a run, make it again in the same way.

    Raises:
        ConfigError: the trainer changes what is learnt in a way that an experiment cannot.
        DataError: the rows are a stream, or have no such column.

    Example:
        ``fedlora.run(fedlora.from_trainer(trainer, clients=20), "runs/mine")``
    """
    _check(trainer)
    args, rows = trainer.args, _rows(trainer.train_dataset, "train_dataset")
    check_arguments(args)
    plain, lora, model = _model(trainer)
    population, num = _clients(clients, rows, trainer.eval_dataset is None)
    rounds = math.ceil(passes(args, len(rows)) * num / population.per_round)
    phases = _phases(method, lora, max(1, rounds))
    return Experiment(
        label=method if isinstance(method, str) else "trainer",
        seed=args.seed,
        device="cpu" if args.use_cpu else "auto",
        model=model,
        task=_task(trainer, plain),
        data=Rows(train=rows, test=_rows(trainer.eval_dataset, "eval_dataset")),
        clients=population,
        phases=tuple(
            dataclasses.replace(
                phase,
                recipe=dataclasses.replace(phase.recipe, local=local_training(args, len(rows), phase.recipe.local)),
            )
            for phase in phases
        ),
    )


def _check(trainer: Any) -> None:
    """Refuses a trainer that computes something else than its arguments say."""
    known = next((cls for cls in type(trainer).__mro__ if _is_published(cls)), None)
    if known is None or known.__name__ not in _TRAINERS:
        raise ConfigError(
            f"a {type(trainer).__name__} was passed, but one of {', '.join(_TRAINERS)} was expected, whose loss is "
            "that of the model: pass one of these"
        )
    derived = type(trainer).__mro__[: type(trainer).__mro__.index(known)]
    changed = {name for cls in derived for name in vars(cls) if not name.startswith("__")} | {
        name for name, value in vars(trainer).items() if inspect.isroutine(value)
    }
    if names := sorted(name for name in changed - _OWN_HOOKS if name in dir(known)):
        raise ConfigError(
            f"{type(trainer).__name__} replaces {', '.join(names)} of {known.__name__}, which an experiment does not "
            "call: pass a loss as compute_loss_func, and leave other changes out"
        )
    callbacks = [type(one) for one in trainer.callback_handler.callbacks]
    own = [cls.__name__ for cls in callbacks if not (cls.__name__ in _CALLBACKS or _reports(cls))]
    if own:
        raise ConfigError(
            f"the Trainer has the callback {own[0]}, whose events an experiment does not have: remove it, and give "
            "fedlora.run(callbacks=...) a fedlora.Callback; fedlora.Stop ends a run early"
        )
    if trainer.optimizer is not None or getattr(trainer, "optimizer_cls_and_kwargs", None):
        raise ConfigError(
            "the Trainer has an optimizer of its own, but each client of a round makes one: name it in args.optim"
        )


def _is_published(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("transformers", "trl")


def _reports(cls: type) -> bool:
    return cls.__module__.startswith("transformers.integrations")


def _model(trainer: Any) -> tuple[Any, LoRA | None, Model]:
    """The model without adapters, the tuning of its adapters if it has some, and the settings of both."""
    given, args = trainer.model, trainer.args
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    if not is_adapted(given):
        return given, None, Model(object=given, tokenizer=tokenizer, gradient_checkpointing=checkpointing)
    lora, plain, trained = lora_of(given), without_adapters(given), trained_beside(given)
    head = head_names(plain, set(), family_of(plain).fresh_head)
    if head - trained and trained:
        raise ConfigError(
            f"LoraConfig.modules_to_save trains {', '.join(sorted(trained)[:3])}, but not all of the head, which has "
            f"{', '.join(sorted(head - trained)[:3])} too: name all of its modules there"
        )
    further = sorted({name.rpartition(".")[0] for name in trained - head})
    model = Model(
        object=plain,
        tokenizer=tokenizer,
        gradient_checkpointing=checkpointing,
        head=tuple(further),
        train_head=bool(trained) or not head,
    )
    return plain, lora, model


def _rows(given: Any, name: str) -> Any:
    """The rows of a data set, in a form that ``Rows`` takes."""
    if given is None and name == "eval_dataset":
        return None
    if isinstance(given, dict):
        raise DataError(
            f"{name} is a mapping of {', '.join(map(str, given))}, but one data set was expected: pass one of them"
        )
    kind, length = getattr(given, "format", {}), getattr(given, "__len__", None)
    if length is None or not length():
        raise DataError(
            f"{name} is of type {type(given).__name__} and has no rows by number, but all rows were expected at once: "
            "pass a data set with a length"
        )
    if isinstance(kind, dict) and kind.get("type") == "custom":
        raise DataError(
            f"{name} changes its rows as they are read (with_transform), but stored rows were expected: use map()"
        )
    if isinstance(kind, dict) and kind:  # a datasets.Dataset
        return given
    rows = [given[number] for number in range(length())]
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise DataError(
            f"a row of {name} is of type {type(wrong[0]).__name__}, but a dict of columns was expected: let the data "
            "set give dicts"
        )
    return [{key: _plain(value) for key, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _clients(given: int | str | Clients, rows: Any, alone: bool) -> tuple[Clients, int]:
    """The settings of the clients, and how many train; whole clients are tested on if the rows are ``alone``."""
    if isinstance(given, Clients):
        if isinstance(given.partition, Natural):
            num = _distinct(rows, given.partition.column)
            return given, num - num_held_out(num, given.test_clients)
        return given, 1 if isinstance(given.partition, Pooled) else given.num
    if isinstance(given, str):
        share = TEST_CLIENTS if alone else 0.0
        num = _distinct(rows, given)
        num -= num_held_out(num, share)
        return Clients(partition=Natural(column=given), per_round=min(10, num), test_clients=share), num
    return Clients(partition=Iid(), num=given, per_round=min(10, given)), given


def _distinct(rows: Any, column: str) -> int:
    names = rows[0].keys() if isinstance(rows, list) else rows.column_names
    if column not in names:
        raise DataError(
            f"the train_dataset has no column {column!r}, whose values would be the clients, only {', '.join(names)}: "
            "name one of these, or keep the column when the rows are encoded"
        )
    return len({str(row[column]) for row in rows} if isinstance(rows, list) else set(map(str, rows[column])))


def _phases(method: str | Sequence[Phase], lora: LoRA | None, rounds: int) -> tuple[Phase, ...]:
    """The phases of a method, with the model's own adapter as its tuning if it has one."""
    if not isinstance(method, str):
        phases = tuple(method)
        own = [phase.recipe.tuning for phase in phases if isinstance(phase.recipe.tuning, LoRA)]
        if lora and not (own and all(matches(tuning, lora) for tuning in own)):
            raise ConfigError(
                f"the model has an adapter with rank = {lora.rank}, alpha = {lora.alpha:g}, targets = {lora.targets} "
                f"and dropout = {lora.dropout:g}, but the phases of the method have another: give the method these, or "
                "only its name"
            )
        return phases
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; known: {', '.join(METHODS)}")
    given: dict[str, Any] = {"rounds": rounds}
    if lora:
        given |= {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets}
        if missing := given.keys() - inspect.signature(METHODS[method]).parameters.keys():
            raise ConfigError(
                f"the model has an adapter, but the method {method!r} has no {sorted(missing)[0]}: pass the plain "
                "model, or choose another method"
            )
    phases = METHODS[method](**given)
    return tuple(_with_further(phase, lora) for phase in phases) if lora else phases


def _with_further(phase: Phase, lora: LoRA) -> Phase:
    tuning = phase.recipe.tuning
    if not isinstance(tuning, LoRA):
        return phase
    further = {name: getattr(lora, name) for name in FURTHER}
    recipe = dataclasses.replace(phase.recipe, tuning=dataclasses.replace(tuning, **further))
    return dataclasses.replace(phase, recipe=recipe)


def _task(trainer: Any, model: Any) -> Collated:
    """The task with the trainer's collator, loss and metrics."""
    args = trainer.args
    main = (args.metric_for_best_model or "loss").removeprefix("eval_")
    return Collated(
        collator=trainer.data_collator,
        columns=_columns(trainer),
        labels=tuple(trainer.label_names) or ("labels",),
        loss_function=trainer.compute_loss_func,
        label_smoothing=0.0 if trainer.compute_loss_func else args.label_smoothing_factor,
        metrics=trainer.compute_metrics,
        preprocess_logits=trainer.preprocess_logits_for_metrics,
        main_metric=main,
        higher_is_better=main != "loss" and args.greater_is_better is not False,
        eval_batch_size=args.eval_batch_size,
    )


def _columns(trainer: Any) -> tuple[str, ...] | None:
    """The columns that the collator gets: those that the model's ``forward`` reads, and labels."""
    if not trainer.args.remove_unused_columns:
        return None
    trainer._set_signature_columns_if_needed()
    rows = trainer.train_dataset
    found = getattr(rows, "column_names", None) or list(rows[0])
    return tuple(name for name in found if name in set(trainer._signature_columns))
