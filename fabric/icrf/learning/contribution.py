"""What each player of a cooperative game contributes: its Shapley value (Shapley 1953).

A player's value is its marginal contribution v(S + i) - v(S), averaged over all orders in which the players may come.
Up to 12 players it is computed exactly from the utilities of all 2^n coalitions, above that it is estimated from random
orders (Castro, Gomez and Tejada 2009). In a federation the players are the nodes that train, and the utility of a
coalition is what the model is worth that its members train alone (Ghorbani and Zou 2019; Wang et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from icrf.errors import ConfigError
from icrf.learning.rng import stable_random_state

MAX_EXACT_PLAYERS = 12
MAX_PLAYERS = 1000

Utility = Callable[[frozenset[int]], float]


@dataclass(frozen=True)
class Contributions:
    """The values of a game's players.

    Attributes:
        values: Shapley value per player, in units of the utility; they add up to v(all) - v(none).
        errors: standard error per value; 0 where they are exact.
        exact: whether all coalitions were looked at.
        evaluations: how many coalitions were.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    exact: bool
    evaluations: int


def shapley(
    num_players: int,
    utility: Utility,
    *,
    permutations: int = 200,
    seed: int = 0,
    max_exact: int = MAX_EXACT_PLAYERS,
) -> Contributions:
    """Shapley values of the players 0 to num_players - 1.

    Args:
        utility: value of a coalition; asked once per coalition, so it should not depend on when it is asked.
        permutations: orders to look at where the values are estimated, at most.
        seed: decides the orders.
        max_exact: up to how many players the values are exact; at most 12.

    Raises:
        ConfigError: C007 for numbers out of range, C009 for a utility that is not finite.
    """
    if not 1 <= num_players <= MAX_PLAYERS:
        raise ConfigError("C007", "no game", place="num_players", value=num_players, allowed=f"1 to {MAX_PLAYERS}")
    if permutations < 4 or max_exact > MAX_EXACT_PLAYERS:
        allowed = f"at least 4 permutations, max_exact up to {MAX_EXACT_PLAYERS}"
        raise ConfigError("C007", f"{permutations} permutations, max_exact {max_exact}", allowed=allowed)
    known = _Memo(utility)
    if num_players <= max_exact:
        values = _exact(num_players, known)
        return Contributions(values, (0.0,) * num_players, True, len(known.values))
    values, errors = _estimated(num_players, known, permutations, seed)
    return Contributions(values, errors, False, len(known.values))


class _Memo:
    """Utilities by coalition, each asked for once."""

    def __init__(self, utility: Utility) -> None:
        self._utility = utility
        self.values: dict[frozenset[int], float] = {}

    def __call__(self, coalition: frozenset[int]) -> float:
        if coalition not in self.values:
            value = float(self._utility(coalition))
            if not math.isfinite(value):
                raise ConfigError(
                    "C009", "a utility is not finite", place=f"coalition {sorted(coalition)}", value=value
                )
            self.values[coalition] = value
        return self.values[coalition]


def _exact(num_players: int, utility: _Memo) -> tuple[float, ...]:
    """The sum over all coalitions without the player; ``fsum`` rounds once, so players that are alike tie."""
    coalitions = [frozenset(i for i in range(num_players) if mask >> i & 1) for mask in range(1 << num_players)]
    weights = [1 / (num_players * math.comb(num_players - 1, size)) for size in range(num_players)]
    return tuple(
        math.fsum(
            weights[len(others)] * (utility(others | {player}) - utility(others))
            for others in coalitions
            if player not in others
        )
        for player in range(num_players)
    )


def _estimated(
    num_players: int, utility: _Memo, permutations: int, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means of the marginal contributions in random orders, and the standard errors of these means.

    Each order is drawn once and then shifted around, so that every player comes early, in the middle and late: what a
    player adds depends on that most of all. An order shifted is as random as any other, and the spread between such
    groups of orders gives the errors (position-stratified sampling, after Castro et al. 2017).
    """
    random = stable_random_state(seed, "shapley")
    shifts = max(1, min(num_players, permutations // 8))
    groups = permutations // shifts
    marginals: list[list[float]] = [[] for _ in range(num_players)]
    for _ in range(groups):
        order = random.permutation(num_players).tolist()
        starts = [k * num_players // shifts for k in range(shifts)]
        parts = [_marginals(order[start:] + order[:start], utility) for start in starts]
        for player in range(num_players):
            marginals[player].append(math.fsum(part[player] for part in parts) / shifts)
    means = [math.fsum(found) / groups for found in marginals]
    errors = [
        math.sqrt(math.fsum((x - mean) ** 2 for x in found) / (groups - 1) / groups)
        for found, mean in zip(marginals, means, strict=True)
    ]
    return tuple(means), tuple(errors)


def _marginals(order: list[int], utility: _Memo) -> dict[int, float]:
    """What each player adds to those who came before."""
    found: dict[int, float] = {}
    present: frozenset[int] = frozenset()
    for player in order:
        joined = present | {player}
        found[player] = utility(joined) - utility(present)
        present = joined
    return found
