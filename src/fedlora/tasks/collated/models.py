"""The class of ``transformers`` that a loaded model belongs to, and what follows from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fedlora.core.errors import ConfigError
from fedlora.core.later import transformers

_CLASSES: dict[str, str | None] = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForMaskedLM": None,
    "AutoModelForMultipleChoice": None,
    "AutoModelForImageClassification": None,
    "AutoModelForAudioClassification": None,
}
"""Classes of models with a loss, and the names of their tasks in ``peft``."""


class Family(NamedTuple):
    """What the class of a model says about it.

    Args:
        auto_class: the class of ``transformers`` that loads it.
        peft_task: the name of its task in ``peft``, if it has one.
        fresh_head: whether all that lies outside the backbone is head; the last matrix of a language model is not.
        content: the name of its main input.
        classes: the classes of its outputs, if it chooses one for each example.
    """

    auto_class: str
    peft_task: str | None
    fresh_head: bool
    content: str
    classes: tuple[str, ...]


def family_of(model: Any) -> Family:
    """The family of a loaded model.

    Raises:
        ConfigError: no class with a loss is that of the model.
    """
    for auto_class, peft_task in _CLASSES.items():
        known: Any = getattr(transformers, auto_class)._model_mapping
        if type(model.config) in known and type(model).__name__ in _names(known[type(model.config)]):
            single = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
            chooses = auto_class.endswith(("SequenceClassification", "ImageClassification", "AudioClassification"))
            names = model.config.id2label.values() if chooses and single and model.config.num_labels > 1 else ()
            fresh = model.get_output_embeddings() is None
            return Family(auto_class, peft_task, fresh, str(model.main_input_name), tuple(map(str, names)))
    raise ConfigError(
        f"a {type(model).__name__} is none of the models with a loss that transformers loads by "
        f"{', '.join(_CLASSES)}: pass one of these"
    )


def _names(found: type[nn.Module] | tuple[type[nn.Module], ...]) -> set[str]:
    return {cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))}
