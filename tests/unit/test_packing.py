"""Packed arrays: every bit comes back, nothing damaged does, and what is promised of sizes holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icrf.codecs import CHUNK_ELEMENTS, packed_bound
from icrf.errors import ProtocolError
from icrf.lossy import largest, to_bfloat16
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf.update import ExactSum, choose_grid
from icrf.wire.frames import DTYPES
from icrf.wire.packing import pack, unpack
from icrf_agent.gateway_coding import DELTA, PACKED, PayloadCoder

Array = np.ndarray[Any, Any]
arrays = hnp.arrays(st.sampled_from(sorted(DTYPES)), st.integers(0, 300))


@given(arrays, st.booleans(), st.randoms())
def test_any_array_comes_back_with_every_bit(array: Array, against: bool, random: Any) -> None:
    base = None
    if against:
        base = array.copy()
        for k in range(0, len(base), 3):
            base[k] = base[random.randrange(len(base))]
    packed = pack(array, base)
    found = unpack(packed, array.dtype.name, array.size, base)
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    assert packed.size <= packed_bound(array.size, array.itemsize)


def normal(size: int, scale: float = 1.0, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(scale=scale, size=size).astype(np.float32)


@pytest.mark.parametrize("size", [CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 1])
def test_values_pack_within_the_bounds_that_a_plan_names(size: int) -> None:
    model = normal(size, 0.05)
    few = np.where(largest(model, size // 50), model, np.float32(0))
    changed = model + few
    for array, base, bound in (
        (model, None, packed_bound(size, 4)),
        (to_bfloat16(model), None, packed_bound(size, 2)),
        (to_bfloat16(changed), to_bfloat16(model), packed_bound(size, 2)),
        (few.astype(np.float64) * 7, None, packed_bound(size, 8, nonzero=size // 50)),
        (changed, model, packed_bound(size, 4, nonzero=size // 50)),
    ):
        packed = pack(array, base)
        assert unpack(packed, array.dtype.name, size, base).tobytes() == array.tobytes()
        assert packed.size <= bound


def test_an_exact_sum_of_models_packs_to_two_thirds() -> None:
    size, base = 100_000, normal(100_000, 0.05)
    total = ExactSum([size], choose_grid([float(np.abs(base).max())], 1_797), 1_797)
    for k in range(5):
        total.add(base + normal(size, 0.002, seed=k + 1), 180)
    assert pack(total.sums).size < 0.67 * total.sums.nbytes


def test_damaged_bytes_never_become_another_array() -> None:
    array = np.concatenate([normal(2_000), np.zeros(9_000, np.float32)])
    packed = pack(array)
    refused = 0
    for at in [*range(40), *range(40, packed.size, 97)]:
        damaged = packed.copy()
        damaged[at] ^= 0x41
        try:
            # A bit of a Zstandard frame may mean nothing.
            assert unpack(damaged, "float32", array.size).tobytes() == array.tobytes()
        except ProtocolError as error:
            assert error.code in ("P001", "P021")
            refused += 1
    assert refused > 100
    for wrong in (packed[:-1], packed[:5], np.append(packed, np.uint8(0))):
        with pytest.raises(ProtocolError, match="P001"):
            unpack(wrong, "float32", array.size)
    with pytest.raises(ProtocolError):
        unpack(packed, "float32", array.size + 1)
    with pytest.raises(ProtocolError, match="P021"):
        unpack(pack(array, array[::-1].copy()), "float32", array.size, array)


def test_bfloat16_is_that_of_torch_and_keeps_what_is_no_number() -> None:
    values = np.concatenate([normal(5_000), normal(100, 1e-40), np.float32([0, -0.0, 1, -1, 1.00390625, 3e38])])
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert to_bfloat16(values).tobytes() == expected.tobytes()
    odd = np.array([np.nan, np.inf, -np.inf], np.float32)
    odd.view(np.uint32)[0] = 0x7FFFFFFF
    assert to_bfloat16(odd).tobytes() == odd.tobytes()


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 0.5]), min_size=1, max_size=40), st.integers(1, 40))
def test_the_largest_are_as_many_as_asked_for_and_the_first_among_equals(values: list[float], count: int) -> None:
    count = min(count, len(values))
    chosen = np.flatnonzero(largest(np.array(values), count)).tolist()
    assert chosen == sorted(sorted(range(len(values)), key=lambda k: (-abs(values[k]), k))[:count])


# ---------------------------------------------------------------- the coder of a gateway


class Line:
    """Two coders and what goes over the line between them."""

    def __init__(self) -> None:
        self.here, self.there = PayloadCoder(), PayloadCoder()
        self.codings: list[str] = []
        self.bytes = 0

    def send(self, array: Array, target: str = "b", coding: str = DELTA, kind: str = "model") -> None:
        def deliver(header: PayloadHeader, data: Array) -> None:
            self.codings.append(header.coding)
            self.bytes = data.nbytes
            plain, found = self.there.decode(header, data)
            assert (plain.coding, plain.base) == ("", "")
            assert found.tobytes() == array.tobytes()
            self.there.accepted(plain, found)

        header = PayloadHeader("r", 1, 1, 1, kind, 0, "a", target, array.dtype.name, array.size, coding=coding)
        self.here.send(header, array, deliver)


def test_a_model_is_packed_against_the_one_that_was_acknowledged() -> None:
    line, first = Line(), normal(10_000)
    line.send(first)
    whole = line.bytes
    second = first + np.where(np.arange(10_000) % 100 == 0, first, np.float32(0))
    line.send(second)
    assert line.codings == [PACKED, DELTA]
    assert line.bytes < whole / 10
    # A second target has the first model still, while the newest is another.
    other = PeerAddress("c", "").cluster
    line.send(second, other)
    line.send(first, other)
    assert line.codings[2:] == [PACKED, DELTA]


def test_who_has_lost_the_base_gets_the_whole() -> None:
    line, model = Line(), normal(1_000)
    line.send(model)
    line.there = PayloadCoder()
    line.send(model * 2)
    assert line.codings == [PACKED, DELTA, PACKED]
    line.send(model * 3)
    assert line.codings[3:] == [DELTA]
    line.here.forget("r")
    line.send(model * 4)
    assert line.codings[4:] == [PACKED]
    line.there.forget("r")
    line.send(model * 5)
    assert line.codings[5:] == [DELTA, PACKED]
    # Another layout than before has nothing in common with it.
    line.send(normal(500))
    assert line.codings[7:] == [PACKED]


def test_what_is_never_alike_is_packed_by_itself_and_other_errors_are_the_senders() -> None:
    line = Line()
    for _ in range(2):
        line.send(normal(100), coding=PACKED, kind="update")
    assert line.codings == [PACKED, PACKED]
    header = PayloadHeader("r", 1, 1, 1, "model", 0, "a", "b", "float32", 3, coding="lz4")
    with pytest.raises(ProtocolError, match="P001"):
        line.there.decode(header, np.zeros(3, np.uint8))


@pytest.mark.parametrize("room, second", [(3_999, PACKED), (4_000, DELTA)])
def test_bases_take_no_more_memory_than_they_may(room: int, second: str) -> None:
    line = Line()
    line.here, line.there = PayloadCoder(max_kept_bytes=room), PayloadCoder(max_kept_bytes=room)
    for k in range(3):
        line.send(normal(1_000, seed=k))
    assert line.codings == [PACKED, second, second]
