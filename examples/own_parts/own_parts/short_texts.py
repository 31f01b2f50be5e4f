"""A task made of one of fedlora's."""

from dataclasses import dataclass

from fedlora import Model, Source, Task, TextClassification
from fedlora.tasks import Prepared


@dataclass(frozen=True, kw_only=True)
class ShortTexts(Task):
    """Classification of texts that are cut after a few tokens.

    Args:
        max_length: tokens that are read.
    """

    max_length: int = 16

    def prepare(self, model: Model, source: Source) -> Prepared:
        return TextClassification(max_length=self.max_length).prepare(model, source)

    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        return TextClassification(max_length=self.max_length).restore(model, label_names)
