"""RayFed between two Ray clusters: what one party makes becomes an argument at the other, as its users write it.

Both parties run this same program. Only this machine is listened on by Ray; RayFed's own server takes every interface,
and what is sent here goes over loopback alone.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import fed
import numpy as np
import ray

from benchmarks.crossings import LOCAL_RAY, TEXT, Job, python_version, say, timed

SENDER, RECEIVER = "sender", "receiver"
STORE_BYTES = 3 * 10**9
MOST_BYTES = 2 * 10**9
TIMEOUT_MS = 120_000


class Made:
    """Where values come from."""

    def __init__(self, size: int) -> None:
        self._array = np.random.default_rng(0).integers(0, 256, size, np.uint8)

    def array(self, number: int) -> Any:
        return self._array

    def text(self, number: int) -> str:
        return TEXT


class Taken:
    """Where they are wanted."""

    def size(self, array: Any) -> int:
        return len(array)

    def both(self, one: str, other: str) -> int:
        return len(one) + len(other)


def measured(job: Job) -> list[float]:
    """A payload; or messages one way; or messages from either party, joined, of which each result is waited for."""
    case = job.crossing
    made, taken = fed.remote(Made), fed.remote(Taken)
    here, there = (made.party(party).remote(case.payload_bytes) for party in (SENDER, RECEIVER))
    sink = taken.party(RECEIVER).remote()

    def payload(number: int) -> None:
        assert fed.get(sink.size.remote(here.array.remote(number))) == case.payload_bytes

    def messages(number: int) -> None:
        # An actor does what it is asked in order, so that all is done when the last is.
        asked = [sink.both.remote(here.text.remote(k), "") for k in range(case.receivers)]
        assert fed.get(asked[-1]) == len(TEXT)

    def joined(number: int) -> None:
        for k in range(case.receivers):
            assert fed.get(sink.both.remote(here.text.remote(k), there.text.remote(k))) == 2 * len(TEXT)

    work = payload if case.megabytes else joined if job.system == "rayfed-join" else messages
    return timed(work, job.repeat)


def main() -> None:
    """Be the party that the first argument names."""
    job = Job.from_json(sys.argv[1])
    ray.init(**LOCAL_RAY, object_store_memory=STORE_BYTES)
    fed.init(
        addresses=dict(zip((RECEIVER, SENDER), job.peers, strict=True)),
        party=SENDER if job.role == "source" else RECEIVER,
        config={"cross_silo_comm": {"messages_max_size_in_bytes": MOST_BYTES, "timeout_in_ms": TIMEOUT_MS}},
        logging_level="error",
    )
    seconds = measured(job)
    fed.shutdown()
    ray.shutdown()
    versions = {name: metadata.version(name) for name in ("rayfed-nightly", "ray", "grpcio", "numpy")}
    say(seconds=seconds, versions={"python": python_version(), **versions})


if __name__ == "__main__":
    main()
