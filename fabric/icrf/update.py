"""The exact update algebra: weighted sums of tensors whose bits do not depend on grouping or order.

Float addition is not associative, so a mean that is summed per host, per cluster and then over the fabric would
change its bits with the placement. Here every contribution is first rounded to a grid that is fixed *before* the
round, one grid per tensor; sums of grid points are exact in float64, hence associative and commutative.

For a tensor with grid exponent ``e`` the grid spacing is ``u = 2^(e-51)`` and a contribution of a node with weight
``n`` and parameters ``w`` is ``q = (n*w + M) - M`` with ``M = 1.5 * 2^52 * u = 3 * 2^e``. As long as
``|n*w| <= 2^e``, the value ``n*w + M`` lies in the binade whose spacing is exactly ``u``, so the addition rounds
``n*w`` to the nearest grid point and the subtraction is exact. The exponent is chosen such that the total of all
``n*|w|`` of a round stays below ``2^e = 2^51 * u``: every partial sum in every order is then a multiple of ``u``
below ``2^53 * u``, which float64 represents. Values that leave the bound are reported, never wrapped: the round is
run again with a coarser grid.

The rounding error of a mean over ``k`` nodes is at most ``k * 2^-42`` of the tensor's largest value (256-fold head
room, equal weights), below float32's own resolution for the sizes this fabric serves.

NumPy only: the mediator and the gateways use this module without loading torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrf.errors import ProtocolError, WeightsError

FloatArray = np.ndarray[Any, np.dtype[Any]]

# A tensor may grow 256-fold within one round before the round has to be repeated with a coarser grid.
HEADROOM_BITS = 8
# Each repetition coarsens the grid of the tensors that left the bound by this many bits.
ESCALATION_BITS = 8
# Largest value assumed for a tensor that is still zero (or below float32's normal range), such as a new bias.
ZERO_FLOOR = 2.0**-8
_TINY = 2.0**-126
# u = 2^(e-51) must be a normal float64, and M + 2^e = 2^(e+2) must be finite.
_MIN_EXPONENT = -1022 + 51
_MAX_EXPONENT = 1021
# 64 Ki float64 are 512 KiB: the five passes of `add` stay within a core's L2 cache (measured optimum for 25 M).
CHUNK = 1 << 16
# Tensors below this size share a chunk, so that a model of many small tensors needs few NumPy calls.
_SMALL = CHUNK // 4
_MAX_TOTAL_WEIGHT = 1 << 53
METRIC_UNIT_BITS = 40


def _ceil_log2(value: float) -> int:
    """ceil(log2(value)) of a positive normal float, from its exponent bits (no libm logarithm)."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1 if mantissa == 0.5 else exponent


def _check_total_weight(total_weight: int) -> None:
    if not 1 <= total_weight <= _MAX_TOTAL_WEIGHT:
        raise WeightsError(
            "W030", "total weight of a round is out of range", value=total_weight, allowed="1 to 2^53 samples"
        )


def choose_grid(absmax: Sequence[float], total_weight: int, escalation: Sequence[int] | None = None) -> tuple[int, ...]:
    """Choose the grid exponent of every tensor for one round.

    Args:
        absmax: largest absolute value per tensor of the committed state.
        total_weight: sum of all participants' weights, over all clusters.
        escalation: per tensor, how often this round was already void because the tensor left its bound.

    Returns:
        The exponent ``e`` per tensor: ``ceil(log2(256*max|w|)) + ceil(log2(total_weight)) + 8*escalation``.

    Raises:
        WeightsError: W020 for a maximum that is not finite, W030 for an impossible total weight.
    """
    _check_total_weight(total_weight)
    steps = (0,) * len(absmax) if escalation is None else escalation
    weight_bits = (total_weight - 1).bit_length()
    grid = []
    for number, (largest, step) in enumerate(zip(absmax, steps, strict=True)):
        if not 0.0 <= largest < math.inf:
            raise WeightsError("W020", f"largest absolute value of tensor {number} is not finite", value=largest)
        bound = _ceil_log2(largest if largest >= _TINY else ZERO_FLOOR) + HEADROOM_BITS
        exponent = bound + weight_bits + ESCALATION_BITS * step
        grid.append(min(max(exponent, _MIN_EXPONENT), _MAX_EXPONENT))
    return tuple(grid)


@dataclass(frozen=True)
class _Chunk:
    """A run of elements handled in one go: a piece of one large tensor, or several whole small ones.

    `magic` is M, a float for one tensor and a vector for several; `starts` are the tensors' offsets within the chunk.
    """

    start: int
    stop: int
    tensors: tuple[int, ...]
    starts: np.ndarray[Any, np.dtype[np.intp]]
    limits: FloatArray
    tightest: float
    magic: Any


