"""Which rate each group gets: the least sum of losses whose costs fit a budget, exactly.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11).
Dynamic programming over the groups keeps every (cost, loss) that no other beats in both; of these, only what a bound
from the Lagrangian relaxation does not rule out. A set of choices is thus given up only where one as good is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STEPS = 100  # halvings of the interval that holds the multiplier; it does not decide what is found, only how fast


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For each group the index of its choice: the sum of losses is the least of all with a sum of costs <= budget.

    costs, losses: one row a group, one column a choice; losses are finite. Of equal losses the cheapest wins. The sum
    is the least up to the rounding of float64 sums. Raises ValueError where even the cheapest choices do not fit.
    """
    C, D = np.array(costs, dtype=np.int64), np.array(losses, dtype=np.float64)
    if C.shape != D.shape or C.ndim != 2 or not np.isfinite(D).all():
        raise ValueError(f"expected finite losses for every cost, came costs {C.shape} and losses {D.shape}")
    least = C.min(1)
    if least.sum() > budget:
        raise ValueError(f"expected a budget of at least {least.sum()}, came {budget}")
    price, bound = _relax(C, D, budget)
    # What the groups from k on must cost, and lose at this price, at least.
    rest_cost = np.append(np.cumsum(least[::-1])[::-1], 0)
    rest_loss = np.append(np.cumsum((D + price * C).min(1)[::-1])[::-1], 0.0)
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # of each kept state: the state before, the choice
    for k in range(len(C)):
        every_cost, every_loss = cost[:, None] + C[k], loss[:, None] + D[k]
        possible = every_loss + rest_loss[k + 1] - price * (budget - every_cost) <= bound
        possible &= every_cost + rest_cost[k + 1] <= budget
        before, choice = np.nonzero(possible)
        cost, loss = every_cost[possible], every_loss[possible]
        order = np.lexsort((loss, cost))
        kept = order[_improves(loss[order])]
        cost, loss = cost[kept], loss[kept]
        steps.append((before[kept], choice[kept]))
    state, chosen = int(np.argmin(loss)), []
    for before, choice in reversed(steps):
        chosen.append(int(choice[state]))
        state = int(before[state])
    return chosen[::-1]


def _improves(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which losses are less than all before them."""
    best = np.minimum.accumulate(losses)
    return np.append(True, losses[1:] < best[:-1])


def _relax(C: NDArray[np.int64], D: NDArray[np.float64], budget: int) -> tuple[float, float]:
    """A price of a unit of cost at which the groups, each on its own, just fit; and a loss that fits, the bound.

    The bound is raised by what rounding could take away, so that the best set of rates stays within it.
    """
    rows = np.arange(len(C))

    def choices(price: float) -> NDArray[np.int64]:
        return np.lexsort((C, D + price * C), axis=1)[:, 0]  # of equals the cheapest

    def fits(chosen: NDArray[np.int64]) -> bool:
        return int(C[rows, chosen].sum()) <= budget

    low, high = 0.0, 1.0
    if fits(choices(low)):
        high = low
    while not fits(choices(high)):
        if high > 1e300:  # only the cheapest fit
            return 0.0, float(D[rows, np.lexsort((D, C), axis=1)[:, 0]].sum()) * (1 + 1e-9)
        high *= 4
    for _ in range(STEPS if high else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(choices(middle)) else (middle, high)
    chosen = _fill(choices(high), C, D, budget)
    total = float(D[rows, chosen].sum())
    return high, total + 1e-9 * float(np.abs(D).max(1).sum())


def _fill(chosen: NDArray[np.int64], C: NDArray[np.int64], D: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """Spend what a choice leaves of the budget, the best single change first: a better start for the bound."""
    rows = np.arange(len(C))
    while True:
        more = C - C[rows, chosen][:, None]
        gain = D[rows, chosen][:, None] - D
        gain[more > budget - C[rows, chosen].sum()] = 0.0
        best = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if gain[best] <= 0:
            return chosen
        chosen[best[0]] = best[1]
