"""Payloads that come in through a gateway's transport and land in the object store of a real Ray cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from icrf.errors import IcrfError
from icrf.exchange import UPDATE
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf_agent import ray_landing
from icrf_agent.gateway import GrpcTransport
from icrf_agent.ray_actors import RayReferences
from icrf_agent.ray_landing import HEAD_BYTES, Landed, Room

pytestmark = pytest.mark.ray
LARGE = 1_000_003
PATIENCE_S = 60.0

Came = list[tuple[np.ndarray[Any, Any], Any]]


@pytest.fixture(scope="module", autouse=True)
def store() -> Iterator[None]:
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100 << 20,
    )
    yield
    ray.shutdown()


@ray.remote
def digest(reference: Any) -> tuple[int, float, bool]:
    """What another process finds in the store."""
    array = RayReferences().get(reference)
    return len(array), float(array.sum(dtype=np.float64)), bool(array.flags.writeable)


def brought_over(array: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Any]:
    """Send an array to a gateway's transport; the array that came in, and its reference."""
    references, came, done = RayReferences(), [], threading.Event()  # type: ignore[var-annotated]

    def receive(header: PayloadHeader, found: np.ndarray[Any, Any], wire_bytes: int) -> None:
        came.append((found, references.put(found, UPDATE)))
        done.set()

    there = GrpcTransport("127.0.0.1:0", None, "there", "1")
    here = GrpcTransport(None, None, "here", "1")
    try:
        address = there.serve(receive, lambda header: references.allocate(header.num_elements, header.dtype))
        header = PayloadHeader("run", 1, 1, 1, UPDATE, 0, "here", "there", array.dtype.name, array.size)
        here.send(header, array, PeerAddress("there", address), PATIENCE_S)
        assert done.wait(PATIENCE_S)
    finally:
        here.close()
        there.close()
    ((found, reference),) = came
    return found, reference


def test_a_large_payload_lands_where_other_processes_read_it() -> None:
    array = np.random.default_rng(1).random(LARGE, np.float32)
    found, reference = brought_over(array)
    in_store = RayReferences().get([reference])
    assert np.shares_memory(in_store, found), "it was copied"
    assert np.array_equal(in_store, array) and not in_store.flags.writeable
    assert ray.get(digest.remote([reference])) == (LARGE, float(array.sum(dtype=np.float64)), False)


def test_what_landed_stays_when_the_gateway_has_let_go_of_it() -> None:
    array = np.arange(LARGE, dtype=np.int64)
    found, reference = brought_over(array)
    del found
    # As much again as the store has: what is not held by anybody goes.
    for _ in range(12):
        ray.put(np.ones(LARGE))
    assert np.array_equal(RayReferences().get(reference), array)


def test_what_went_to_disk_before_it_was_complete_is_lost_and_not_taken_for_the_payload() -> None:
    references = RayReferences()
    array = references.allocate(LARGE, "float32")
    array[:] = 1.0
    reference = references.put(array, UPDATE)
    assert np.array_equal(references.get(reference), array)
    as_on_disk = replace(reference, reference=ray.put(np.zeros(HEAD_BYTES + array.nbytes, np.uint8)))
    with pytest.raises(IcrfError) as lost:
        references.get([as_on_disk])
    assert lost.value.code == "U003"


def test_where_the_store_is_not_mapped_for_writing_payloads_are_put_when_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    def is_writable(sealed: Any) -> bool:
        nonlocal asked
        asked += 1
        return False

    monkeypatch.setattr(ray_landing, "_is_writable", is_writable)
    array = np.arange(LARGE, dtype=np.float32)
    _, reference = brought_over(array)
    assert not isinstance(reference, Landed)
    assert np.array_equal(ray.get(reference), array)
    room = Room()
    for _ in range(3):
        room.allocate(LARGE, "float32")
    assert asked == 2, "what is not possible is not tried again"


def test_a_part_of_what_landed_is_put_as_what_it_is() -> None:
    references = RayReferences()
    array = references.allocate(LARGE, "float32")
    array[:] = 1.0
    reference = references.put(array[: LARGE // 2], UPDATE)
    assert not isinstance(reference, Landed) and ray.get(reference).shape == (LARGE // 2,)