def _make_chunk(start: int, members: Sequence[tuple[int, int]], grid: Sequence[int], limits: Sequence[float]) -> _Chunk:
    """Build the chunk of `members` (tensor number, elements) that begins at element `start`."""
    tensors = tuple(number for number, _ in members)
    sizes = [size for _, size in members]
    magics = [3.0 * math.ldexp(1.0, grid[number]) for number in tensors]
    return _Chunk(
        start=start,
        stop=start + sum(sizes),
        tensors=tensors,
        starts=np.cumsum([0, *sizes[:-1]], dtype=np.intp),
        limits=np.array([limits[number] for number in tensors]),
        tightest=min(limits[number] for number in tensors),
        magic=magics[0] if len(magics) == 1 else np.repeat(magics, sizes),
    )


def _plan_chunks(sizes: Sequence[int], grid: Sequence[int], limits: Sequence[float]) -> tuple[_Chunk, ...]:
    """Cut the flat buffer into chunks of at most :data:`CHUNK` elements; empty tensors belong to none."""
    chunks: list[_Chunk] = []
    group: list[tuple[int, int]] = []
    group_start = offset = 0

    def flush() -> None:
        if group:
            chunks.append(_make_chunk(group_start, group, grid, limits))
            group.clear()

    for number, size in enumerate(sizes):
        if size >= _SMALL:
            flush()
            for start in range(0, size, CHUNK):
                piece = [(number, min(CHUNK, size - start))]
                chunks.append(_make_chunk(offset + start, piece, grid, limits))
        elif size:
            if group and offset + size - group_start > CHUNK:
                flush()
            if not group:
                group_start = offset
            group.append((number, size))
        offset += size
    flush()
    return tuple(chunks)


