"""The exact algebra: any grouping gives equal bits, errors stay below 1e-6, nothing wraps or passes silently."""

from __future__ import annotations

import hashlib
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.errors import IcrfError
from icrf.update import (
    CHUNK,
    ZERO_FLOOR,
    ExactSum,
    choose_grid,
    elementwise_max,
    exact_metric,
    merkle_root,
    metric_mean,
    sum_metrics,
    weighted_mix,
)

# Several tensors in one chunk, a large one over two chunks, an empty one, and small ones behind it.
SIZES = (3, 0, 40, CHUNK + 17, 5, 1)
SCALES = (1.0, 1.0, 1e-12, 1e3, 1e-6, 30.0)


def contributions(seed: int, count: int, dtype: str = "float32") -> tuple[list[np.ndarray], list[int]]:
    rng = np.random.default_rng(seed)
    scale = np.repeat(SCALES, SIZES)
    rows = [(rng.standard_normal(sum(SIZES)) * scale).astype(dtype) for _ in range(count)]
    return rows, [int(n) for n in rng.integers(1, 500, count)]


def absmax(rows: list[np.ndarray]) -> list[float]:
    ends = np.cumsum(SIZES)
    return [
        float(max((abs(r[e - n : e]).max() for r in rows), default=0)) if n else 0.0
        for n, e in zip(SIZES, ends, strict=True)
    ]


def summed(rows: list[np.ndarray], weights: list[int], grid: tuple[int, ...], total: int) -> ExactSum:
    result = ExactSum(SIZES, grid, total)
    for row, weight in zip(rows, weights, strict=True):
        assert result.add(row, weight) == ()
    return result


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), num_groups=st.integers(1, 5), shuffle=st.randoms())
def test_any_grouping_and_order_gives_equal_bits(
    seed: int, count: int, num_groups: int, shuffle: random.Random
) -> None:
    rows, weights = contributions(seed, count)
    total = sum(weights)
    grid = choose_grid(absmax(rows), total)
    reference = summed(rows, weights, grid, total)

    order = list(range(count))
    shuffle.shuffle(order)
    groups = [ExactSum(SIZES, grid, total) for _ in range(num_groups)]
    for position in order:
        assert groups[shuffle.randrange(num_groups)].add(rows[position], weights[position]) == ()
    merged = ExactSum(SIZES, grid, total)
    for part in shuffle.sample(groups, num_groups):
        merged.merge(ExactSum.from_array(part.sums.copy(), part.weight, SIZES, grid, total))

    assert merged.weight == reference.weight == total
    assert merged.sums.tobytes() == reference.sums.tobytes()
    assert merged.mean(np.float32).tobytes() == reference.mean(np.float32).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mean_is_within_a_millionth_of_float64_for_every_scale(dtype: str) -> None:
    rows, weights = contributions(7, 50, dtype)
    total = sum(weights)
    mean = summed(rows, weights, choose_grid(absmax(rows), total), total).mean(np.float64)
    expected = sum(n * r.astype(np.float64) for r, n in zip(rows, weights, strict=True)) / total
    for size, end, largest in zip(SIZES, np.cumsum(SIZES), absmax(rows), strict=True):
        part = slice(end - size, end)
        assert abs(mean[part] - expected[part]).max(initial=0.0) <= 1e-9 * largest
    significant = abs(expected) > 1e-3 * np.repeat(absmax(rows), SIZES)
    assert (abs(mean / expected - 1))[significant].max() < 1e-6


def test_a_tensor_beyond_its_bound_voids_the_sum_and_a_coarser_grid_takes_it() -> None:
    rows, weights = contributions(3, 4)
    total, largest = sum(weights), absmax(rows)
    grid = choose_grid(largest, total)
    rows[2][5] = 1e-12 * 2**13  # tensor 2, far beyond 256 times its largest value
    rows[2][-1] = 30.0 * 2**13
    exact = ExactSum(SIZES, grid, total)
    assert [exact.add(r, n) for r, n in zip(rows, weights, strict=True)] == [(), (), (2, 5), ()]
    with pytest.raises(IcrfError, match="W021"):
        exact.mean(np.float32)

    coarser = choose_grid(largest, total, escalation=[0, 0, 1, 0, 0, 1])
    assert [b - a for a, b in zip(grid, coarser, strict=True)] == [0, 0, 8, 0, 0, 8]
    exact.reset(coarser, total)
    assert [exact.add(r, n) for r, n in zip(rows, weights, strict=True)] == [()] * 4
    assert exact.mean(np.float32).tobytes() == summed(rows, weights, coarser, total).mean(np.float32).tobytes()


def test_a_void_partial_voids_what_it_is_merged_into() -> None:
    grid = choose_grid([1.0], 2)
    bad, good = ExactSum([4], grid, 2), ExactSum([4], grid, 2)
    assert bad.add(np.full(4, 1e6, np.float32), 1) == (0,)
    good.merge(bad)
    assert good.void


def test_values_at_the_bound_are_exact() -> None:
    grid = choose_grid([1.0], 4)
    exact = ExactSum([2], grid, 4)
    bound = np.array([256.0, -256.0])
    for _ in range(4):
        assert exact.add(bound, 1) == ()
    assert exact.sums.tolist() == [1024.0, -1024.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("position", "name", "size"), [(1, "a", 3), (CHUNK, "d", CHUNK + 17)])
