"""Payloads that come in through a gateway's transport and land in the object store of a real Ray cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from icrf.exchange import UPDATE
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf_agent import ray_landing
from icrf_agent.gateway import GrpcTransport
from icrf_agent.ray_actors import RayReferences

pytestmark = pytest.mark.ray
LARGE, SMALL = 1_000_003, 1_000
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
def digest(array: np.ndarray[Any, Any]) -> tuple[int, float, bool]:
    """What another process finds in the store."""
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
        address = there.serve(receive, references.allocate)
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
    assert ray_landing.reference_of(found) is reference, "it was put before it was filled"
    in_store = ray.get(reference)
    assert np.shares_memory(in_store, found), "it was copied"
    assert np.array_equal(in_store, array) and not in_store.flags.writeable
    assert ray.get(digest.remote(reference)) == (LARGE, float(array.sum(dtype=np.float64)), False)


def test_what_landed_stays_when_the_gateway_has_let_go_of_it() -> None:
    array = np.arange(LARGE, dtype=np.int64)
    found, reference = brought_over(array)
    del found
    # As much again as the store has: what is not held by anybody goes.
    for _ in range(12):
        ray.put(np.ones(LARGE))
    assert np.array_equal(ray.get(reference), array)


def test_a_small_payload_is_put_when_it_is_complete() -> None:
    found, reference = brought_over(np.arange(SMALL, dtype=np.float32))
    assert ray_landing.reference_of(found) is None
    assert np.array_equal(ray.get(reference), found)


def test_where_the_store_is_not_mapped_for_writing_payloads_are_put_when_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_landing, "_is_writable", lambda sealed: False)
    array = np.arange(LARGE, dtype=np.float32)
    found, reference = brought_over(array)
    assert ray_landing.reference_of(found) is None
    assert np.array_equal(ray.get(reference), array)


def test_a_part_of_what_landed_is_put_as_what_it_is() -> None:
    array = ray_landing.allocate(LARGE, "float32")
    array[:] = 1.0
    part = array[: LARGE // 2]
    assert ray_landing.reference_of(part) is None
    assert ray.get(RayReferences().put(part, UPDATE)).shape == (LARGE // 2,)
