"""The settings of a tuning that a client accepts from a server: no regular expressions, no paths, no code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.core.errors import shown
from fedlora.core.later import peft
from fedlora.core.slots import tables_in
from fedlora.tuning.targets import is_pattern

PEFT_TYPES = (
    *("BOFT", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "RANDLORA"),
    *("ROAD", "VERA"),
)
"""Values of ``peft_type`` that compute on the device alone: they read no file, and load no other model."""
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_WORDS = {
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": ("gaussian", "orthogonal"),
    "target_modules": ("all-linear",),
    "task_type": ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    "variant": ("road_1", "road_2", "road_4"),
}
_LORA = "r lora_alpha lora_dropout fan_in_fan_out use_rslora use_dora lora_bias init_lora_weights inference_mode"
_PRODUCTS = "alpha rank_dropout module_dropout use_effective_conv2d decompose_both decompose_factor rank_dropout_scale"
_ROTATIONS = (
    "oft_block_size coft eps block_share use_cayley_neumann num_cayley_neumann_terms boft_block_size boft_block_num "
    "boft_n_butterfly_factor boft_dropout apply_GS group_size"
)
_SHARED = (
    "init_weights init_ia3_weights projection_prng_key save_projection vera_dropout d_initial n_frequency scaling "
    "random_loc_seed delora_lambda miss_dropout mini_r sparse very_sparse randlora_dropout randlora_alpha"
)
_NUMBERS = frozenset(" ".join((_LORA, _PRODUCTS, _ROTATIONS, _SHARED)).split())


def objection(document: Any) -> str:
    """Why the settings in a message are not accepted from a server; empty if they are.

    Args:
        document: untrusted JSON values, of any depth.
    """
    return next((why for table in tables_in(document) for why in _objections(table) if why), "")


def _objections(table: Mapping[str, Any]) -> Iterator[str]:
    for key, plain in (("targets", is_pattern), ("answer_pattern", lambda text: text not in ("exact", "gsm8k"))):
        if key in table and isinstance(table[key], str) and plain(table[key]):
            yield f"{key} = {shown(table[key])} is a regular expression, which no site takes from a server; send a list"
    if table.get("kind") == "peft":
        yield from _of_peft(table.get("config"))


def _of_peft(config: Any) -> Iterator[str]:
    if not isinstance(config, Mapping) or str(config.get("peft_type")).upper() not in PEFT_TYPES:
        kind = config.get("peft_type") if isinstance(config, Mapping) else config
        yield f"peft_type = {shown(kind)} is not accepted here, only {', '.join(PEFT_TYPES)}"
        return
    # an object's fields are sent with their defaults, which choose nothing
    kinds = {str(kind.value): cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    default = kinds[str(config["peft_type"]).upper()]().to_dict()
    for key, value in config.items():
        if key in ("peft_type", "peft_version") or value in (None, {}, []) or value == default.get(key, ...):
            continue
        if not (_is_number(key, value) or value in _WORDS.get(key, ()) or _is_list(key, value)):
            yield f"the field {shown(key)} = {shown(value)} of a peft configuration is not accepted from a server"


def _is_number(key: str, value: Any) -> bool:
    return key in _NUMBERS and isinstance(value, bool | int | float)


def _is_list(key: str, value: Any) -> bool:
    if key == "layers_to_transform":
        return isinstance(value, int) or (isinstance(value, list) and all(isinstance(one, int) for one in value))
    named = key in _NAMES and isinstance(value, list)
    return named and all(isinstance(one, str) and _NAME.fullmatch(one) for one in value)
