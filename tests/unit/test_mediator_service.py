"""The shell around the mediator's core: what is told is durable, and nothing stops its clock or its loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import InternalError, LocalError, ResourceError
from icrf.ports import Write
from icrf.protocol import (
    CallDone,
    CallNode,
    Instruction,
    ModelStored,
    Register,
    Report,
    Reserve,
    StoreModel,
    Submission,
    Warned,
)
from icrf.testing.clocks import StandingClock
from icrf.testing.waiting import async_until
from icrf_mediator import plan_memo, service
from icrf_mediator.blobs import MemoryBlobs
from icrf_mediator.service import MediatorService
from icrf_mediator.store import MemoryStore

PATIENCE_S = 10.0


class FullDisk(MemoryStore):
    """A journal that refuses while `error` is set."""

    error: Exception | None = None

    def apply(self, writes: Sequence[Write]) -> None:
        if self.error is not None:
            raise self.error
        super().apply(writes)


class Port:
    """An agent that answers like those of the core's tests, and notes what the journal held at each instruction."""

    def __init__(self, world: World, hold: tuple[type, ...]) -> None:
        self.world, self.hold = world, hold
        self.got: list[Instruction] = []
        self.closed = 0
        self.session = ""

    def send(self, instruction: Instruction) -> None:
        self.got.append(instruction)
        self.world.journal_at[type(instruction)] = {t: len(self.world.store.rows(t)) for t in ("runs", "commits")}
        if not isinstance(instruction, self.hold):
            self.world.todo.append((self, instruction))

    def disconnect(self) -> None:
        self.closed += 1

    def of(self, kind: type) -> list[Any]:
        return [one for one in self.got if isinstance(one, kind)]


class World:
    """A service with one agent, on the loop of a scenario."""

    def __init__(self, core: Any, store: MemoryStore | None = None) -> None:
        self.core, self.store, self.blobs, self.clock = core, store or FullDisk(), MemoryBlobs(), StandingClock()
        self.service = MediatorService(self.store, self.blobs, self.clock)
        self.todo: list[tuple[Port, Instruction]] = []
        self.journal_at: dict[type, dict[str, int]] = {}

    async def agent(self, *hold: type) -> Port:
        port = Port(self, hold)
        self.core.register("eu")
        fingerprint, capacity = self.core.mediator.clusters()[0].fingerprint, self.core.mediator.clusters()[0].capacity
        port.session = await self.service.agent_connected(
            Register("eu", "i-eu", 1, "0.1", capacity, fingerprint), port, "127.0.0.1:9"
        )
        return port

    async def work(self) -> None:
        """Let the agents answer all there is."""
        while self.todo:
            port, order = self.todo.pop(0)
            answer = None if isinstance(order, CallNode) else self.core.answer("eu", order)
            if isinstance(answer, ModelStored):
                writer = self.service.upload_writer(order.run_id, answer.artifact)  # type: ignore[union-attr]
                writer.commit()
            if answer is not None:
                await self.service.agent_report(port.session, answer)

    async def report(self, port: Port, report: Report) -> None:
        await self.service.agent_report(port.session, report)


def play(core: Any, scenario: Callable[[World], Awaitable[None]], store: MemoryStore | None = None) -> None:
    async def main() -> None:
        world = World(core, store)
        await world.service.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await scenario(world)
        finally:
            await world.service.stop()
            await world.service.stop()

    asyncio.run(main())


# ---------------------------------------------------------------- durable first


def test_what_is_told_is_already_in_the_journal(core: Any) -> None:
    async def scenario(w: World) -> None:
        await w.agent()
        run = await w.service.submit(core.submission())
        await w.work()
        assert (await w.service.get(run.run_id)).status == "COMPLETED"
        assert w.journal_at[Reserve]["runs"] == 1 and w.journal_at[StoreModel]["commits"] == 3

    play(core, scenario)


