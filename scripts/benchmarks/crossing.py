"""The processes of ``scripts/bench between-clusters`` in the project's environment: a source, sinks, perhaps a relay.

``icrf``: see :mod:`benchmarks.crossing_fabric`. ``grpc``: one stream with identity serialisers in chunks of 1 MiB, as
fast as gRPC in Python goes; ``grpc-copy`` also copies what comes in into the memory where it is wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np

from benchmarks import crossing_fabric
from benchmarks.crossing_fabric import SOURCE, sink_of, tls_of
from benchmarks.crossings import REFERENCE, TEXT, Job, python_version, say, timed
from icrf.wire.addresses import CHUNK_BYTES, SERVER_OPTIONS
from icrf.wire.tls import listen_on, open_channel

UPLOAD, ECHO = "/bench/Upload", "/bench/Echo"


def grpc_sink(job: Job) -> None:
    """Serve until the command closes standard input."""
    wanted = np.empty(job.crossing.payload_bytes, np.uint8).data if job.system == REFERENCE else None

    def upload(frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        taken = 0
        for frame in frames:
            if wanted is not None:
                wanted[taken : taken + len(frame)] = frame
            taken += len(frame)
        return str(taken).encode()

    def echo(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from frames

    handlers: dict[str, Any] = {
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
        "Echo": grpc.stream_stream_rpc_method_handler(echo),
    }
    server = grpc.server(ThreadPoolExecutor(8), options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = listen_on(server, "127.0.0.1:0", tls_of(job, sink_of(job.number)))
    server.start()
    say(address=f"127.0.0.1:{port}")
    sys.stdin.read()
    server.stop(None).wait()


def grpc_source(job: Job) -> list[float]:
    """One stream per receiver, one after the other, or all messages there and back in one."""
    case = job.crossing
    view = memoryview(np.random.default_rng(0).bytes(case.payload_bytes))

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(view), CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])

    with ExitStack() as stack:
        channels = [
            stack.enter_context(open_channel(peer, tls_of(job, SOURCE), sink_of(k))) for k, peer in enumerate(job.peers)
        ]
        uploads: list[Any] = [channel.stream_unary(UPLOAD) for channel in channels]
        echo: Any = channels[0].stream_stream(ECHO)

        def work(number: int) -> None:
            if not case.megabytes:
                assert sum(1 for _ in echo(TEXT.encode() for _ in range(case.receivers))) == case.receivers
                return
            for k in range(case.receivers):
                assert int(uploads[k % len(uploads)](chunks())) == len(view)

        return timed(work, job.repeat)


def main() -> None:
    """Do what the first argument says."""
    job = Job.from_json(sys.argv[1])
    plain = job.system.startswith("grpc")
    if job.role == "relay":
        crossing_fabric.relay(job)
    elif job.role == "sink":
        (grpc_sink if plain else crossing_fabric.sink)(job)
    else:
        seconds = (grpc_source if plain else crossing_fabric.source)(job)
        versions = {"python": python_version(), "grpcio": grpc.__version__, "numpy": np.__version__}
        say(seconds=seconds, versions=versions)


if __name__ == "__main__":
    main()
