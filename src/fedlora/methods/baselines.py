"""The baselines that the papers compare with."""

from __future__ import annotations

from typing import Literal

from fedlora.core.component import Count, Share
from fedlora.methods.defaults import ADAPTIVE, HEAD, LARGER, SLOWER
from fedlora.methods.papers import Memory, Phases, fedavg
from fedlora.privacy import AnyPrivacy, NoPrivacy
from fedlora.recipe.local import Local
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.server.aggregate import ProductExact, SparsityWeighted, Stack, SvdRedistribute
from fedlora.server.optimizers import AnyServerOptimizer
from fedlora.server.optimizers import Sgd as ServerSgd
from fedlora.server.pruning import Prune
from fedlora.transport import AnyPrecision, Float32, Link, Quota, TopK
from fedlora.tuning import LoRA

Weighting = Literal["uniform", "examples"]


def ffa(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    privacy: AnyPrivacy = NoPrivacy(),
    local: Local = Local(),
    memory: Memory = "none",
) -> Phases:
    """FFA-LoRA (arXiv 2403.12313): ``A`` keeps its random initialisation; only ``B`` is trained and sent.

    The mean of the products ``B A`` is then the product of the means, and half of the bytes are saved. Clients redraw
    ``A`` from its seed, since everything is sent relative to the initial values.
    """
    tuning = LoRA(rank=rank, alpha=alpha, targets=targets, train="B")
    down, up = Link(precision=precision, reference="init"), Link(precision=precision)
    return fedavg(
        rounds=rounds, tuning=tuning, down=down, up=up, server=server, privacy=privacy, local=local, memory=memory
    )


def rolora(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ServerSgd(),
    server_head: AnyServerOptimizer = HEAD,
    local: Local = LARGER,
    memory: Memory = "none",
) -> Phases:
    """RoLoRA (arXiv 2409.02346): ``B`` is trained in one round and ``A`` in the next, with the other factor frozen.

    The uplink carries only the trained factor; the downlink, with ``memory = "last_round"``, only what has changed
    since the client's last round.
    """
    tuning = LoRA(rank=rank, alpha=alpha, targets=targets, train="alternate")
    link = Link(precision=precision)
    return fedavg(
        rounds=rounds,
        tuning=tuning,
        down=link,
        up=link,
        server=server,
        server_head=server_head,
        local=local,
        memory=memory,
    )


def sparse_adapter(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    density: Share = 0.25,
    scope: Literal["global", "tensor"] = "tensor",
    whole_head: bool = True,
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    local: Local = Local(),
) -> Phases:
    """SparseAdapter (arXiv 2210.04284) as in the FLASC paper's comparison: one dense round, then a fixed mask.

    Clients train and send only the remaining entries, and the whole head; ``whole_head = false`` prunes it too, as
    FLASC's code does, which leaves little of a head of many classes. That code also uses one threshold for all tensors
    (``scope="global"``); after one round that prunes all of ``B``, and the run stops because nothing would be learnt.
    """
    tuning, link = LoRA(rank=rank, alpha=alpha, targets=targets), Link(precision=precision)
    prune = Prune(density=density, scope=scope, quota=_quota(whole_head))
    return fedavg(rounds=rounds, tuning=tuning, down=link, up=link, server=server, local=local, prune=prune)


def adapter_lth(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    keep: Share = 0.9,
    every: Count = 1,
    whole_head: bool = True,
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    local: Local = Local(),
) -> Phases:
    """Adapter-LTH (FLASC, arXiv 2406.05233): every ``every`` rounds, a share ``keep`` of the remaining entries is kept.

    Iterative magnitude pruning without rewinding; clients train and send only the remaining entries, and the whole head
    (``whole_head = false`` prunes it too).
    """
    tuning, link = LoRA(rank=rank, alpha=alpha, targets=targets), Link(precision=precision)
    prune = Prune(density=keep, first=every, every=every, decay=keep, quota=_quota(whole_head))
    return fedavg(rounds=rounds, tuning=tuning, down=link, up=link, server=server, local=local, prune=prune)


