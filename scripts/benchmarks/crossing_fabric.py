"""ICRF's processes of ``scripts/bench between-clusters``: the only place here that calls what carries payloads.

On every side a Ray cluster of its own with the gateway and the topology manager as they run in the fabric; payloads go
from object store to object store, messages from their publication to the recipient's mailbox.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.crossings import LOCAL_RAY, TEXT, WARM_UP, Crossing, Job, say, settle
from icrf.wire.allocator import keep_freed_frames
from icrf.wire.identity import CLUSTER, THE_MEDIATOR, Identity
from icrf.wire.tls import TlsFiles
from icrf_mediator.certs import issue

SENDER, RUN = 0, "bench"
TIMEOUT_S = 300.0
SOURCE = Identity(CLUSTER, "source")
STORE_BYTES = 300_000_000


def sink_of(number: int) -> Identity:
    """One of the clusters that receive."""
    return Identity(CLUSTER, f"sink{number}")


def tls_of(job: Job, identity: Identity) -> TlsFiles | None:
    """The certificate of one of the processes; None for a measurement in plaintext."""
    return TlsFiles.at(issue(Path(job.certs), identity)) if job.certs else None


class Cluster:
    """A Ray cluster of this process with the shared actors of the fabric.

    Args:
        payloads: for how many of them the object store has room.
    """

    def __init__(self, job: Job, identity: Identity, payloads: float) -> None:
        import ray  # noqa: PLC0415 - seconds, and the plain sides do without

        from icrf_agent.cluster_gateway import GatewaySettings  # noqa: PLC0415
        from icrf_agent.ray_actors import GatewayActor, ManagerActor  # noqa: PLC0415

        ray.init(**LOCAL_RAY, object_store_memory=STORE_BYTES + int(payloads * job.crossing.payload_bytes))
        self.ray = ray
        self.manager = ray.remote(ManagerActor).options(max_concurrency=8).remote(identity.name)
        listen = None if job.relay else "127.0.0.1:0"
        tls = tls_of(job, identity)
        settings = GatewaySettings(identity.name, f"bench-{identity.name}", listen, job.relay or None, tls)
        self.gateway = ray.remote(GatewayActor).options(max_concurrency=8).remote(settings, self.manager)
        self.address: str = ray.get(self.gateway.open.remote()).take()
        self.ask(self.manager, "link", activation(job.crossing))

    def ask(self, actor: Any, method: str, *arguments: Any) -> Any:
        """A call of an actor's object, and its value."""
        return self.ray.get(actor.invoke.remote(method, *arguments)).take()

    def ask_at_once(self, actor: Any, method: str, calls: list[tuple[Any, ...]]) -> list[Any]:
        """Several calls at the same time, and their values."""
        asked = [actor.invoke.remote(method, *arguments) for arguments in calls]
        return [outcome.take() for outcome in self.ray.get(asked)]

    def begin(self, number: int) -> None:
        """The attempt of a repetition: what earlier ones have left is dropped."""
        self.ask(self.manager, "begin_round", RUN, 1, number + 1, 1)


def activation(case: Crossing) -> Any:
    """Node 0 on the source's cluster, linked to all others, which are on the sinks' in turn."""
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
        layout=(TensorSpec("w", (max(1, case.payload_bytes // 4),), "float32"),),
        clusters=(SOURCE.name, *(sink_of(k).name for k in range(case.clusters))),
        assignment=(0, *(1 + k % case.clusters for k in range(len(others)))),
        peers=(),
        num_slots=1,
    )


def header(kind: str, number: int, sink: int, dtype: str, size: int) -> Any:
    """Of the payload of a repetition."""
    from icrf.ports import PayloadHeader  # noqa: PLC0415

    sender = SENDER if kind == "update" else -1
    return PayloadHeader(RUN, 1, number + 1, 1, kind, sender, SOURCE.name, sink_of(sink).name, dtype, size)


def sink(job: Job) -> None:
    """Take what comes; for messages also say how long the nodes' reading took."""
    # A payload comes in while the one before it is let go.
    cluster = Cluster(job, sink_of(job.number), payloads=2.2)
    cluster.begin(0)
    say(address=cluster.address or "relay")
    cursor = ("", 0)
    for number in range(job.repeat + WARM_UP):
        found: list[Any] = []
        while not found:
            cursor, found = cluster.ask(cluster.gateway, "next_arrivals", TIMEOUT_S, cursor)
        began = time.perf_counter()
        cluster.begin(number + 1)
        if not job.crossing.megabytes:
            assert len(cluster.ask(cluster.manager, "sync", RUN, "n1")) == job.crossing.receivers
        say(seconds=time.perf_counter() - began)
    sys.stdin.read()
    cluster.ray.shutdown()


def source(job: Job) -> list[float]:
    """The object store's payload to the others'; or messages from their publication until they are accepted."""
    cluster = Cluster(job, SOURCE, payloads=1.1)
    reference = cluster.ray.put(np.random.default_rng(0).random(job.crossing.payload_bytes // 4, np.float32))
    seconds = []
    settle()
    for number in range(job.repeat + WARM_UP):
        cluster.begin(number)
        began = time.perf_counter()
        if job.crossing.megabytes:
            _send_payload(cluster, job, number, reference)
        else:
            _send_messages(cluster, job, number)
        seconds.append(time.perf_counter() - began)
        # The sinks take the payload away before the next one comes.
        say(sent=number)
        sys.stdin.readline()
    cluster.ray.shutdown()
    return seconds[WARM_UP:]


def _send_payload(cluster: Cluster, job: Job, number: int, reference: Any) -> None:
    """Once to every cluster that has a node which wants it."""
    size = job.crossing.payload_bytes // 4
    calls = [
        (header("update", number, k, "float32", size), [reference], -1, _peer(job, k), TIMEOUT_S)
        for k in range(job.crossing.clusters)
    ]
    cluster.ask_at_once(cluster.gateway, "send", calls)


def _send_messages(cluster: Cluster, job: Job, number: int) -> None:
    from icrf.federation.message import Message  # noqa: PLC0415
    from icrf_agent.host_mailbox import HostMailbox  # noqa: PLC0415
    from icrf_agent.ray_actors import Remote  # noqa: PLC0415

    position = (number + 1, 1)
    # The nodes' way out of their host, whose place is taken by this process.
    mailbox = HostMailbox(Remote(cluster.manager), activation(job.crossing))  # type: ignore[arg-type]
    mailbox.open = True
    mailbox.enter(position)
    for _ in range(job.crossing.receivers):
        mailbox.publish(Message(TEXT, "n0"), "n1")
    mailbox.flush()
    ((_, bundle),) = cluster.ask(cluster.manager, "outbox", RUN, position).values()
    about = header("message", number, 0, "uint8", len(bundle))
    cluster.ask(cluster.gateway, "send_bytes", about, bundle, _peer(job, 0), TIMEOUT_S)


def _peer(job: Job, sink_number: int) -> Any:
    from icrf.protocol import PeerAddress  # noqa: PLC0415

    return PeerAddress(sink_of(sink_number).name, "" if job.relay else job.peers[sink_number])


def relay(job: Job) -> None:
    """The mediator's relay alone, in a process like the mediator's."""
    from icrf.testing.relay_thread import RelayThread  # noqa: PLC0415

    keep_freed_frames()
    serving = RelayThread(tls=tls_of(job, THE_MEDIATOR))
    say(address=serving.address)
    sys.stdin.read()
    serving.stop()
