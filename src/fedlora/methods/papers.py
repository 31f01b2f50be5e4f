"""The methods of the three papers, and their building blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedlora.core.component import Count, Part, Share
from fedlora.core.errors import ConfigError
from fedlora.methods.defaults import ADAPTIVE, ADAPTIVE_FULL, PLAIN
from fedlora.privacy import AnyPrivacy, NoPrivacy
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import Local
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.server.aggregate import AnyAggregator, Mean
from fedlora.server.optimizers import AnyServerOptimizer
from fedlora.server.optimizers import Sgd as ServerSgd
from fedlora.server.pruning import Prune
from fedlora.transport import AnyPrecision, Dense, Float32, Link, Quota, TopK
from fedlora.tuning import AnyTuning, Full, LoRA, SparseMask, SvdOfDelta, SvdOfWeight

Phases = tuple[Phase, ...]
Memory = Literal["none", "init", "last_round"]


def fedavg(
    *,
    rounds: Count = 40,
    tuning: AnyTuning = LoRA(),
    down: Link = Link(),
    up: Link = Link(),
    aggregator: AnyAggregator = Mean(),
    server: AnyServerOptimizer = ServerSgd(),
    server_head: AnyServerOptimizer | None = None,
    privacy: AnyPrivacy = NoPrivacy(),
    local: Local = PLAIN,
    prune: Prune | None = None,
    shrink: RankPruning | None = None,
    memory: Memory = "none",
) -> Phases:
    """Federated averaging (arXiv 1602.05629, Alg. 1) of whatever ``tuning`` trains; over LoRA it is FedIT.

    FedProx is ``local.proximal > 0``; FedAdam, FedYogi and FedAdagrad are values of ``server``.
    """
    recipe = Recipe(
        tuning=tuning,
        down=down,
        up=up,
        aggregator=aggregator,
        server=server,
        server_head=server_head,
        privacy=privacy,
        local=local,
        prune=prune,
        shrink=shrink,
        memory=memory,
    )
    return (Phase(recipe=recipe, rounds=rounds),)


def dense_lora(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    local: Local = Local(),
) -> Phases:
    """LoRA (arXiv 2106.09685) under federated averaging, with every value sent: the papers' baseline."""
    tuning, link = LoRA(rank=rank, alpha=alpha, targets=targets), Link(precision=precision)
    return fedavg(rounds=rounds, tuning=tuning, down=link, up=link, server=server, local=local)


def full(*, rounds: Count = 40, server: AnyServerOptimizer = ADAPTIVE_FULL, local: Local = Local()) -> Phases:
    """Full fine-tuning under federated averaging (FFT): an upper bound in accuracy and in bytes."""
    return fedavg(rounds=rounds, tuning=Full(), server=server, local=local)


def flasc(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    dropout: Part = 0.0,
    init: Literal["kaiming", "svd_of_weight"] = "kaiming",
    down: Share = 0.25,
    up: Share = 0.25,
    decay: Share = 1.0,
    decay_every: Count = 1,
    scope: Literal["global", "tensor"] = "global",
    quota: Quota = Quota(),
    reference: Literal["zero", "init"] = "init",
    precision: AnyPrecision = Float32(),
    feedback: bool = False,
    server: AnyServerOptimizer = ADAPTIVE,
    privacy: AnyPrivacy = NoPrivacy(),
    local: Local = Local(),
    memory: Memory = "none",
) -> Phases:
    """FLASC (arXiv 2406.05233, Alg. 1): dense local LoRA with sparse messages; separate densities down and up.

    The downlink sends the largest ``int(P * down)`` of all ``P`` trained entries, including the head, ranked by their
    distance from the initial values; the client uses the initial values for the others. The uplink sends the largest
    ``int(P * up)`` entries of each client's change. The official code ranks the entries themselves and sends zeros for
    the others (``reference="zero"``): ``B``, which starts at zero, is then not sent for many rounds, and without a head
    nothing is learnt until it is (``docs/methods.md``). ``feedback`` lets each client add what its last upload left out
    to the next one, which needs a ``memory``.
    """
    start = SvdOfWeight() if init == "svd_of_weight" else LoRA().init
    tuning = LoRA(rank=rank, alpha=alpha, targets=targets, dropout=dropout, init=start)

    def link(density: float, reference: Literal["zero", "init"], feedback: bool) -> Link:
        # the official code skips the top-k where the density is one
        thin = TopK(density=density, scope=scope, quota=quota, decay=decay, decay_every=decay_every)
        kept = thin if density < 1 or decay < 1 else Dense()
        return Link(sparsify=kept, precision=precision, reference=reference, feedback=feedback)

    sent, answer = link(down, reference, False), link(up, "zero", feedback)
    return fedavg(
        rounds=rounds, tuning=tuning, down=sent, up=answer, server=server, privacy=privacy, local=local, memory=memory
    )