def fed_select(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    keep: Share = 0.9,
    every: Count = 1,
    whole_head: bool = True,
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    local: Local = Local(),
) -> Phases:
    """Federated Select (FLASC, arXiv 2406.05233): the density of both links decays; clients train everything.

    The whole head is sent (``whole_head = false`` makes it compete with the adapters).
    """
    tuning = LoRA(rank=rank, alpha=alpha, targets=targets)
    link = Link(
        sparsify=TopK(density=1.0, quota=_quota(whole_head), decay=keep, decay_every=every), precision=precision
    )
    return fedavg(rounds=rounds, tuning=tuning, down=link, up=link, server=server, local=local)


def fedex(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    fold_rank: Count | None = None,
    weighting: Weighting = "uniform",
    precision: AnyPrecision = Float32(),
    server_head: AnyServerOptimizer = HEAD,
    local: Local = LARGER,
    memory: Memory = "none",
    max_base_share: Share | None = None,
) -> Phases:
    """FedEx-LoRA (arXiv 2410.09432): factors are averaged, and the residual of the mean product goes into frozen
    weights.

    Clients with memory get the missing folds as factors if these are smaller; others get the sum of all folds.
    ``fold_rank`` truncates each fold to that rank, as in the paper's inexact variant.
    """
    tuning, link = LoRA(rank=rank, alpha=alpha, targets=targets), Link(precision=precision)
    rule = ProductExact(rank=fold_rank, weighting=weighting, max_base_share=max_base_share)
    return fedavg(
        rounds=rounds,
        tuning=tuning,
        down=link,
        up=link,
        aggregator=rule,
        server_head=server_head,
        local=local,
        memory=memory,
    )


def flora(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    weighting: Weighting = "uniform",
    precision: AnyPrecision = Float32(),
    server_head: AnyServerOptimizer = HEAD,
    local: Local = LARGER,
    memory: Memory = "none",
    reference: Literal["zero", "init"] = "init",
    max_base_share: Share | None = None,
) -> Phases:
    """FLoRA (arXiv 2409.05976): clients' factors are stacked into frozen weights; adapters are redrawn each round.

    The downlink carries the fold and the head: clients draw the new ``A`` from its seed. With ``reference = "zero"``,
    ``A`` is sent, with the number of ranks of the client's tier.
    """
    tuning, rule = (
        LoRA(rank=rank, alpha=alpha, targets=targets),
        Stack(weighting=weighting, max_base_share=max_base_share),
    )
    down, up = Link(precision=precision, reference=reference), Link(precision=precision)
    return fedavg(
        rounds=rounds,
        tuning=tuning,
        down=down,
        up=up,
        aggregator=rule,
        server_head=server_head,
        local=local,
        memory=memory,
    )


def flexlora(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    weighting: Weighting = "uniform",
    split: Literal["left", "symmetric"] = "left",
    precision: AnyPrecision = Float32(),
    server_head: AnyServerOptimizer = HEAD,
    local: Local = SLOWER,
    memory: Memory = "none",
) -> Phases:
    """FlexLoRA (arXiv 2402.11505): the mean of the products, truncated to the rank by an SVD in each round."""
    tuning, link = LoRA(rank=rank, alpha=alpha, targets=targets), Link(precision=precision)
    rule = SvdRedistribute(weighting=weighting, split=split)
    return fedavg(
        rounds=rounds,
        tuning=tuning,
        down=link,
        up=link,
        aggregator=rule,
        server_head=server_head,
        local=local,
        memory=memory,
    )


def het_lora(
    *,
    rounds: Count = 40,
    rank: Count = 16,
    alpha: float = 16.0,
    targets: str | tuple[str, ...] = "default",
    shrink: RankPruning | None = RankPruning(),
    padding: Literal["zero", "keep"] = "zero",
    precision: AnyPrecision = Float32(),
    server: AnyServerOptimizer = ADAPTIVE,
    local: Local = Local(),
) -> Phases:
    """HetLoRA (arXiv 2401.06432): heterogeneous ranks, weights by the norm of the adapters, and rank self-pruning.

    ``rank`` is the largest; ``clients.tiers`` assign smaller ones. FLASC's code uses this name for zero-padding alone:
    ``lora`` with tiers.
    """
    tuning, link = LoRA(rank=rank, alpha=alpha, targets=targets), Link(precision=precision)
    rule = SparsityWeighted(padding=padding)
    return fedavg(
        rounds=rounds, tuning=tuning, down=link, up=link, aggregator=rule, server=server, local=local, shrink=shrink
    )


def _quota(whole_head: bool) -> Quota:
    return Quota(head=1.0) if whole_head else Quota()
