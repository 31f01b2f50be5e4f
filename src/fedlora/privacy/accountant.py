"""Privacy accounting of a run: epsilon at a given delta, at the level of clients, with ``dp-accounting``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fedlora.core.errors import ConfigError
from fedlora.privacy.central import CentralGaussian

if TYPE_CHECKING:
    from fedlora.recipe import Phase, Recipe
    from fedlora.recipe.local import Local

Sampling = Literal["fixed", "poisson"]


_FEW = 50  # number of clients below which the usual delta is too large to be meaningful
_LITTLE_NOISE = 0.3  # noise multiplier below which the tight accountant needs gigabytes


class SamplingScheme(NamedTuple):
    """How clients are sampled for a round, which determines the privacy cost of a round.

    Attributes:
        num_clients: size of the whole population.
        per_round: number of clients in a round; with ``poisson``, its expectation.
        sampling: ``fixed``, a fixed number without replacement; ``poisson``, each independently with the same
            probability.
    """

    num_clients: int
    per_round: int
    sampling: Sampling


@lru_cache(maxsize=4096)
def epsilon(spent: tuple[tuple[float, int], ...], sampled: SamplingScheme, delta: float, accountant: str) -> float:
    """Epsilon after some rounds.

    With Poisson sampling, a neighbouring population lacks one client, and a round is a Poisson-sampled Gaussian
    mechanism with noise multiplier ``z``. With a cohort of fixed size, a neighbouring population has one client
    replaced, so that the sum may change by ``2 C``: a Gaussian with ``z / 2``, sampled without replacement (Wang et
    al., arXiv 1808.00087). If all clients take part in every round there is no sampling, and a neighbour has one
    client's update replaced by zeros.

    Args:
        spent: noise multipliers, each with the number of rounds that used it.
        sampled: how clients were sampled.
        delta: the probability that the epsilon bound fails.
        accountant: ``rdp``, ``pld`` or ``auto``.

    Raises:
        ConfigError: ``dp-accounting`` is not installed, or the accountant does not support this sampling.
    """
    if any(multiplier == 0 and rounds for multiplier, rounds in spent):
        return float("inf")
    multipliers = [multiplier for multiplier, rounds in spent if rounds]
    account = _accountant(sampled, chosen(multipliers, sampled, accountant))
    for multiplier, rounds in spent:
        if rounds:
            account.compose(_event(sampled, multiplier), rounds)
    return float(account.get_epsilon(delta))


def chosen(multipliers: Sequence[float], sampled: SamplingScheme, accountant: str) -> str:
    """The accountant in effect, ``rdp`` or ``pld``: resolves ``auto`` for the given noise and sampling."""
    if accountant != "auto":
        return accountant
    little = min(multipliers, default=1.0) < _LITTLE_NOISE
    return "rdp" if little or not _is_tight(sampled) else "pld"


def calibrate(target: float, rounds: int, sampled: SamplingScheme, delta: float, accountant: str) -> float:
    """The smallest noise multiplier whose epsilon after ``rounds`` is at most ``target``.

    Raises:
        ConfigError: see ``epsilon``; or no multiplier up to 10,000 is enough.
    """
    accounting = _library()

    def least(name: str, interval: Any) -> float:
        try:
            found = accounting.calibrate_dp_mechanism(
                lambda: _accountant(sampled, name),
                lambda multiplier: accounting.SelfComposedDpEvent(_event(sampled, multiplier), rounds),
                target,
                delta,
                interval,
                # of the multiplier, which is small where the target is great
                tol=1e-3 * min(1.0, target, 100 / target),
            )
        except (ValueError, accounting.mechanism_calibration.NoBracketIntervalFoundError) as error:
            raise ConfigError(
                f"no noise was found for target_epsilon = {target:g}: choose a value from 0.01 to 1e6, or set "
                "noise_multiplier, which is 0 for none"
            ) from error
        return float(found)

    bound = least("rdp", accounting.LowerEndpointAndGuess(1e-2 if target <= 1e4 else 1e-4, 1.0))
    if accountant == "rdp" or not _is_tight(sampled):
        return bound
    # the tighter accountant is slow, above all for little noise, so it only searches below the other's result
    lower = max(bound / 2, _LITTLE_NOISE)
    if lower >= bound:
        return bound
    if epsilon(((lower, rounds),), sampled, delta, accountant) <= target:
        return lower
    return least(accountant, accounting.ExplicitBracketInterval(lower, bound))


def example_epsilon(
    phases: Sequence[Phase],
    cohorts: Sequence[tuple[int, ...]],
    turns: Sequence[tuple[int, Local]],
    secret: bool = False,
) -> float | None:
    """The largest example-level epsilon of any client, against an observer of everything that the client sent.

    The number of a client's examples is public, since it determines its steps; in a neighbouring data set, one example
    is replaced by one without a gradient. Each step is a Poisson-sampled Gaussian (arXiv 1607.00133).

    Args:
        phases: the phases of the run.
        cohorts: the cohorts of all attempts at rounds so far; of an empty Poisson sample nothing was disclosed.
        turns: the number of each client's examples, and its local training, which depends on its tier if it has one.
        secret: whether the members of cohorts are secret, so that every client may have taken part in each.

    Returns:
        None without example-level noise.

    Raises:
        ConfigError: phases differ in settings that the accounting depends on, or ``dp-accounting`` is not installed.
    """
    noises = [phase.recipe.local.example_privacy for phase in phases]
    noise = noises[-1]
    if noise is None or any(each is None or each.noise_multiplier == 0 for each in noises):
        return None
    settings = {
        (turn.example_privacy, turn.batch_size, turn.epochs, turn.max_steps)
        for turn in (phase.recipe.local for phase in phases)
    }
    if len(settings) > 1:
        raise ConfigError(
            "phases share one account of examples; give them the same example_privacy, batch_size, epochs and max_steps"
        )
    _library()  # fails before anything is trained
    taken = Counter(client for cohort in cohorts for client in (range(len(turns)) if secret else cohort))
    spent = {
        (min(1.0, turn.batch_size / size), taken[client] * turn.num_steps(size))
        for client, (size, turn) in enumerate(turns)
        if size
    }
    # more rounds and more steps cost more, so only a few clients need to be considered
    worst = [
        (chance, steps)
        for chance, steps in spent
        if not any((chance, steps) != other and chance <= other[0] and steps <= other[1] for other in spent)
    ]
    return max((_sgd_epsilon(noise.noise_multiplier, *one, noise.delta) for one in worst), default=0.0)


def composed_epsilon(spent: Iterable[tuple[float, float, int]], delta: float) -> float:
    """The example-level epsilon of steps under several settings together.

    Args:
        spent: noise multiplier, chance of an example to take part in a step, and number of steps.
        delta: the probability that the bound fails.

    Raises:
        ConfigError: ``dp-accounting`` is not installed.
    """
    accounting = _library()
    from dp_accounting.rdp import RdpAccountant  # type: ignore[import-untyped]

    account = RdpAccountant()
    for multiplier, chance, steps in spent:
        if steps:
            event = accounting.GaussianDpEvent(multiplier)
            account.compose(event if chance == 1.0 else accounting.PoissonSampledDpEvent(chance, event), steps)
    return float(account.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _sgd_epsilon(multiplier: float, chance: float, steps: int, delta: float) -> float:
    if not steps:
        return 0.0
    return composed_epsilon([(multiplier, chance, steps)], delta)


class PrivacyBudget(NamedTuple):
    """The privacy budget of a run: how clients are sampled, delta, the accountant, and the limit.

    Attributes:
        sampled: how clients are sampled.
        delta: the probability that the epsilon bound fails.
        accountant: ``rdp``, ``pld`` or ``auto``.
        max_epsilon: the epsilon that the run may spend; None for no limit.
    """

    sampled: SamplingScheme
    delta: float
    accountant: str
    max_epsilon: float | None

    def spent(self, phases: Sequence[Phase], rounds: int, repeated: Sequence[int] = ()) -> float:
        """Epsilon after ``rounds`` rounds of the run, and further attempts at the rounds ``repeated``, from 1."""
        used, before = [], 0
        for phase in phases:
            multiplier = getattr(phase.recipe.privacy, "noise_multiplier", None) or 0.0
            after = before + phase.rounds
            again = sum(before < round <= after for round in repeated)
            used.append((multiplier, max(0, min(rounds, after) - before) + again))
            before = after
        return epsilon(tuple(used), self.sampled, self.delta, self.accountant)

    def used(self, phases: Sequence[Phase]) -> str:
        """The accountant used for the whole run."""
        multipliers = [getattr(phase.recipe.privacy, "noise_multiplier", None) or 0.0 for phase in phases]
        return chosen(multipliers, self.sampled, self.accountant)

    def exhausted(self, phases: Sequence[Phase], rounds: int, repeated: Sequence[int] = ()) -> str:
        """The reason why one more round would be one too many, empty if it would not; see ``spent``."""
        if self.max_epsilon is None or self.spent(phases, rounds + 1, repeated) <= self.max_epsilon:
            return ""
        return f"another round would exceed privacy.max_epsilon = {self.max_epsilon:g}"


def open_account(phases: Sequence[Phase], sampled: SamplingScheme) -> tuple[PrivacyBudget | None, tuple[Phase, ...]]:
    """The privacy budget of a run, None without noise; and its phases, with noise calibrated to a target epsilon.

    Raises:
        ConfigError: phases differ in delta, accountant or budget, the accountant does not support this sampling, or the
            first round would exceed the budget.
    """
    private = [phase.recipe.privacy for phase in phases if isinstance(phase.recipe.privacy, CentralGaussian)]
    found = {(each.delta or sampled.num_clients**-1.1, each.accountant, each.max_epsilon) for each in private}
    if not found or all(each.noise_multiplier == 0 for each in private):
        return None, tuple(phases)
    if any(each.noise_multiplier == 0 for each in private):
        raise ConfigError(
            "some phases have noise and some have none, and those without reveal everything; give every phase noise"
        )
    if len(found) > 1:
        raise ConfigError("all phases share one account: give them the same delta, accountant and max_epsilon")
    if len({(each.target_epsilon, each.noise_multiplier) for each in private}) > 1 and any(
        each.target_epsilon for each in private
    ):
        raise ConfigError("target_epsilon is of the whole run; give it to every phase alike, and no multiplier")
    if sampled.num_clients < _FEW and any(each.delta is None for each in private):
        raise ConfigError(
            f"delta is 1 / N ** 1.1 by default, which gives no protection for {sampled.num_clients} clients; set "
            "privacy.delta"
        )
    budget = PrivacyBudget(sampled, *found.pop())
    if budget.delta * sampled.num_clients >= 1:
        raise ConfigError(
            f"delta = {budget.delta:g} gives no protection for {sampled.num_clients} clients: one drawn at random "
            f"could be published whole; set privacy.delta below {1 / sampled.num_clients:g}"
        )
    _accountant(sampled, budget.accountant)
    rounds = sum(phase.rounds for phase in phases)
    noisy = tuple(dataclasses.replace(phase, recipe=_with_noise(phase.recipe, rounds, budget)) for phase in phases)
    if budget.exhausted(noisy, 0):
        raise ConfigError(
            f"the first round spends more than max_epsilon = {budget.max_epsilon}; raise noise_multiplier"
        )
    return budget, noisy


def _with_noise(recipe: Recipe, rounds: int, budget: PrivacyBudget) -> Recipe:
    """The recipe with noise calibrated to ``target_epsilon`` over all ``rounds`` of the run."""
    privacy = recipe.privacy
    if not isinstance(privacy, CentralGaussian) or privacy.target_epsilon is None:
        return recipe
    found = calibrate(privacy.target_epsilon, rounds, budget.sampled, budget.delta, budget.accountant)
    return dataclasses.replace(
        recipe, privacy=dataclasses.replace(privacy, target_epsilon=None, noise_multiplier=found)
    )


def _library() -> Any:
    try:
        import dp_accounting  # type: ignore[import-untyped]
        from absl import logging

        logging.set_verbosity(logging.ERROR)  # orders that do not converge are skipped, with hundreds of warnings
    except ImportError as error:
        raise ConfigError("an account of epsilon needs dp-accounting: pip install 'fedlora[privacy]'") from error
    return dp_accounting


def _event(sampled: SamplingScheme, multiplier: float) -> Any:
    accounting = _library()
    if sampled.per_round == sampled.num_clients:
        return accounting.GaussianDpEvent(multiplier)
    if sampled.sampling == "poisson":
        share = sampled.per_round / sampled.num_clients
        return accounting.PoissonSampledDpEvent(share, accounting.GaussianDpEvent(multiplier))
    gaussian = accounting.GaussianDpEvent(multiplier / 2)
    return accounting.SampledWithoutReplacementDpEvent(sampled.num_clients, sampled.per_round, gaussian)


def _is_tight(sampled: SamplingScheme) -> bool:
    """Whether a tight accountant exists for this sampling scheme."""
    return sampled.sampling == "poisson" or sampled.per_round == sampled.num_clients


def _accountant(sampled: SamplingScheme, accountant: str) -> Any:
    accounting = _library()
    fixed = not _is_tight(sampled)
    if fixed and accountant == "pld":
        raise ConfigError(
            "the pld accountant does not support cohorts of a fixed size; set clients.sampling to 'poisson', or "
            "accountant to 'rdp'"
        )
    if fixed or accountant == "rdp":
        relation = accounting.NeighboringRelation
        from dp_accounting.rdp import RdpAccountant

        return RdpAccountant(neighboring_relation=relation.REPLACE_ONE if fixed else relation.ADD_OR_REMOVE_ONE)
    from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped]

    return PLDAccountant()