def test_while_the_disk_is_full_nothing_is_told_and_nothing_is_lost(
    core: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "TICK_S", 0.001)
    store = FullDisk()

    async def scenario(w: World) -> None:
        port = await w.agent(Reserve)
        store.error = LocalError("L005", "no space left")
        submission = core.submission()
        for _ in range(2):
            with pytest.raises(LocalError, match="no space left"):
                await w.service.submit(submission)
        run_id = (await w.service.list_runs())[0].run_id
        await w.report(port, Warned(run_id, "first"))
        await w.report(port, Warned(run_id, "second"))
        assert port.of(Reserve) == [] and store.rows("runs") == []
        store.error = None
        await async_until(lambda: port.of(Reserve))
        assert (await w.service.submit(submission)).run_id == run_id
        seen = [write.row["seq"] for write in store.rows("events", (run_id,))]
        assert seen == list(range(1, len(seen) + 1))
        assert [w.row["text"] for w in store.rows("events", (run_id,))][-2:] == ["eu: first", "eu: second"]
        assert port.closed == 0

    with caplog.at_level(logging.ERROR):
        play(core, scenario, store)
    assert "no space left" in caplog.text


def test_a_decision_that_can_never_be_written_does_not_hold_up_others(core: Any) -> None:
    store = FullDisk()

    async def scenario(w: World) -> None:
        await w.agent()
        store.error = InternalError("X001", "no plain value")
        with pytest.raises(InternalError):
            await w.service.submit(core.submission())
        store.error = None
        (stuck,) = await w.service.list_runs()
        await w.service.cancel(stuck.run_id)
        await w.work()
        run = await w.service.submit(core.submission())
        await w.work()
        assert (await w.service.get(run.run_id)).status == "COMPLETED"

    play(core, scenario, store)


# ---------------------------------------------------------------- the clock and the loop


def test_the_clock_outlives_a_defect(
    core: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "TICK_S", 0.001)

    async def scenario(w: World) -> None:
        port = await w.agent()
        tick, broken = w.service._core.tick, [True]

        def once(now: Any) -> Any:
            if broken:
                broken.clear()
                raise RuntimeError("a defect")
            return tick(now)

        monkeypatch.setattr(w.service._core, "tick", once)
        w.clock.time_s += 100.0
        await async_until(lambda: port.closed)
        assert await w.service.clusters() == []

    with caplog.at_level(logging.ERROR):
        play(core, scenario)
    assert "a tick failed" in caplog.text and "a defect" in caplog.text


