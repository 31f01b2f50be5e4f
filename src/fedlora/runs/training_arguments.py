"""The arguments of a ``Trainer``: those that local training takes over, and those that it cannot."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fedlora.core.errors import ConfigError
from fedlora.core.rates import Schedule
from fedlora.recipe.local import AdamW, ClientOptimizer, Local, Sgd

_CARRIED = """
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate lr_scheduler_type
    warmup_steps warmup_ratio optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor bf16 seed use_cpu gradient_checkpointing activation_checkpointing
    per_device_eval_batch_size metric_for_best_model greater_is_better remove_unused_columns label_names
"""
"""The arguments with a setting of an experiment for each."""

_WITHOUT_EFFECT = """
    output_dir run_name project trackio_space_id trackio_bucket_id trackio_static_space_id report_to debug
    logging_strategy logging_steps logging_first_step logging_dir log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm skip_memory_metrics
    eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_use_gather_object
    prediction_loss_only do_train do_eval do_predict
    save_only_model save_strategy save_steps save_on_each_node save_total_limit save_safetensors enable_jit_checkpoint
    load_best_model_at_end resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint
    overwrite_output_dir
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order data_seed
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps tf32 use_cache full_determinism
    activation_checkpointing_kwargs gradient_checkpointing_kwargs average_tokens_across_devices
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    local_rank length_column_name accelerator_config
    model_init_kwargs trust_remote_code chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token
    pad_token max_length truncation_mode shuffle_dataset pad_to_multiple_of completion_only_loss assistant_only_loss
    packing_strategy activation_offloading
"""
"""Arguments that concern logs, files and speed; or, with TRL, how its trainer has made the rows and the collator."""

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def check_arguments(args: Any) -> None:
    """Refuses arguments that change what is learnt and have no setting here.

    Args:
        args: a ``TrainingArguments``, or of a class derived from it.

    Raises:
        ConfigError: naming the argument and its value.
    """
    known = {*_CARRIED.split(), *_WITHOUT_EFFECT.split()}
    # a second object of this class would reset what `accelerate` holds for the first
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), _default(field)
        if field.name in known or (value or None) == (default or None):
            continue
        raise ConfigError(
            f"args.{field.name} = {_shown(value)} changes what the Trainer learns, and local training has no setting "
            f"for it: leave it at {_shown(default)}"
        )
    if args.world_size > 1:
        raise ConfigError(
            f"the Trainer runs in {args.world_size} processes, but an experiment starts from one: run the script "
            "without a launcher, and choose fedlora.run(..., engine=fedlora.Processes) for several GPUs"
        )


def local_training(args: Any, num_rows: int, local: Local) -> Local:
    """A client's local training with the arguments of a ``Trainer``.

    Args:
        args: its arguments.
        num_rows: number of its training rows, for a warm-up in steps.
        local: the settings that the arguments do not have, such as ``epochs`` of a round and ``proximal``.

    Raises:
        ConfigError: there is no such optimiser or schedule here.
    """
    return dataclasses.replace(
        local,
        optimizer=_optimizer(args),
        schedule=_schedule(args, num_rows),
        batch_size=_batch_size(args),
        accumulate=args.gradient_accumulation_steps,
        clip_norm=args.max_grad_norm or None,
        dropout=True,
        compute="bf16" if args.bf16 else "fp32",
    )


def passes(args: Any, num_rows: int) -> float:
    """How often the ``Trainer`` would read each row."""
    return args.max_steps / _steps_of_a_pass(args, num_rows) if args.max_steps > 0 else float(args.num_train_epochs)


def _batch_size(args: Any) -> int:
    """Examples for each step of the optimiser."""
    return int(args.train_batch_size * args.gradient_accumulation_steps)


def _steps_of_a_pass(args: Any, num_rows: int) -> int:
    return math.ceil(num_rows / _batch_size(args))


def _optimizer(args: Any) -> ClientOptimizer:
    name = _name(args.optim)
    if name in _ADAMW:
        return AdamW(
            lr=args.learning_rate,
            beta1=args.adam_beta1,
            beta2=args.adam_beta2,
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
    if name == "sgd":
        return Sgd(lr=args.learning_rate, momentum=0.0, weight_decay=args.weight_decay)
    raise ConfigError(
        f"args.optim = {name!r} is no optimiser of clients here: use one of {', '.join((*_ADAMW, 'sgd'))}"
    )


def _schedule(args: Any, num_rows: int) -> Schedule:
    name = _name(args.lr_scheduler_type)
    if name not in _SCHEDULES:
        raise ConfigError(f"args.lr_scheduler_type = {name!r} is no schedule here: use one of {', '.join(_SCHEDULES)}")
    steps = max(1, math.ceil(passes(args, num_rows) * _steps_of_a_pass(args, num_rows)))
    # `constant` ignores a warm-up
    warm = 0.0 if name == "constant" else args.get_warmup_steps(steps) / steps
    if warm >= 1:
        raise ConfigError(
            f"args.warmup_steps = {args.warmup_steps} is the whole training of {steps} steps: make it shorter"
        )
    return Schedule(shape=_SCHEDULES[name], warmup=warm)  # type: ignore[arg-type]


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of an argument; None without one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


def _shown(value: Any) -> str:
    return repr(_name(value) if isinstance(value, str) else value)[:80]
