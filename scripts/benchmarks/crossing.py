"""The processes of ``scripts/bench between-clusters``: a source, a sink, perhaps a relay; JSON says what each does.

``icrf``: on either side a Ray cluster of its own with the gateway and the topology manager as they run in the fabric;
payloads go from object store to object store. ``grpc``: one stream with identity serialisers in chunks of 1 MiB, as
fast as gRPC in Python goes; ``grpc-copy`` also copies what comes in into the memory where it is wanted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from icrf.wire.addresses import CHUNK_BYTES, SERVER_OPTIONS
from icrf.wire.identity import CLUSTER, THE_MEDIATOR, Identity
from icrf.wire.tls import TlsFiles, listen_on, open_channel
from icrf_mediator.certs import issue

TEXT = "m" * 100
SENDER, RUN = 0, "bench"
TIMEOUT_S = 300.0
UPLOAD, ECHO = "/bench/Upload", "/bench/Echo"


@dataclass(frozen=True)
class Crossing:
    """What crosses, once per repetition.

    Attributes:
        megabytes: of one payload; 0 for messages.
        receivers: nodes that get it, or how many messages there are.
    """

    name: str
    megabytes: int
    receivers: int

    @property
    def unit(self) -> str:
        return "GB/s" if self.megabytes else "messages/s"

    def rate(self, seconds: float) -> float:
        """What was delivered per second, in the unit."""
        return (self.megabytes / 1000 or 1) * self.receivers / seconds


CASES = {
    case.name: case
    for case in (
        Crossing("bulk100", 100, 1),
        Crossing("bulk2000", 2000, 1),
        Crossing("small", 0, 2000),
        Crossing("fanout", 10, 40),
    )
}


SINK, SOURCE = Identity(CLUSTER, "sink"), Identity(CLUSTER, "source")


@dataclass(frozen=True)
class Job:
    """What the command tells one of its processes.

    Attributes:
        certs: folder of an authority, if all connections are encrypted.
    """

    role: str
    system: str
    case: str
    repeat: int
    peer: str = ""
    relay: str = ""
    certs: str = ""

    def tls(self, identity: Identity) -> TlsFiles | None:
        """The certificate of one of the processes; None for a measurement in plaintext."""
        return TlsFiles.at(issue(Path(self.certs), identity)) if self.certs else None

    @property
    def crossing(self) -> Crossing:
        return CASES[self.case]


def say(**found: Any) -> None:
    """A line for the command."""
    print(json.dumps(found), flush=True)


def timed(work: Callable[[int], None], repeat: int) -> list[float]:
    """Seconds of each repetition, after one that does not count."""
    seconds = []
    for number in range(repeat + 1):
        began = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


# ---------------------------------------------------------------- plain gRPC


def grpc_sink(job: Job) -> None:
    """Serve until the command closes standard input."""
    size = job.crossing.megabytes * 1_000_000
    wanted = np.empty(size, np.uint8).data if job.system == "grpc-copy" else None

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
    port = listen_on(server, "127.0.0.1:0", job.tls(SINK))
    server.start()
    say(address=f"127.0.0.1:{port}")
    sys.stdin.read()
    server.stop(None).wait()


def grpc_source(job: Job) -> list[float]:
    """One stream per receiver, or all messages there and back in one."""
    case = job.crossing
    array = np.random.default_rng(0).integers(0, 256, case.megabytes * 1_000_000, np.uint8)
    view = array.data

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(view), CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])

    with open_channel(job.peer, job.tls(SOURCE), SINK) as channel:
        upload: Any = channel.stream_unary(UPLOAD)
        echo: Any = channel.stream_stream(ECHO)

        def work(number: int) -> None:
            if not case.megabytes:
                assert sum(1 for _ in echo(TEXT.encode() for _ in range(case.receivers))) == case.receivers
                return
            for _ in range(case.receivers):
                assert int(upload(chunks())) == array.nbytes

        return timed(work, job.repeat)


# ---------------------------------------------------------------- the fabric


class Cluster:
    """A Ray cluster of this process with the shared actors of the fabric."""

    def __init__(self, job: Job, name: str) -> None:
        import ray  # noqa: PLC0415 - seconds, and the plain sides do without

        from icrf_agent.cluster_gateway import GatewaySettings  # noqa: PLC0415
        from icrf_agent.ray_actors import GatewayActor, ManagerActor  # noqa: PLC0415

        size = job.crossing.megabytes * 1_000_000
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=max(300_000_000, int(2.4 * size)),
        )
        self.ray, self.job = ray, job
        self.manager = ray.remote(ManagerActor).options(max_concurrency=8).remote(name)
        listen = None if job.relay else "127.0.0.1:0"
        tls = job.tls(Identity(CLUSTER, name))
        settings = GatewaySettings(name, f"bench-{name}", listen, job.relay or None, tls)
        self.gateway = ray.remote(GatewayActor).options(max_concurrency=8).remote(settings, self.manager)
        self.address: str = ray.get(self.gateway.open.remote()).take()
        self.ask(self.manager, "link", activation(job.crossing))

    def ask(self, actor: Any, method: str, *arguments: Any) -> Any:
        """A call of an actor's object, and its value."""
        return self.ray.get(actor.invoke.remote(method, *arguments)).take()

    def begin(self, number: int) -> None:
        """The attempt of a repetition: what earlier ones have left is dropped."""
        self.ask(self.manager, "begin_round", RUN, 1, number + 1, 1)