class ExactSum:
    """A running weighted sum of flat parameter vectors, exact and mergeable.

    Equal contributions give equal bits in any order and any grouping over hosts and clusters. Not thread-safe.

    Args:
        sizes: elements per tensor (or the slices of a layout), in the order of the flat buffer.
        grid: exponent per tensor from :func:`choose_grid`.
        total_weight: the total weight that the grid was chosen for; no sum may exceed it.
        names: tensor names, for error messages.
    """

    def __init__(
        self, sizes: Iterable[int | slice], grid: Sequence[int], total_weight: int, names: Sequence[str] = ()
    ) -> None:
        self.sizes = tuple(s.stop - s.start if isinstance(s, slice) else int(s) for s in sizes)
        self.names = tuple(names)
        self.num_parameters = sum(self.sizes)
        self._scratch = np.empty(min(CHUNK, self.num_parameters))
        self._sums: FloatArray = np.empty(0)
        self.reset(grid, total_weight)

    def reset(self, grid: Sequence[int], total_weight: int) -> None:
        """Start an empty sum on another grid; large buffers are kept, which saves their page faults."""
        if len(grid) != len(self.sizes):
            raise WeightsError("W010", f"grid of {len(grid)} exponents for {len(self.sizes)} tensors")
        _check_total_weight(total_weight)
        self.grid = tuple(int(e) for e in grid)
        self.total_weight = total_weight
        self.weight = 0
        self.void = False
        self._empty = True
        weight_bits = (total_weight - 1).bit_length()
        limits = [math.ldexp(1.0, e - weight_bits) for e in self.grid]
        self._chunks = _plan_chunks(self.sizes, self.grid, limits)

    @classmethod
    def from_array(
        cls,
        array: FloatArray,
        weight: int,
        sizes: Iterable[int | slice],
        grid: Sequence[int],
        total_weight: int,
        names: Sequence[str] = (),
    ) -> ExactSum:
        """Wrap the ``sums`` of another process, for instance a partial that came in; takes the array over."""
        result = cls(sizes, grid, total_weight, names)
        if array.dtype != np.float64 or array.shape != (result.num_parameters,):
            raise WeightsError(
                "W010",
                "partial differs from the model's layout",
                value=f"{array.dtype} {array.shape}",
                allowed=f"float64 ({result.num_parameters},)",
            )
        result._grow(weight)
        result._sums = array
        result._empty = False
        return result

    @property
    def sums(self) -> FloatArray:
        """The sums of ``n*w`` on the grid, float64 of shape (num_parameters,); a live view, not a copy."""
        self._allocate()
        if self._empty:
            self._sums.fill(0.0)
            self._empty = False
        return self._sums

    def add(self, flat: FloatArray, weight: int) -> tuple[int, ...]:
        """Add ``weight * flat``.

        Args:
            flat: float32 or float64 parameters, shape (num_parameters,).
            weight: sample count of the contribution, at least 1.

        Returns:
            Numbers of the tensors that left their bound. If there are any, the whole sum is void.

        Raises:
            WeightsError: W010 wrong shape or dtype, W020 non-finite values, W030 weight out of range.
        """
        if flat.shape != (self.num_parameters,) or flat.dtype not in (np.float32, np.float64):
            raise WeightsError(
                "W010",
                "update differs from the model's layout",
                value=f"{flat.dtype} {flat.shape}",
                allowed=f"float ({self.num_parameters},)",
            )
        if weight < 1:
            raise WeightsError("W030", "sample count must be positive", value=weight, allowed="1 to 2^31-1")
        self._grow(weight)
        self._allocate()
        suspects: set[int] = set()
        for chunk in self._chunks:
            values = flat[chunk.start : chunk.stop]
            outside = _outside(values, chunk)
            if outside:
                suspects.update(outside)
                continue
            scaled = self._scratch[: chunk.stop - chunk.start]
            sums = self._sums[chunk.start : chunk.stop]
            np.copyto(scaled, values)
            scaled *= weight
            scaled += chunk.magic
            if self._empty:
                np.subtract(scaled, chunk.magic, out=sums)
            else:
                scaled -= chunk.magic
                sums += scaled
        self._empty = False
        if suspects:
            self.void = True
            self._refuse_nonfinite(flat, suspects)
        return tuple(sorted(suspects))

    def merge(self, other: ExactSum) -> None:
        """Add another partial of the same round; exact, so the order of merges does not matter.

        Raises:
            WeightsError: W010 when the partials have different layouts or grids, W030 beyond the total weight.
        """
        mine, theirs = (self.sizes, self.grid, self.total_weight), (other.sizes, other.grid, other.total_weight)
        if mine != theirs:
            raise WeightsError("W010", "partials of different grids cannot be merged")
        self._grow(other.weight)
        self.void |= other.void
        if other._empty:
            return
        self._allocate()
        if self._empty:
            np.copyto(self._sums, other._sums)
            self._empty = False
        else:
            self._sums += other._sums

    def mean(self, dtype: Any, out: FloatArray | None = None) -> FloatArray:
        """The weighted mean, divided in float64 and rounded once to `dtype`; shape (num_parameters,).

        Raises:
            WeightsError: W021 when the sum is void, W030 when nothing was added.
        """
        result = np.empty(self.num_parameters, dtype) if out is None else out
        for start in range(0, self.num_parameters, CHUNK):
            stop = min(start + CHUNK, self.num_parameters)
            result[start:stop] = self.mean_part(start, stop, self._scratch[: stop - start])
        return result

    def mean_part(self, start: int, stop: int, out: FloatArray) -> FloatArray:
        """The weighted mean of the elements `start` to `stop`, written to the float64 array `out`.

        Raises:
            WeightsError: W021 when the sum is void, W030 when nothing was added.
        """
        if self.void:
            raise WeightsError("W021", "the sum is void: values left the exact grid")
        if self.weight < 1:
            raise WeightsError("W030", "mean of no contribution")
        return np.divide(self.sums[start:stop], self.weight, out=out)

    def _allocate(self) -> None:
        if self._sums.size != self.num_parameters:
            self._sums = np.empty(self.num_parameters)

    def _grow(self, weight: int) -> None:
        """Count `weight` in, before anything is touched: the bound holds for the planned total only."""
        if weight < 0 or self.weight + weight > self.total_weight:
            raise WeightsError(
                "W030",
                "weights exceed the total that the grid was chosen for",
                value=self.weight + weight,
                allowed=f"0 to {self.total_weight}",
            )
        self.weight += weight

    def _refuse_nonfinite(self, flat: FloatArray, tensors: Iterable[int]) -> None:
        ends = np.cumsum(self.sizes)
        for number in sorted(tensors):
            part = flat[ends[number] - self.sizes[number] : ends[number]]
            bad = part.size - int(np.count_nonzero(np.isfinite(part)))
            if bad:
                name = self.names[number] if self.names else f"tensor {number}"
                raise WeightsError(
                    "W020",
                    f"non-finite values in {name} ({bad} of {part.size})",
                    place=name,
                    hint="Lower the learning rate or check the data of the node",
                )


