"""The agent's side of the control wire: :class:`GrpcAgentLink` against the real servicers."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import grpc
import pytest

from icrf.errors import LocalError, ProtocolError, RunError
from icrf.protocol import (
    Capacity,
    Fingerprint,
    Goodbye,
    Heartbeat,
    Instruction,
    Register,
    Reject,
    Release,
    Warned,
)
from icrf.testing.waiting import async_until
from icrf.wire._generated.icrf.v1 import cluster_pb2
from icrf.wire.agent_link import GrpcAgentLink
from icrf.wire.status import from_rpc_error

PATIENCE_S = 10.0
MIB = 1 << 20

CAPACITY, FINGERPRINT = Capacity(2, 2.0, 0.0, 1 << 30), Fingerprint("2.13", "AVX2", "on", 1, "cpu")
REGISTER = Register("eu", "i-1", 1, "0.1", CAPACITY, FINGERPRINT, {"zone": "a"})


# ---------------------------------------------------------------- the agent's stream


class Agent:
    """A running link, and what it delivered."""

    def __init__(self, address: str) -> None:
        self.states: list[str] = []
        self.link = GrpcAgentLink(address, on_state=self.states.append, registration_s=PATIENCE_S)
        self.delivered: asyncio.Queue[Instruction] = asyncio.Queue()
        self.task = asyncio.create_task(self.link.run(lambda: REGISTER, self.delivered.put_nowait))

    async def next(self) -> Instruction:
        return await asyncio.wait_for(self.delivered.get(), PATIENCE_S)

    async def close(self) -> None:
        await self.link.close()
        await asyncio.wait_for(self.task, PATIENCE_S)


def with_agent(mediator: Any, scenario: Callable[[Agent], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario of the agent on this thread's loop, as its process would."""

    async def main() -> None:
        agent = Agent(mediator.address)
        try:
            await scenario(agent)
        finally:
            await agent.close()

    asyncio.run(main())


async def seen(mediator: Any, condition: Callable[[], bool]) -> None:
    """Wait until the service has noted something, without blocking the agent's loop."""
    await asyncio.to_thread(mediator.seen, condition)


def send(mediator: Any, *instructions: Instruction) -> None:
    async def on_loop() -> None:
        assert mediator.service.port is not None
        for instruction in instructions:
            mediator.service.port.send(instruction)

    mediator.on_loop(on_loop())


def test_register_comes_first_and_both_directions_keep_their_order(mediator: Any) -> None:
    async def scenario(agent: Agent) -> None:
        agent.link.report(Warned("run-1", "before the connection"))
        assert await agent.next() == mediator.service.lease
        reports = [Warned("run-1", str(i)) for i in range(50)]
        for report in reports:
            agent.link.report(report)
        instructions = [Release("run-1", i) for i in range(50)]
        await asyncio.to_thread(send, mediator, *instructions)
        assert [await agent.next() for _ in instructions] == instructions
        await seen(mediator, lambda: mediator.count("report") == 51)
        assert mediator.reports() == [Warned("run-1", "before the connection"), *reports]
        assert mediator.service.calls[0] == ("connected", REGISTER)

    with_agent(mediator, scenario)
    mediator.seen(lambda: mediator.count("disconnected") == 1)


def test_what_is_reported_before_close_arrives(mediator: Any) -> None:
    async def scenario(agent: Agent) -> None:
        await agent.next()
        agent.link.report(Goodbye("i-1", "stopped"))
        await agent.link.close()

    with_agent(mediator, scenario)
    mediator.seen(lambda: mediator.count("disconnected") == 1)
    assert mediator.reports() == [Goodbye("i-1", "stopped")]


def test_a_reject_is_delivered_and_ends_the_link(mediator: Any) -> None:
    mediator.service.refusal = Reject("{}")

    async def scenario(agent: Agent) -> None:
        assert await agent.next() == Reject("{}")
        await asyncio.wait_for(agent.task, PATIENCE_S)

    with_agent(mediator, scenario)
    mediator.seen(lambda: mediator.count("disconnected") == 1)


def test_a_final_answer_to_the_registration_is_raised(mediator: Any) -> None:
    mediator.service.refusal = ProtocolError("P004", "protocol version 1 is too old")

    async def main() -> None:
        link = GrpcAgentLink(mediator.address)
        with pytest.raises(ProtocolError, match="P004 protocol version 1 is too old"):
            await link.run(lambda: REGISTER, lambda _: None)
        await link.close()

    asyncio.run(main())


def test_after_a_restart_the_agent_registers_again_and_sends_what_it_kept(mediator: Any) -> None:
    async def scenario(agent: Agent) -> None:
        await agent.next()
        agent.link.report(Warned("run-1", "0"))
        await seen(mediator, lambda: mediator.count("report") == 1)
        await asyncio.to_thread(mediator.stop)
        await async_until(lambda: agent.states[-1].startswith("mediator unreachable, retrying"))
        for i in range(1, 4):
            agent.link.report(Heartbeat("i-1"))
            agent.link.report(Warned("run-1", str(i)))
        await asyncio.to_thread(mediator.start)
        assert await agent.next() == mediator.service.lease
        await seen(mediator, lambda: mediator.count("report") == 4)
        assert mediator.reports() == [Warned("run-1", str(i)) for i in range(4)]
        kinds = [call[0] for call in mediator.service.calls]
        assert kinds == ["connected", "report", "disconnected", "connected", "report", "report", "report"]
        assert agent.states[-1] == "connected to the mediator"

    with_agent(mediator, scenario)


