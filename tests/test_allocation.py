"""The allocator against trying everything, and at the sizes of real models."""

from __future__ import annotations

import itertools
import random

import pytest

from eightfold.allocation import allocate


def brute_force(costs: list[list[int]], losses: list[list[float]], budget: int) -> tuple[float, int]:
    """The least sum of losses, and the least cost of those that have it."""
    found = []
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        cost = sum(row[k] for row, k in zip(costs, choice, strict=True))
        if cost <= budget:
            found.append((sum(row[k] for row, k in zip(losses, choice, strict=True)), cost))
    return min(found)


def check(costs: list[list[int]], losses: list[list[float]], budget: int) -> None:
    choice = allocate(costs, losses, budget)
    assert len(choice) == len(costs)
    cost = sum(row[k] for row, k in zip(costs, choice, strict=True))
    loss = sum(row[k] for row, k in zip(losses, choice, strict=True))
    assert cost <= budget
    assert (loss, cost) == brute_force(costs, losses, budget)


@pytest.mark.parametrize("seed", range(60))
def test_against_trying_everything(seed: int) -> None:
    """Losses are whole numbers, so that sums are exact; of any shape, convex or not, many of them equal."""
    rng = random.Random(seed)
    groups, choices, most = rng.randint(1, 6), rng.randint(1, 5), rng.choice([3, 20, 10**6])
    costs = [sorted(rng.randint(0, most) for _ in range(choices)) for _ in range(groups)]
    losses = [[float(rng.randint(0, most)) for _ in range(choices)] for _ in range(groups)]
    least, all_of_it = sum(map(min, costs)), sum(map(max, costs))
    for budget in {least, all_of_it, all_of_it + 5, *(rng.randint(least, all_of_it) for _ in range(4))}:
        check(costs, losses, budget)


@pytest.mark.parametrize("seed", range(20))
def test_losses_like_those_of_groups(seed: int) -> None:
    """A quarter or so for each bit more, over seven powers of ten, in costs that share few divisors."""
    rng = random.Random(seed)
    sizes = [rng.choice([1 << 20, 3 << 19, 7 << 18, 12345]) for _ in range(5)]
    costs = [[size * bits + 96 * (bits + 1) // 2 for bits in range(2, 9)] for size in sizes]
    losses = [[10 ** rng.uniform(-4, 0) * rng.uniform(3.2, 3.9) ** -bits for bits in range(2, 9)] for _ in sizes]
    budget = int(sum(sizes) * rng.uniform(2.1, 5))
    choice = allocate(costs, losses, budget)
    assert sum(row[k] for row, k in zip(costs, choice, strict=True)) <= budget
    loss = sum(row[k] for row, k in zip(losses, choice, strict=True))
    assert loss == pytest.approx(brute_force(costs, losses, budget)[0], rel=1e-12)


def test_nothing_beats_a_finer_price() -> None:
    """At the size of a large model no price of a bit gives less loss within the budget, and few bits are left over."""
    rng = random.Random(7)
    sizes = [rng.choice([18432 * 16384, 16384 * 16384, 106496 * 16384, 53248 * 16384]) for _ in range(504)]
    costs = [[size * bits // 8 for bits in range(2, 9)] for size in sizes]
    losses = [
        [size * 10 ** rng.uniform(-1, 1) * rng.uniform(3.2, 3.9) ** -bits for bits in range(2, 9)] for size in sizes
    ]
    budget = int(sum(sizes) * 2.4 / 8)
    choice = allocate(costs, losses, budget)
    cost = sum(row[k] for row, k in zip(costs, choice, strict=True))
    loss = sum(row[k] for row, k in zip(losses, choice, strict=True))
    assert budget - max(sizes) // 8 < cost <= budget
    for exponent in range(-40, 40):  # Lagrange: a choice that is best at some price is best among all of its cost
        price = 10 ** (exponent / 8)
        best = [min(range(7), key=lambda k, c=c, d=d: d[k] + price * c[k]) for c, d in zip(costs, losses, strict=True)]
        if sum(row[k] for row, k in zip(costs, best, strict=True)) <= budget:
            assert loss <= sum(row[k] for row, k in zip(losses, best, strict=True))
        lower = sum(row[k] + price * c[k] for row, c, k in zip(losses, costs, best, strict=True)) - price * budget
        assert loss >= lower * (1 - 1e-9)


def test_many_alike() -> None:
    """Groups that do not differ are no trouble: any of them may get the bits."""
    costs, losses = [[2, 3, 4]] * 1000, [[16.0, 4.0, 1.0]] * 1000
    choice = allocate(costs, losses, 2500)
    assert sum(costs[0][k] for k in choice) == 2500
    assert set(choice) == {0, 1}


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="expected a budget of at least 4, came 3"):
        allocate([[2, 3], [2, 3]], [[1.0, 0.0]] * 2, 3)
    with pytest.raises(ValueError, match="expected finite losses"):
        allocate([[2, 3]], [[1.0, float("nan")]], 3)
    with pytest.raises(ValueError, match="expected finite losses"):
        allocate([[2, 3]], [[1.0]], 3)
