"""The contract of :class:`icrf.ports.AgentLink`: one suite, every adapter, the real mediator behind it.

What only a network can do to a link is in ``test_agent_link_grpc.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from icrf.errors import RunError, error_from_json
from icrf.ports import AgentLink
from icrf.protocol import (
    Capacity,
    Fingerprint,
    Goodbye,
    Heartbeat,
    Instruction,
    Lease,
    Register,
    Reject,
    Reserve,
    Submission,
    Warned,
)
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.clocks import StandingClock
from icrf.wire.agent_link import GrpcAgentLink
from icrf_mediator.blobs import MemoryBlobs
from icrf_mediator.inprocess import InProcessLink
from icrf_mediator.server import MediatorServer
from icrf_mediator.service import MediatorService
from icrf_mediator.store import MemoryStore

PATIENCE_S = 10.0
MIB = 1 << 20
CAPACITY, FINGERPRINT = Capacity(2, 2.0, 0.0, 1 << 30), Fingerprint("2.13", "AVX2", "on", 1, "cpu")


class Agent:
    """A running link, and what it delivered."""

    def __init__(self, link: AgentLink, incarnation: str = "i-1", protocol: int = 1) -> None:
        self.link = link
        self.registrations = 0
        self.delivered: asyncio.Queue[Instruction] = asyncio.Queue()
        self._register = Register("eu", incarnation, protocol, "0.1", CAPACITY, FINGERPRINT)
        self.task = asyncio.create_task(self.link.run(self.register, self.delivered.put_nowait))

    def register(self) -> Register:
        self.registrations += 1
        return self._register

    async def next(self) -> Instruction:
        return await asyncio.wait_for(self.delivered.get(), PATIENCE_S)

    async def close(self) -> None:
        await self.link.close()
        await asyncio.wait_for(self.task, PATIENCE_S)


class World:
    """A mediator on this loop, and links to it."""

    def __init__(self, server: MediatorServer | None, service: MediatorService, clock: StandingClock) -> None:
        self._server, self.service, self.clock = server, service, clock

    def link(self) -> AgentLink:
        return InProcessLink(lambda: self.service) if self._server is None else GrpcAgentLink(self._server.address)

    async def submit(self) -> str:
        return (await self.service.submit(submission())).run_id

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not await condition():
                await asyncio.sleep(0)

    async def fetch(self, run_id: str, artifact: str) -> bytes:
        return b"".join(self.service.fetch(run_id, artifact))


def submission() -> Submission:
    config = {
        "federation_id": "links",
        "federated_learning_schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "number_of_clients": 3,
        "federated_learning_rounds": 1,
        "dataset_type": "digits",
        "model_type": "mlp",
    }
    return build_submission(FederationConfig.from_mapping(config))


@asynccontextmanager
async def world(kind: str) -> AsyncIterator[World]:
    clock = StandingClock()
    service = MediatorService(MemoryStore(), MemoryBlobs(), clock)
    await service.start()
    server = MediatorServer(service, "127.0.0.1:0") if kind == "grpc" else None
    if server is not None:
        await server.start()
    try:
        yield World(server, service, clock)
    finally:
        await service.stop()
        if server is not None:
            await server.stop(0.0)


@pytest.fixture(params=["in-process", "grpc"])
def play(request: pytest.FixtureRequest) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Play a scenario on a loop of its own."""

    async def main(scenario: Callable[[World], Awaitable[None]]) -> None:
        async with world(request.param) as one:
            await scenario(one)

    return lambda scenario: asyncio.run(main(scenario))


def test_a_registration_is_answered_first(play: Any) -> None:
    async def scenario(w: World) -> None:
        agent = Agent(w.link())
        assert await agent.next() == Lease(20.0, 5.0)
        (cluster,) = await w.service.clusters()
        assert (cluster.name, cluster.incarnation, cluster.alive) == ("eu", "i-1", True)
        agent.link.report(Heartbeat("i-1"))
        assert await agent.next() == Lease(20.0, 5.0)
        await agent.close()

    play(scenario)