def test_non_finite_values_are_refused_by_name_and_count(value: float, position: int, name: str, size: int) -> None:
    rows, weights = contributions(1, 1)
    rows[0][position] = value
    exact = ExactSum(SIZES, choose_grid([1e3] * 6, weights[0]), weights[0], names="abcdef")
    with pytest.raises(IcrfError, match=rf"W020 .*non-finite values in {name} \(1 of {size}\)"):
        exact.add(rows[0], weights[0])
    assert exact.void


def test_weights_may_not_exceed_the_planned_total() -> None:
    exact = ExactSum([2], choose_grid([1.0], 3), 3)
    exact.add(np.ones(2), 2)
    with pytest.raises(IcrfError, match="W030"):
        exact.add(np.ones(2), 2)
    with pytest.raises(IcrfError, match="W030"):
        exact.add(np.ones(2), 0)
    with pytest.raises(IcrfError, match="W030"):
        ExactSum([2], choose_grid([1.0], 3), 3).mean(np.float32)


def test_foreign_shapes_types_and_grids_are_refused() -> None:
    exact = ExactSum([2], choose_grid([1.0], 3), 3)
    for wrong in (np.ones(3), np.ones((1, 2)), np.ones(2, np.int64)):
        with pytest.raises(IcrfError, match="W010"):
            exact.add(wrong, 1)
    with pytest.raises(IcrfError, match="W010"):
        exact.merge(ExactSum([2], choose_grid([100.0], 3), 3))
    with pytest.raises(IcrfError, match="W010"):
        ExactSum.from_array(np.ones(2, np.float32), 1, [2], (3,), 3)


@given(st.floats(2.0**-120, 2.0**120), st.integers(1, 2**40))
def test_grid_bounds_256_times_the_largest_value_times_the_total_weight(largest: float, total: int) -> None:
    (exponent,) = choose_grid([largest], total)
    bound = Fraction(2) ** exponent
    assert bound >= 256 * Fraction(largest) * total
    assert bound < 4 * 256 * Fraction(largest) * total


def test_grid_of_zero_and_extreme_tensors() -> None:
    zero, tiny, floor = choose_grid([0.0, 1e-40, ZERO_FLOOR], 100)
    assert zero == tiny == floor == 0 + 7
    (huge,) = choose_grid([1e308], 2**53)
    assert math.isfinite(4 * math.ldexp(1.0, huge))
    with pytest.raises(IcrfError, match="W020"):
        choose_grid([math.nan], 1)
    with pytest.raises(IcrfError, match="W030"):
        choose_grid([1.0], 0)


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.integers(1, 2**31 - 1)), min_size=1, max_size=6), st.randoms())
def test_metrics_sum_exactly(values: list[tuple[float, int]], shuffle: random.Random) -> None:
    numerators = [exact_metric(v, n) for v, n in values]
    assert numerators == [round(Fraction(v) * n * 2**40) for v, n in values]
    total = sum(n for _, n in values)
    mean = metric_mean(sum(numerators), total)
    assert mean == pytest.approx(float(sum(Fraction(v) * n for v, n in values) / total), rel=1e-6, abs=1e-11)


def test_metrics_are_summed_by_name_over_those_that_have_one() -> None:
    parts: list[dict[str, tuple[int, int]]] = [{"loss": (1 << 80, 2)}, {}, {"seen": (3, 1), "loss": (-1, 5)}]
    assert sum_metrics(parts) == {"loss": ((1 << 80) - 1, 7), "seen": (3, 1)}
    assert sum_metrics([sum_metrics(parts[:1]), sum_metrics(parts[1:])]) == sum_metrics(parts)
    assert parts[0] == {"loss": (1 << 80, 2)} and sum_metrics([]) == {}


def test_the_largest_value_per_tensor_is_that_of_those_that_say_any() -> None:
    assert elementwise_max([(1.0, 5.0), (), (2.0, 3.0)]) == (2.0, 5.0)
    assert elementwise_max([(), ()]) == ()
    with pytest.raises(ValueError, match="shorter"):
        elementwise_max([(1.0, 2.0), (1.0,)])


def test_a_metric_must_be_finite() -> None:
    with pytest.raises(IcrfError, match="W020"):
        exact_metric(math.nan, 1)


def test_mixing_rounds_once_and_does_not_show_its_chunks() -> None:
    rng = np.random.default_rng(0)
    length = 2 * CHUNK + 5
    rows = [rng.standard_normal(length).astype(np.float32) for _ in range(3)]
    weights = [0.25, 1 / 3, 5 / 12]
    expected = sum(w * r.astype(np.float64) for w, r in zip(weights, rows, strict=True)).astype(np.float32)
    out = np.empty(length, np.float32)
    weighted_mix(rows, weights, out)
    assert out.tobytes() == expected.tobytes()
    weighted_mix(rows, weights, rows[1])
    assert rows[1].tobytes() == expected.tobytes()


def test_merkle_root_depends_on_every_state_and_its_index() -> None:
    leaves = [hashlib.sha256(bytes([i])).digest() for i in range(5)]

    def leaf(i: int) -> bytes:
        return hashlib.sha256(b"\0" + i.to_bytes(8, "little") + leaves[i]).digest()

    def inner(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\1" + left + right).digest()

    expected = inner(inner(inner(leaf(0), leaf(1)), inner(leaf(2), leaf(3))), leaf(4))
    assert merkle_root(leaves) == expected.hex()
    assert merkle_root(leaves[:1]) == leaf(0).hex()
    assert merkle_root(leaves[::-1]) != merkle_root(leaves)
    assert merkle_root([]) == hashlib.sha256(b"").hexdigest()
    with pytest.raises(IcrfError, match="P001"):
        merkle_root([b"short"])
