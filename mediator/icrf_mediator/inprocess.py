"""Adapters of the mediator for callers in the same process: no sockets, the same contracts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from icrf.errors import IcrfError, LocalError
from icrf.protocol import (
    ClusterInfo,
    Instruction,
    MeasuredLink,
    Plan,
    Register,
    Reject,
    Report,
    RunEvent,
    RunInfo,
    Submission,
)
from icrf_mediator.service import MediatorService

log = logging.getLogger("icrf.mediator")

T = TypeVar("T")

RECONNECT_S = 0.02


class InProcessLink:
    """:class:`icrf.ports.AgentLink` of an agent on the mediator's own loop.

    Args:
        mediator: the mediator to register with, asked for at every connection; None while there is none.
    """

    def __init__(self, mediator: Callable[[], MediatorService | None]) -> None:
        self._mediator = mediator
        self._service: MediatorService | None = None
        self._closing = False
        self._instructions: asyncio.Queue[Instruction | None] = asyncio.Queue()
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self._session = ""
        self._pump: asyncio.Task[None] | None = None
        self._closing = False

    def send(self, instruction: Instruction) -> None:
        """The mediator's side (:class:`icrf.ports.AgentPort`)."""
        self._instructions.put_nowait(instruction)

    def disconnect(self) -> None:
        self._instructions.put_nowait(None)

    async def run(self, register: Callable[[], Report], deliver: Callable[[Instruction], None]) -> None:
        while not self._closing:
            self._service = self._mediator()
            if self._service is None:
                await asyncio.sleep(RECONNECT_S)
                continue
            request = register()
            assert isinstance(request, Register)
            self._session = await self._service.agent_connected(request, self, "this process")
            self._pump = asyncio.create_task(self._forward(self._service, self._session))
            try:
                while (instruction := await self._instructions.get()) is not None:
                    deliver(instruction)
                    if isinstance(instruction, Reject):
                        return
            finally:
                self._reports.put_nowait(None)
                await self._pump
            # The mediator has ended the stream, for instance with the lease: come back as over a socket.
            await self._service.agent_disconnected(self._session)

    def report(self, report: Report) -> None:
        self._reports.put_nowait(report)

    async def upload(self, run_id: str, artifact: str, chunks: Iterator[bytes]) -> str:
        writer = self._live().upload_writer(run_id, artifact)
        try:
            for chunk in chunks:
                await asyncio.to_thread(writer.write, chunk)
            return await asyncio.to_thread(writer.commit)
        except BaseException:
            writer.abort()
            raise

    async def download(self, run_id: str, artifact: str) -> bytes:
        return b"".join(await asyncio.to_thread(list, self._live().fetch(run_id, artifact)))

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._reports.put_nowait(None)
        if self._pump is not None:
            await self._pump
        if self._service is not None:
            await self._service.agent_disconnected(self._session)
        self._instructions.put_nowait(None)

    def _live(self) -> MediatorService:
        service = self._service or self._mediator()
        if service is None:
            raise LocalError("L001", "the mediator is away")
        return service

    async def _forward(self, service: MediatorService, session: str) -> None:
        while (report := await self._reports.get()) is not None:
            try:
                await service.agent_report(session, report)
            except IcrfError as error:
                # Over a socket the stream would break and come back; here the next report just follows.
                log.error("a report was not taken: %s", error)


class InProcessMediator:
    """:class:`icrf.ports.MediatorPort` for threads other than the mediator's loop.

    Args:
        service: the mediator.
        loop: the running loop that owns it.
    """

    def __init__(self, service: MediatorService, loop: asyncio.AbstractEventLoop) -> None:
        self._service, self._loop = service, loop

    def submit(self, submission: Submission) -> RunInfo:
        return self._wait(self._service.submit(submission))

    def plan(self, submission: Submission) -> Plan:
        return self._wait(self._service.plan(submission))

    def get(self, run_id: str) -> RunInfo:
        return self._wait(self._service.get(run_id))

    def list_runs(self) -> list[RunInfo]:
        return self._wait(self._service.list_runs())

    def clusters(self) -> list[ClusterInfo]:
        return self._wait(self._service.clusters())

    def links(self) -> list[MeasuredLink]:
        return self._wait(self._service.links())

    def measure_links(self) -> list[MeasuredLink]:
        return self._wait(self._service.measure_links())

    def watch(self, run_id: str, after_seq: int = 0) -> Iterator[RunEvent]:
        events = self._service.watch(run_id, after_seq)
        try:
            while (event := self._wait(_next(events))) is not None:
                yield event
        finally:
            # A stopped mediator has closed it already.
            with contextlib.suppress(LocalError):
                self._wait(_close(events))

    def cancel(self, run_id: str) -> RunInfo:
        return self._wait(self._service.cancel(run_id))

    def advance(self, run_id: str, stage: str, rounds: int = 0) -> RunInfo:
        return self._wait(self._service.advance(run_id, stage, rounds))

    def change_nodes(self, run_id: str, add: Sequence[str] = (), remove: Sequence[str] = ()) -> RunInfo:
        return self._wait(self._service.change_nodes(run_id, add, remove))

    def finish(self, run_id: str) -> RunInfo:
        return self._wait(self._service.finish(run_id))

    def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes:
        return self._wait(self._service.call_node(run_id, node_id, method, arguments))

    def send_message(self, run_id: str, recipients: Sequence[str], message: bytes) -> None:
        self._wait(self._service.send_message(run_id, recipients, message))

    def fetch(self, run_id: str, artifact: str) -> Iterator[bytes]:
        return self._wait(_call(self._service.fetch, run_id, artifact))

    def close(self) -> None:
        """Nothing is held."""

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise _stopped() from None
        try:
            return future.result()
        except CancelledError:
            raise _stopped() from None
        finally:
            # Ctrl-C ends the wait only: without this the work would go on, and a watch could not be closed.
            future.cancel()


def _stopped() -> LocalError:
    return LocalError("L001", "the mediator of this process is stopped", hint="open a new one with connect()")


async def _next(events: AsyncIterator[RunEvent]) -> RunEvent | None:
    return await anext(events, None)


async def _close(events: AsyncIterator[RunEvent]) -> None:
    await events.aclose()  # type: ignore[attr-defined]


async def _call(work: Callable[..., T], *arguments: Any) -> T:
    return work(*arguments)