def test_a_plan_is_made_once_and_not_on_the_loop(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made_in: list[str] = []
    make_plan = plan_memo.make_plan

    def noted(submission: Submission, clusters: Any, measured: Any) -> Any:
        made_in.append(threading.current_thread().name)
        return make_plan(submission, clusters, measured)

    monkeypatch.setattr(plan_memo, "make_plan", noted)

    async def scenario(w: World) -> None:
        await w.agent(Reserve)
        first = core.submission()
        await w.service.submit(first)
        assert len(made_in) == 1 and made_in[0] != threading.current_thread().name
        await w.service.submit(first)
        assert len(made_in) == 1
        await w.service.submit(core.submission())  # queued behind the first: slots decide that, not the plan
        assert len(made_in) == 2
        with pytest.raises(ResourceError, match="R001"):
            await w.service.submit(core.submission(resources={"num_cpus": 9}))
        assert len(made_in) == 3

    play(core, scenario)


# ---------------------------------------------------------------- calls


def test_the_value_of_a_call_that_nobody_waits_for_is_deleted(core: Any) -> None:
    async def scenario(w: World) -> None:
        port = await w.agent()
        run = await w.service.submit(core.submission(keep=True))
        await w.work()
        call = asyncio.create_task(w.service.call_node(run.run_id, "client_0", "m", b""))
        await async_until(lambda: port.of(CallNode))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        (order,) = port.of(CallNode)
        artifact = f"call/{order.call_id}"
        writer = w.service.upload_writer(run.run_id, artifact)
        writer.write(b"late")
        writer.commit()
        await w.report(port, CallDone(run.run_id, order.call_id, artifact))
        assert w.blobs._blobs == {} and w.service._calls == {}

    play(core, scenario)


def test_a_call_to_a_run_that_ends_is_answered_at_once(core: Any) -> None:
    async def scenario(w: World) -> None:
        port = await w.agent()
        run = await w.service.submit(core.submission(keep=True))
        await w.work()
        call = asyncio.create_task(w.service.call_node(run.run_id, "client_0", "m", b""))
        message = asyncio.create_task(w.service.send_message(run.run_id, ["client_0", "client_1"], b""))
        await async_until(lambda: port.of(CallNode))
        await asyncio.sleep(0)
        await w.service.cancel(run.run_id)
        for outcome in await asyncio.gather(call, message, return_exceptions=True):
            assert "F005" in str(outcome) and "is CANCELLED" in str(outcome)
        assert w.service._calls == {}

    play(core, scenario)


def test_what_a_refused_registration_brings_to_light_is_carried_out(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "TICK_S", 3600.0)

    async def scenario(w: World) -> None:
        port = await w.agent(Reserve)
        run = await w.service.submit(core.submission())
        w.clock.time_s += 100.0
        capacity, fingerprint = core.mediator.clusters()[0].capacity, core.mediator.clusters()[0].fingerprint
        other = Register("us", "i-us", 99, "0.1", capacity, fingerprint)
        await w.service.agent_connected(other, Port(w, ()), "127.0.0.1:9")
        shown = (await w.service.get(run.run_id)).status
        assert shown != "RESERVING"
        assert w.store.rows("runs", (run.run_id,))[0].row["status"] == shown
        assert port.closed == 1

    play(core, scenario)


def test_fingerprints_are_compared_at_registration(core: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(w: World) -> None:
        await w.agent()
        capacity, same = core.mediator.clusters()[0].capacity, core.mediator.clusters()[0].fingerprint
        await w.service.agent_connected(Register("us", "i-us", 1, "0.1", capacity, same), Port(w, ()), "127.0.0.1:9")
        assert "fingerprint" not in caplog.text
        other = replace(same, cpu_capability="another")
        await w.service.agent_connected(Register("ap", "i-ap", 1, "0.1", capacity, other), Port(w, ()), "127.0.0.1:9")

    with caplog.at_level(logging.WARNING):
        play(core, scenario)
    assert caplog.text.count("numeric fingerprint differs in cpu_capability") == 2


# ---------------------------------------------------------------- restart


def test_a_run_of_an_earlier_life_can_be_watched_and_goes_on(core: Any) -> None:
    store = FullDisk()
    ids: list[str] = []
    events: list[Any] = []

    async def first_life(w: World) -> None:
        await w.agent()
        for keep in (False, True):
            run = await w.service.submit(core.submission(keep=keep))
            ids.append(run.run_id)
            await w.work()
        events.extend([event async for event in w.service.watch(ids[0])])
        assert [event async for event in w.service.watch(ids[0], -3)] == events

    async def second_life(w: World) -> None:
        past = [event async for event in w.service.watch(ids[0])]
        assert [(e.seq, e.kind, e.text) for e in past] == [(e.seq, e.kind, e.text) for e in events]
        assert [e.round.model_sha256 for e in past if e.round] == [e.round.model_sha256 for e in events if e.round]
        assert [event async for event in w.service.watch(ids[0], len(past))] == []
        assert [event.seq async for event in w.service.watch(ids[0], len(past) - 2)] == [len(past) - 1, len(past)]
        assert [(await w.service.get(i)).status for i in ids] == ["COMPLETED", "RECOVERING"]
        await w.agent()
        await w.work()
        await w.service.finish(ids[1])
        await w.work()
        assert [event async for event in w.service.watch(ids[1])][-1].kind == "end"
        assert (await w.service.get(ids[1])).status == "COMPLETED"

    play(core, first_life, store)
    play(core, second_life, store)