def _outside(values: FloatArray, chunk: _Chunk) -> tuple[int, ...]:
    """Tensors of the chunk with a value that is not within the bound (NaN is not, either)."""
    # Mostly all values are within the tightest of the bounds, which takes two fast passes; NaN fails every comparison.
    if float(values.min()) >= -chunk.tightest and float(values.max()) <= chunk.tightest:
        return ()
    if len(chunk.tensors) == 1:
        return chunk.tensors
    low = np.minimum.reduceat(values, chunk.starts)
    high = np.maximum.reduceat(values, chunk.starts)
    inside = (low >= -chunk.limits) & (high <= chunk.limits)
    return () if inside.all() else tuple(t for t, ok in zip(chunk.tensors, inside, strict=True) if not ok)


# ---------------------------------------------------------------- metrics


def exact_metric(value: float, weight: int) -> int:
    """The numerator of a weighted metric in units of 2^-40: ``value * weight * 2^40``, rounded half to even.

    Numerators are Python integers, so their sums are exact in any grouping.

    Raises:
        WeightsError: W020 for a value that is not finite.
    """
    if not math.isfinite(value):
        raise WeightsError("W020", "metric is not finite", value=value)
    top, bottom = float(value).as_integer_ratio()
    quotient, rest = divmod((top * int(weight)) << METRIC_UNIT_BITS, bottom)
    return quotient + (2 * rest > bottom or (2 * rest == bottom and quotient & 1 == 1))


def metric_mean(numerator: int, weight: int) -> float:
    """The weighted mean of summed numerators, correctly rounded to a float."""
    if weight < 1:
        raise WeightsError("W030", "mean of no contribution", value=weight)
    return numerator / (weight << METRIC_UNIT_BITS)


def sum_metrics(parts: Iterable[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """name -> (numerator, weight), each summed over the parts that have one; exact in any grouping."""
    sums: dict[str, tuple[int, int]] = {}
    for part in parts:
        for name, (numerator, weight) in part.items():
            old = sums.get(name, (0, 0))
            sums[name] = (old[0] + numerator, old[1] + weight)
    return sums


def elementwise_max(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """The largest value per tensor, over those that say any."""
    return tuple(max(column) for column in zip(*(row for row in rows if row), strict=True))


# ---------------------------------------------------------------- peer averaging


def weighted_mix(rows: Sequence[FloatArray], weights: Sequence[float], out: FloatArray) -> None:
    """Write ``sum_i weights[i] * rows[i]`` to `out`: float64, in the given order, rounded once to `out`'s dtype.

    Callers pass rows by ascending node index; the order decides the bits, the chunking does not. `out` may be one
    of the rows.

    Args:
        rows: flat parameter vectors of equal length.
        weights: one row of the mixing matrix, as many as there are rows.
        out: flat vector of the model's dtype, overwritten.
    """
    if not rows or any(row.shape != out.shape for row in rows):
        raise WeightsError(
            "W010", "rows to mix differ in length", value=[r.shape for r in rows], allowed=str(out.shape)
        )
    total = np.empty(min(CHUNK, out.size))
    term = np.empty_like(total)
    terms = list(zip(rows, weights, strict=True))
    for start in range(0, out.size, CHUNK):
        stop = min(start + CHUNK, out.size)
        sums, product = total[: stop - start], term[: stop - start]
        for number, (row, weight) in enumerate(terms):
            target = product if number else sums
            np.copyto(target, row[start:stop])
            target *= weight
            if number:
                sums += product
        out[start:stop] = sums


# ---------------------------------------------------------------- identity of many states


def merkle_root(leaves: Sequence[bytes]) -> str:
    """Hex root of the Merkle tree over (index, node-state hash), the identity of a decentralized round.

    A leaf is ``sha256(0x00 || index as u64 little endian || 32-byte hash)``, an inner vertex ``sha256(0x01 || left ||
    right)``; the last vertex of an odd level moves up unchanged. The tags keep a leaf from passing for an inner vertex.
    No leaf at all gives the hash of the empty string, as in RFC 6962.

    Args:
        leaves: sha256 digests of the node states in index order.

    Raises:
        ProtocolError: P001 for a leaf that is not 32 bytes long.
    """
    level = []
    for index, leaf in enumerate(leaves):
        if len(leaf) != 32:
            raise ProtocolError("P001", f"state hash of node {index} has a wrong length", value=len(leaf), allowed="32")
        level.append(hashlib.sha256(b"\x00" + index.to_bytes(8, "little") + leaf).digest())
    if not level:
        return hashlib.sha256().hexdigest()
    while len(level) > 1:
        above = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = above + level[len(above) * 2 :]
    return level[0].hex()
