"""The agent's shell: how it ends, in order and otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import AgentError, IcrfError, InternalError, NodeError
from icrf.ports import Arrival, ClusterFacts
from icrf.protocol import (
    Capacity,
    ClusterReset,
    Draining,
    Fingerprint,
    Goodbye,
    Instruction,
    Lease,
    Reject,
    Release,
    Released,
    Report,
    Reserve,
    Reserved,
    Resources,
)
from icrf.testing.waiting import async_until
from icrf_agent import service
from icrf_agent.service import AgentIdentity, AgentService


class Link:
    """A mediator that says what it was given and listens."""

    def __init__(self, *instructions: Instruction) -> None:
        self.instructions, self.reports = instructions, list[Report]()
        self.closed = asyncio.Event()

    async def run(self, register: Callable[[], Report], deliver: Callable[[Instruction], None]) -> None:
        self.reports.append(register())
        for instruction in self.instructions:
            deliver(instruction)
            if isinstance(instruction, Reject):
                return
        await self.closed.wait()

    def report(self, report: Report) -> None:
        self.reports.append(report)

    async def upload(self, run_id: str, artifact: str, chunks: Iterator[bytes]) -> str:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed.set()


class Runtime:
    """A cluster that fails on request; whatever else is asked of it would be an AttributeError."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.closed = error, 0

    async def start(self) -> ClusterFacts:
        return ClusterFacts(Capacity(1, 1.0, 0.0, 0), Fingerprint("", "", "", 1, "cpu"))

    async def arrivals(self) -> AsyncIterator[Arrival]:
        if self.error:
            raise self.error
        await asyncio.Event().wait()
        yield  # type: ignore[misc]

    async def release(self, run_id: str) -> None:
        raise RuntimeError("cannot")

    async def close(self) -> None:
        self.closed += 1


async def started(link: Link, runtime: Runtime) -> AgentService:
    agent = AgentService(AgentIdentity("here", "1"), link, runtime)  # type: ignore[arg-type]
    await agent.start()
    return agent


def run(test: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        await asyncio.wait_for(test, 10.0)

    asyncio.run(within())


def test_stopping_says_goodbye_and_is_harmless_twice() -> None:
    async def test() -> None:
        link, runtime = Link(Lease(10.0, 5.0)), Runtime()
        agent = await started(link, runtime)
        serving = asyncio.create_task(agent.serve())
        await agent.registered.wait()
        await agent.stop()
        await serving
        await agent.stop()
        assert isinstance(link.reports[1], Goodbye) and runtime.closed == 2

    run(test())


def test_leaving_waits_for_consent_only_while_the_mediator_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DRAIN_UNHEARD_S", 0.05)

    class Reserves(Runtime):
        async def reserve(self, order: Reserve) -> None:
            """It fits."""

    async def test() -> None:
        link = Link(Lease(10.0, 0.01), Reserve("run", 1, "fed", 1, Resources(1.0, 0.0), "PACK", 60.0))
        agent = await started(link, Reserves())
        serving = asyncio.create_task(agent.serve())
        await async_until(lambda: Reserved("run", 1) in link.reports)
        assert not await agent.drain(within_s=60.0)
        assert Draining("1") in link.reports
        await agent.stop()
        await serving

    run(test())


def test_a_cluster_that_was_built_anew_is_reported_with_what_it_offers_and_its_gateway() -> None:
    class Dies(Runtime):
        lives = 2

        async def lost(self) -> str:
            self.lives -= 1
            if not self.lives:
                await asyncio.Event().wait()
            return "the head died"

        async def rebuild(self) -> ClusterFacts:
            return ClusterFacts(Capacity(3, 3.0, 0.0, 0), Fingerprint("", "", "", 1, "cpu"), "127.0.0.1:99")

    async def test() -> None:
        link = Link(Lease(10.0, 5.0))
        agent = await started(link, Dies())
        serving = asyncio.create_task(agent.serve())
        expected = ClusterReset("1", "the head died", Capacity(3, 3.0, 0.0, 0), "127.0.0.1:99")
        await async_until(lambda: expected in link.reports)
        await agent.stop()
        await serving

    run(test())


def test_a_refusal_of_the_mediator_ends_it() -> None:
    async def test() -> None:
        refusal = AgentError("A001", "somebody else is here")
        agent = await started(Link(Reject(refusal.to_json())), Runtime())
        with pytest.raises(AgentError, match="A001"):
            await agent.serve()
        await agent.stop()

    run(test())


@pytest.mark.parametrize(
    ("error", "kind"), [(NodeError("U003", "the gateway died"), NodeError), (OSError("a defect"), InternalError)]
)
def test_an_agent_that_hears_nothing_any_more_ends_instead_of_letting_rounds_wait(
    error: Exception, kind: type[IcrfError]
) -> None:
    async def test() -> None:
        agent = await started(Link(Lease(10.0, 5.0)), Runtime(error))
        with pytest.raises(kind):
            await agent.serve()
        await agent.stop()

    run(test())


def test_who_reserves_again_waits_until_the_slots_are_released() -> None:
    """A run may come back to a cluster that it has left."""

    class Slow(Runtime):
        def __init__(self) -> None:
            super().__init__()
            self.may_end, self.done = asyncio.Event(), list[str]()

        async def release(self, run_id: str) -> None:
            await self.may_end.wait()
            self.done.append("released")

        async def reserve(self, order: Reserve) -> None:
            self.done.append("reserved")

    async def test() -> None:
        again = Reserve("run", 2, "fed", 1, Resources(1.0, 0.0), "PACK", 60.0)
        other = replace(again, run_id="other")
        link, runtime = Link(Lease(10.0, 5.0), Release("run", 1), again, other), Slow()
        agent = await started(link, runtime)
        serving = asyncio.create_task(agent.serve())
        await async_until(lambda: Reserved("other", 2) in link.reports)
        assert runtime.done == ["reserved"]
        runtime.may_end.set()
        await async_until(lambda: Reserved("run", 2) in link.reports)
        assert runtime.done == ["reserved", "released", "reserved"]
        await agent.stop()
        await serving

    run(test())


def test_what_fails_unexpectedly_is_still_answered() -> None:
    """A release must be answered, or the mediator would count its slots as taken for ever."""

    async def test() -> None:
        link = Link(Release("run", 1))
        agent = await started(link, Runtime())
        serving = asyncio.create_task(agent.serve())
        await async_until(lambda: Released("run", 1) in link.reports)
        await agent.stop()
        await serving

    run(test())
