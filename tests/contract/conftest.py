"""A mediator for the tests of the control wire: real gRPC on loopback around a fake of the mediator's service."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any

import grpc.aio
import pytest

from icrf.errors import IcrfError, RunError
from icrf.ports import AgentPort
from icrf.protocol import (
    Capacity,
    ClusterInfo,
    Fingerprint,
    Lease,
    LinkBytes,
    MeasuredLink,
    Plan,
    Register,
    Reject,
    Report,
    RoundResult,
    RunEvent,
    RunInfo,
    Submission,
)
from icrf.wire.addresses import SERVER_OPTIONS
from icrf_mediator.servicer import add_to_server

PATIENCE_S = 10.0
MIB = 1 << 20

RUN = RunInfo("run-1", "digits", "RUNNING", "centralized", 1, 5, ("eu", "us"), created_at=12.5)
PLAN = Plan(
    "digits", "centralized", ("eu",), {"server": "eu"}, 2, 0, (LinkBytes("eu", "us", 7),), 1, 2, 3, -1.0, "none", -1, 9,
    {"eu": 2}, True, (), 12, "locality",
)  # fmt: skip
CAPACITY, FINGERPRINT = Capacity(2, 2.0, 0.0, 1 << 30), Fingerprint("2.13", "AVX2", "on", 1, "cpu")
CLUSTER = ClusterInfo("eu", "i-1", CAPACITY, FINGERPRINT, {"zone": "a"}, "127.0.0.1:1", True, 2)
LINK = MeasuredLink("eu", "us", 6.25e6, 0.08, True, 1e9, "{}")
LEASE = Lease(20.0, 5.0)
RESULT = RoundResult(1, 1, 1, 0.5, 0.4, 0.1, 0.0, {"train_loss": 0.3}, 10, 20, 2, "aa", "bb")


def event(seq: int, kind: str = "status", **more: Any) -> RunEvent:
    return RunEvent("run-1", seq, float(seq), kind, **more)


class FakeWriter:
    """A BlobWriter that tells what became of it."""

    def __init__(self, finished: Callable[[str, bytes], None]) -> None:
        self.data, self._finished = b"", finished

    def write(self, chunk: bytes) -> None:
        assert len(chunk) <= MIB
        self.data += chunk

    def commit(self) -> str:
        self._finished("committed", self.data)
        return hashlib.sha256(self.data).hexdigest()

    def abort(self) -> None:
        self._finished("aborted", self.data)


class FakeService:
    """Knows one run; notes what it was asked. Lives on the loop of the server."""

    run, plan_of_run, cluster, link, lease, result = RUN, PLAN, CLUSTER, LINK, LEASE, RESULT

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.events: list[RunEvent] = [event(1), event(2, "round", round=RESULT)]
        self.changed = asyncio.Condition()
        self.artifacts = {"model.safetensors": b"m" * (2 * MIB + 5), "empty": b""}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.port: AgentPort | None = None
        self.refusal: IcrfError | Reject | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.watchers = 0

    def known(self, run_id: str) -> None:
        if run_id != "run-1":
            raise RunError("F001", f"no federation {run_id!r}", place="run_id", value=run_id)

    def note(self, *call: Any) -> RunInfo:
        self.calls.append(call)
        return RUN

    async def tell(self, *call: Any) -> None:
        async with self.changed:
            self.calls.append(call)
            self.changed.notify_all()

    async def submit(self, submission: Submission) -> RunInfo:
        await self.gate.wait()
        await self.tell("submit", submission)
        return RUN

    async def plan(self, submission: Submission) -> Plan:
        return PLAN

    async def get(self, run_id: str) -> RunInfo:
        self.known(run_id)
        await self.gate.wait()
        return RUN

    async def list_runs(self) -> list[RunInfo]:
        return [RUN, RUN]

    async def clusters(self) -> list[ClusterInfo]:
        if self.artifacts.get("bug"):
            raise KeyError("a secret of the mediator")
        return [CLUSTER]

    async def links(self) -> list[MeasuredLink]:
        return [LINK]

    async def measure_links(self) -> list[MeasuredLink]:
        await self.tell("measure_links")
        return [LINK, LINK]

    async def watch(self, run_id: str, after_seq: int) -> AsyncIterator[RunEvent]:
        self.known(run_id)
        self.watchers += 1
        try:
            while True:
                async with self.changed:
                    while len(self.events) <= after_seq:
                        await self.changed.wait()
                for one in self.events[after_seq:]:
                    after_seq = one.seq
                    yield one
                    if one.kind == "end":
                        return
        finally:
            self.watchers -= 1

    async def publish(self, *events: RunEvent) -> None:
        async with self.changed:
            self.events.extend(events)
            self.changed.notify_all()

    async def cancel(self, run_id: str) -> RunInfo:
        self.known(run_id)
        return self.note("cancel", run_id)

    async def advance(self, run_id: str, stage: str, rounds: int) -> RunInfo:
        self.known(run_id)
        return self.note("advance", run_id, stage, rounds)

    async def change_nodes(self, run_id: str, add: Sequence[str], remove: Sequence[str]) -> RunInfo:
        self.known(run_id)
        return self.note("change_nodes", run_id, tuple(add), tuple(remove))

    async def finish(self, run_id: str) -> RunInfo:
        self.known(run_id)
        return self.note("finish", run_id)

    async def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes:
        self.note("call_node", run_id, node_id, method)
        return arguments * 3

    async def send_message(self, run_id: str, recipients: Sequence[str], message: bytes) -> None:
        self.note("send_message", run_id, tuple(recipients), message)

    def fetch(self, run_id: str, artifact: str) -> Iterator[bytes]:
        self.known(run_id)
        if artifact not in self.artifacts:
            raise RunError("F006", f"no artifact {artifact}", place="artifact")
        data = self.artifacts[artifact]
        return (data[i : i + 3 * MIB] for i in range(0, len(data), 3 * MIB))  # larger than a chunk on purpose

    async def agent_connected(self, register: Register, port: AgentPort, peer: str) -> str:
        assert "127.0.0.1" in peer
        if isinstance(self.refusal, IcrfError):
            raise self.refusal
        self.port = port
        port.send(LEASE if self.refusal is None else self.refusal)
        await self.tell("connected", register)
        return "session-1"

    async def agent_report(self, session: str, report: Report) -> None:
        assert session == "session-1"
        await self.tell("report", report)

    async def agent_disconnected(self, session: str) -> None:
        await self.tell("disconnected", session)

    def upload_writer(self, run_id: str, artifact: str) -> FakeWriter:
        self.known(run_id)
        return FakeWriter(lambda outcome, data: self.uploads.__setitem__(artifact, (outcome, data)))

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)


class Mediator:
    """A server on a loop and a thread of its own, which can be stopped and started again on the same port."""

    def __init__(self) -> None:
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-mediator")
        self._thread.start()
        self.service = self.on_loop(self._new_service())
        self._server: grpc.aio.Server | None = None

    async def _new_service(self) -> FakeService:
        return FakeService()

    def on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def hold(self) -> None:
        """From now on `get` and `submit` do not answer."""
        self.on_loop(self._gate(False))

    def let_go(self) -> None:
        self.on_loop(self._gate(True))

    async def _gate(self, is_open: bool) -> None:
        if is_open:
            self.service.gate.set()
        else:
            self.service.gate.clear()

    def publish(self, *events: RunEvent) -> None:
        self.on_loop(self.service.publish(*events))

    def start(self) -> None:
        self.on_loop(self._start())

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        add_to_server(self._server, self.service)
        self.port = self._server.add_insecure_port(self.address)
        await self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self.on_loop(self._server.stop(None))
            self._server = None

    def seen(self, condition: Callable[[], bool]) -> None:
        self.on_loop(self.service.wait_for(condition))

    def reports(self) -> list[Report]:
        return [call[1] for call in self.service.calls if call[0] == "report"]

    def count(self, kind: str) -> int:
        return sum(call[0] == kind for call in self.service.calls)

    def close(self) -> None:
        self.stop()
        self.on_loop(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


@pytest.fixture
def mediator() -> Iterator[Mediator]:
    one = Mediator()
    one.start()
    yield one
    one.close()