def test_both_directions_keep_their_order(play: Any) -> None:
    async def scenario(w: World) -> None:
        run_id = await w.submit()
        agent = Agent(w.link())
        agent.link.report(Warned(run_id, "before the connection"))
        assert isinstance(await agent.next(), Lease)
        assert isinstance(await agent.next(), Reserve)
        texts = [str(i) for i in range(50)]
        for text in texts:
            agent.link.report(Warned(run_id, text))
        seen: list[str] = []
        async for event in w.service.watch(run_id):
            if event.kind == "warning":
                seen.append(event.text)
            if len(seen) == 51:
                break
        assert seen == [f"eu: {text}" for text in ("before the connection", *texts)]
        await agent.close()

    play(scenario)


def test_what_is_reported_before_close_arrives(play: Any) -> None:
    async def scenario(w: World) -> None:
        agent = Agent(w.link())
        await agent.next()
        agent.link.report(Goodbye("i-1", "stopped"))
        await agent.close()
        await agent.link.close()

        async def gone() -> bool:
            return await w.service.clusters() == []

        await w.until(gone)

    play(scenario)


def test_the_end_of_a_link_without_goodbye_is_a_lost_connection(play: Any) -> None:
    async def scenario(w: World) -> None:
        agent = Agent(w.link())
        await agent.next()
        await agent.close()

        async def known_as_lost() -> bool:
            return [c.alive for c in await w.service.clusters()] == [False]

        await w.until(known_as_lost)
        again = Agent(w.link())
        await again.next()
        assert [c.alive for c in await w.service.clusters()] == [True]
        await again.close()

    play(scenario)


@pytest.mark.parametrize(("incarnation", "protocol", "code"), [("i-2", 1, "A001"), ("i-1", 7, "P004")])
def test_a_reject_is_delivered_and_ends_the_link(play: Any, incarnation: str, protocol: int, code: str) -> None:
    async def scenario(w: World) -> None:
        first = Agent(w.link())
        await first.next()
        refused = Agent(w.link(), incarnation, protocol)
        reject = await refused.next()
        assert isinstance(reject, Reject) and error_from_json(reject.error_json).code == code
        await asyncio.wait_for(refused.task, PATIENCE_S)
        await refused.close()
        assert [(c.incarnation, c.alive) for c in await w.service.clusters()] == [("i-1", True)]
        await first.close()

    play(scenario)


def test_a_link_whose_lease_ran_out_registers_again(play: Any) -> None:
    async def scenario(w: World) -> None:
        agent = Agent(w.link())
        await agent.next()
        w.clock.time_s += 25.0
        assert await agent.next() == Lease(20.0, 5.0)
        assert agent.registrations == 2 and not agent.task.done()
        assert [c.alive for c in await w.service.clusters()] == [True]
        await agent.close()

    play(scenario)


def test_close_is_harmless_at_any_time(play: Any) -> None:
    async def scenario(w: World) -> None:
        never_run = w.link()
        await never_run.close()
        await never_run.close()
        early = Agent(w.link())
        await early.close()

    play(scenario)


# ---------------------------------------------------------------- uploads


def test_an_upload_is_there_when_it_is_acknowledged(play: Any) -> None:
    async def scenario(w: World) -> None:
        run_id, link = await w.submit(), w.link()
        parts = [b"a" * 10, b"", b"b" * (2 * MIB + 1)]
        assert await link.upload(run_id, "model", iter(parts)) == hashlib.sha256(b"".join(parts)).hexdigest()
        assert await w.fetch(run_id, "model") == b"".join(parts)
        assert await link.upload(run_id, "model", iter([])) == hashlib.sha256().hexdigest()
        assert await w.fetch(run_id, "model") == b""
        await link.close()

    play(scenario)


def test_an_upload_that_breaks_off_leaves_nothing(play: Any) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise RunError("F006", "the model is gone")

    async def scenario(w: World) -> None:
        run_id, link = await w.submit(), w.link()
        with pytest.raises(RunError, match="F006 the model is gone"):
            await link.upload(run_id, "model", chunks())
        with pytest.raises(RunError, match="F006"):
            await w.fetch(run_id, "model")
        await link.close()

    play(scenario)


def test_nothing_can_be_uploaded_for_an_unknown_or_ended_run(play: Any) -> None:
    async def scenario(w: World) -> None:
        run_id, link = await w.submit(), w.link()
        with pytest.raises(RunError, match="F001"):
            await link.upload("nowhere", "model", iter([b"x"]))
        await w.service.cancel(run_id)
        with pytest.raises(RunError, match=r"F005 .*is CANCELLED"):
            await link.upload(run_id, "model", iter([b"x"]))
        await link.close()

    play(scenario)