def test_an_agent_may_start_before_the_mediator(mediator: Any) -> None:
    mediator.stop()

    async def scenario(agent: Agent) -> None:
        await async_until(lambda: agent.states)
        await asyncio.to_thread(mediator.start)
        assert await agent.next() == mediator.service.lease

    with_agent(mediator, scenario)


def test_a_link_without_a_mediator_closes_at_once(mediator: Any) -> None:
    mediator.stop()

    async def scenario(agent: Agent) -> None:
        await async_until(lambda: agent.states)
        began = time.monotonic()
        await agent.close()
        await agent.link.close()
        assert time.monotonic() - began < 2.0

    with_agent(mediator, scenario)


def test_a_link_that_is_being_dialled_closes_at_once(mediator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mediator.stop()
    dialling = asyncio.Event()

    async def never(*arguments: Any) -> None:
        dialling.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(GrpcAgentLink, "_register", never)

    async def scenario(agent: Agent) -> None:
        await dialling.wait()
        await asyncio.wait_for(agent.close(), PATIENCE_S)

    with_agent(mediator, scenario)


def test_the_mediator_may_end_a_stream_after_what_it_had_to_say(mediator: Any) -> None:
    async def scenario(agent: Agent) -> None:
        await agent.next()

        async def end() -> None:
            assert mediator.service.port is not None
            mediator.service.port.send(Release("run-1", 1))
            mediator.service.port.disconnect()
            mediator.service.port.send(Release("run-1", 2))

        await asyncio.to_thread(mediator.on_loop, end())
        assert await agent.next() == Release("run-1", 1)
        assert await agent.next() == mediator.service.lease  # it came back, as a new session

    with_agent(mediator, scenario)


def test_a_report_that_cannot_travel_is_refused_at_once(mediator: Any) -> None:
    async def scenario(agent: Agent) -> None:
        with pytest.raises(ProtocolError, match=r"P001 Warned\.text"):
            agent.link.report(Warned("run-1", "\ud800"))

    with_agent(mediator, scenario)


def test_a_stream_that_does_not_begin_with_a_registration_is_p001(mediator: Any) -> None:
    with grpc.insecure_channel(mediator.address) as channel:
        call = channel.stream_stream("/icrf.v1.Cluster/Connect")(iter([]), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert from_rpc_error(caught.value, mediator.address).code == "P001"
    assert mediator.service.calls == []


# ---------------------------------------------------------------- uploads


def upload(mediator: Any, chunks: Iterator[bytes], run_id: str = "run-1") -> str:
    async def main() -> str:
        link = GrpcAgentLink(mediator.address)
        try:
            return await link.upload(run_id, "model", chunks)
        finally:
            await link.close()

    return asyncio.run(main())


def test_an_upload_arrives_whole(mediator: Any) -> None:
    parts = [b"a" * 10, b"", b"b" * (3 * MIB + 1)]
    assert upload(mediator, iter(parts)) == hashlib.sha256(b"".join(parts)).hexdigest()
    assert mediator.service.uploads == {"model": ("committed", b"".join(parts))}


def test_an_empty_upload_is_an_artifact_too(mediator: Any) -> None:
    assert upload(mediator, iter([])) == hashlib.sha256().hexdigest()


def test_an_upload_for_an_unknown_run_is_f001(mediator: Any) -> None:
    with pytest.raises(RunError, match="F001"):
        upload(mediator, iter([b"x" * MIB] * 20), run_id="run-9")


def test_an_upload_that_breaks_off_leaves_nothing(mediator: Any) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise RunError("F006", "the model is gone")

    with pytest.raises(RunError, match="F006 the model is gone"):
        upload(mediator, chunks())

    mediator.on_loop(async_until(lambda: mediator.service.uploads))
    assert mediator.service.uploads["model"][0] == "aborted"


def test_an_upload_to_nobody_is_l001(mediator: Any) -> None:
    mediator.stop()
    with pytest.raises(LocalError, match="L001"):
        upload(mediator, iter([b"x"]))


@pytest.mark.parametrize(
    "requests, code",
    [
        ([], "P001"),
        ([cluster_pb2.UploadRequest(chunk=b"x")], "P001"),
        ([cluster_pb2.UploadRequest(header=cluster_pb2.UploadHeader(run_id="run-1"))] * 2, "P001"),
        (
            [
                cluster_pb2.UploadRequest(header=cluster_pb2.UploadHeader(run_id="run-1")),
                cluster_pb2.UploadRequest(chunk=bytes(MIB + 1)),
            ],
            "P026",
        ),
    ],
    ids=["nothing", "no header", "two headers", "large chunk"],
)
def test_a_malformed_upload_is_refused(mediator: Any, requests: list[Any], code: str) -> None:
    with grpc.insecure_channel(mediator.address) as channel:
        call = channel.stream_unary("/icrf.v1.Cluster/Upload", request_serializer=lambda m: m.SerializeToString())
        with pytest.raises(grpc.RpcError) as caught:
            call(iter(requests), timeout=PATIENCE_S)
    assert from_rpc_error(caught.value, mediator.address).code == code
    assert all(outcome == "aborted" for outcome, _ in mediator.service.uploads.values())
