"""The settings that a server sends: no site accepts regular expressions, or needs to know this machine's paths."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.config import Experiment
from fedlora.config.places import elsewhere
from fedlora.core.state import named_seed
from fedlora.recipe import Recipe
from fedlora.tasks import Instruction, Sites
from fedlora.tasks.base import Prepared
from fedlora.tuning import Tuning


class PlainSettings:
    """Replaces tunings that select modules by a regular expression by ones that list endings of names.

    Args:
        experiment: the experiment that is sent.
        task: its task, whose model is loaded if there is something to replace.
    """

    def __init__(self, experiment: Experiment, task: Prepared) -> None:
        self._experiment = experiment
        tunings = [phase.recipe.tuning for phase in experiment.phases if phase.recipe.tuning.has_pattern]
        self._plain: list[tuple[Tuning, Tuning]] = []
        if tunings:
            seed = named_seed(experiment.seed, "head")
            model, head = task.load_model(seed, "fp32", torch.device("cpu"))
            self._plain = [(one, one.without_pattern(model, head)) for one in tunings]

    def of(self, recipe: Recipe) -> Recipe:
        """A recipe of the experiment, or of one of its tiers, as it is sent."""
        found = next((plain for tuning, plain in self._plain if tuning == recipe.tuning), None)
        return recipe if found is None else replace(recipe, tuning=found)

    @property
    def experiment(self) -> Experiment:
        """The experiment as it is sent, without what is for the server alone: answer_pattern, stop, track, paths."""
        phases = tuple(replace(phase, recipe=self.of(phase.recipe)) for phase in self._experiment.phases)
        task = self._experiment.task
        if isinstance(task, Instruction):
            task = replace(task, answer_pattern="exact")
        sent = replace(self._experiment, phases=phases, task=task, stop=None, track=())
        return elsewhere(sent) if isinstance(sent.data, Sites) else sent