def activation(case: Crossing) -> Any:
    """Node 0 on the source's cluster, linked to all others, which are on the sink's."""
    from icrf.protocol import DECENTRALIZED, Activate, NodeSpec, TensorSpec  # noqa: PLC0415
    from icrf.topology.hybrid import HybridAdjacencyMatrix  # noqa: PLC0415

    others = range(1, 1 + (case.receivers if case.megabytes else 1))
    edges = [edge for node in others for edge in ((SENDER, node), (node, SENDER))]
    return Activate(
        run_id=RUN,
        generation=1,
        federation=RUN,
        config_json="{}",
        flow=DECENTRALIZED,
        nodes=tuple(NodeSpec(f"n{node}", "train") for node in (SENDER, *others)),
        graph=HybridAdjacencyMatrix.from_edges(1 + len(others), edges).to_graph(),
        layout=(TensorSpec("w", (max(1, case.megabytes * 250_000),), "float32"),),
        clusters=("source", "sink"),
        assignment=(0, *(1 for _ in others)),
        peers=(),
        num_slots=1,
    )


def header(kind: str, number: int, dtype: str, size: int) -> Any:
    """Of the payload of a repetition."""
    from icrf.ports import PayloadHeader  # noqa: PLC0415

    sender = SENDER if kind == "update" else -1
    return PayloadHeader(RUN, 1, number + 1, 1, kind, sender, "source", "sink", dtype, size)


def icrf_sink(job: Job) -> None:
    """Take what comes; for messages also say how long the nodes' reading took."""
    cluster = Cluster(job, "sink")
    cluster.begin(0)
    say(address=cluster.address or "relay")
    cursor, reading = ("", 0), []
    for number in range(job.repeat + 1):
        found: list[Any] = []
        while not found:
            cursor, found = cluster.ask(cluster.gateway, "next_arrivals", TIMEOUT_S, cursor)
        began = time.perf_counter()
        cluster.begin(number + 1)
        if not job.crossing.megabytes:
            assert len(cluster.ask(cluster.manager, "sync", RUN, "n1")) == job.crossing.receivers
        reading.append(time.perf_counter() - began)
        say(seconds=reading[-1])
    sys.stdin.read()
    cluster.ray.shutdown()


def icrf_source(job: Job) -> list[float]:
    """The object store's payload to the other cluster's; or messages from their publication until they are accepted."""
    from icrf.federation.message import Message  # noqa: PLC0415
    from icrf.protocol import PeerAddress  # noqa: PLC0415

    cluster, case = Cluster(job, "source"), job.crossing
    peer = PeerAddress("sink", "" if job.relay else job.peer)
    array = np.random.default_rng(0).random(case.megabytes * 250_000, np.float32)
    reference = cluster.ray.put(array)
    seconds = []
    for number in range(job.repeat + 1):
        cluster.begin(number)
        began = time.perf_counter()
        if case.megabytes:
            about = header("update", number, "float32", array.size)
            cluster.ask(cluster.gateway, "send", about, [reference], -1, peer, TIMEOUT_S)
        else:
            position = (number + 1, 1)
            calls = [
                cluster.manager.invoke.remote("publish", RUN, Message(TEXT, "n0"), "n1", position)
                for _ in range(case.receivers)
            ]
            cluster.ray.get(calls)
            ((_, bundle),) = cluster.ask(cluster.manager, "outbox", RUN, position).values()
            about = header("message", number, "uint8", len(bundle))
            cluster.ask(cluster.gateway, "send_bytes", about, bundle, peer, TIMEOUT_S)
        seconds.append(time.perf_counter() - began)
        # The sink takes the payload away before the next one comes.
        say(sent=number)
        sys.stdin.readline()
    cluster.ray.shutdown()
    return seconds[1:]


def relay(job: Job) -> None:
    """The mediator's relay alone."""
    from icrf.testing.relay_thread import RelayThread  # noqa: PLC0415

    serving = RelayThread(tls=job.tls(THE_MEDIATOR))
    say(address=serving.address)
    sys.stdin.read()
    serving.stop()


def main() -> None:
    """Do what the first argument says."""
    job = Job(**json.loads(sys.argv[1]))
    if job.role == "relay":
        relay(job)
    elif job.role == "sink":
        (icrf_sink if job.system.startswith("icrf") else grpc_sink)(job)
    else:
        seconds = (icrf_source if job.system.startswith("icrf") else grpc_source)(job)
        versions = {"python": sys.version.split()[0], "grpcio": grpc.__version__, "numpy": np.__version__}
        say(seconds=seconds, versions=versions)


if __name__ == "__main__":
    main()