def federa(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    split: Literal["symmetric", "left"] = "symmetric",
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    local: Local = Local(),
    memory: Memory = "none",
) -> Phases:
    """FeDeRA (arXiv 2404.18848, Sec. 3): LoRA starts from the SVD of the pre-trained weights; the residual is frozen.

    The server computes the SVD once and sends the factors; every client computes the residual from what it received.
    """
    tuning = LoRA(rank=rank, alpha=alpha, targets=targets, init=SvdOfWeight(split=split))
    link = Link(precision=precision)
    return fedavg(rounds=rounds, tuning=tuning, down=link, up=link, server=server, local=local, memory=memory)


def slora(
    *,
    rounds: Count = 40,
    warm_rounds: Count | None = None,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    density: Share | None = None,
    mask_targets: str | tuple[str, ...] | None = None,
    biases: bool = False,
    split: Literal["symmetric", "left"] = "symmetric",
    fold: Literal["none", "biases", "rest"] | None = None,
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    warm_server: AnyServerOptimizer | None = None,
    local: Local = Local(),
    warm_local: Local | None = None,
    memory: Memory = "none",
) -> Phases:
    """SLoRA (arXiv 2308.06522, Sec. 3): train a random sparse mask, then LoRA from the SVD of what was learnt.

    ``rounds`` counts both phases; the first takes a quarter of them unless ``warm_rounds`` is set, and uses the
    optimisers of the second unless ``warm_local`` and ``warm_server`` are set. At the hand-over the base is reset to
    the pre-trained weights, the head is carried over, and ``fold`` selects what else is (biases if they were trained;
    ``rest`` keeps everything that the truncation would lose).

    The mask covers the adapters' targets and has as many entries as the adapters have parameters: at equal bytes, the
    hand-over keeps six times as much of what was learnt as with one percent of all matrices, which is the paper's
    description (``density=0.01, mask_targets="all-linear"``; ``benchmarks/handover.py``).

    Raises:
        ConfigError: the first phase would leave no round for the second.
    """
    mask = SparseMask(
        density=density, rank=rank if density is None else None, targets=mask_targets or targets, biases=biases
    )
    init = SvdOfDelta(split=split, fold=fold or ("biases" if biases else "none"))
    link = Link(precision=precision)
    lora = LoRA(rank=rank, alpha=alpha, targets=targets, init=init)
    second = Recipe(tuning=lora, down=link, up=link, server=server, local=local, memory=memory)
    warm = replace(second, tuning=mask, server=warm_server or server, local=warm_local or local)
    return _two_phases(warm, second, rounds, warm_rounds)


def primed_lora(
    *,
    rounds: Count = 40,
    warm_rounds: Count | None = None,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    split: Literal["symmetric", "left"] = "symmetric",
    fold: Literal["none", "biases", "rest"] = "none",
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    warm_server: AnyServerOptimizer = ADAPTIVE_FULL,
    local: Local = Local(),
    warm_local: Local | None = None,
    memory: Memory = "none",
) -> Phases:
    """Primed-LoRA, SLoRA's ablation: the first phase is full fine-tuning instead of sparse-mask training.

    ``warm_rounds`` and ``warm_local`` are as in ``slora``; ``warm_server`` is that of full fine-tuning, since the
    pre-trained weights do not survive the learning rate of adapters.

    Raises:
        ConfigError: the first phase would leave no round for the second.
    """
    lora = LoRA(rank=rank, alpha=alpha, targets=targets, init=SvdOfDelta(split=split, fold=fold))
    link = Link(precision=precision)
    second = Recipe(tuning=lora, down=link, up=link, server=server, local=local, memory=memory)
    warm = replace(second, tuning=Full(), server=warm_server, local=warm_local or local)
    return _two_phases(warm, second, rounds, warm_rounds)


def _two_phases(warm: Recipe, second: Recipe, rounds: int, warm_rounds: int | None) -> Phases:
    first_rounds = warm_rounds or max(1, rounds // 4)
    if first_rounds >= rounds:
        raise ConfigError(
            f"warm_rounds = {first_rounds} leaves no round for LoRA out of rounds = {rounds}; make it smaller than that"
        )
    return Phase(recipe=warm, rounds=first_rounds), Phase(recipe=second, rounds=rounds - first_rounds)
