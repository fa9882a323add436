"""Whether a Ray cluster is still there.

Ray itself notices a dead head late, and then ends the process. So its port is asked instead, and whoever waits for an
answer of the cluster is told when it is gone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any, TypeVar

from icrf.errors import NodeError
from icrf.wire.addresses import parse_address

T = TypeVar("T")

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.0
MISSES = 3


class ClusterWatch:
    """Waits for answers of one life of a cluster; belongs to one asyncio loop.

    Attributes:
        reason: why the cluster is gone; empty while it is there.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._waiting: set[asyncio.Future[Any]] = set()

    def require(self, name: str, method: str) -> None:
        """U003 if the cluster is gone."""
        if self.reason:
            raise self._gone(name, method)

    async def result_of(self, reference: Any, name: str, method: str) -> Any:
        """The value of an ObjectRef; U003 as soon as the cluster is gone, whatever Ray makes of it."""
        return await self.answer_of(reference.future(), name, method)

    async def answer_of(self, future: concurrent.futures.Future[T], name: str, method: str) -> T:
        """The result of a future; U003 as soon as the cluster is gone, for then it may never have one."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[concurrent.futures.Future[T] | None] = loop.create_future()

        def resolve(answer: concurrent.futures.Future[T]) -> None:
            if not waiter.done():
                waiter.set_result(answer)

        def came(answer: concurrent.futures.Future[T]) -> None:
            # In another thread; a loop that has ended has nobody waiting.
            if not loop.is_closed():
                loop.call_soon_threadsafe(resolve, answer)

        future.add_done_callback(came)
        self._waiting.add(waiter)
        try:
            # Not the future itself, which nobody could complete once a waiter has cancelled it.
            answer = await waiter
        finally:
            self._waiting.discard(waiter)
        if answer is None:
            raise self._gone(name, method)
        return answer.result()

    def lose(self, reason: str) -> None:
        """The cluster is gone: everybody who waits gets U003 now."""
        self.reason = self.reason or reason
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _gone(self, name: str, method: str) -> NodeError:
        return NodeError("U003", f"{name} died during {method} with its Ray cluster: {self.reason}", place=name)


async def until_gone(address: str, *, every_s: float = PROBE_EVERY_S, misses: int = MISSES) -> str:
    """Connect to `address` again and again; returns the reason after so many failures in a row."""
    host, port = parse_address(address, place="--ray-address")
    missed = 0
    while True:
        why = await _refused(host, port)
        missed = missed + 1 if why else 0
        if missed >= misses:
            return f"the Ray head at {address} does not answer: {why}"
        await asyncio.sleep(every_s)


async def answers(address: str) -> bool:
    """Whether something accepts connections there."""
    return not await _refused(*parse_address(address, place="--ray-address"))


async def _refused(host: str, port: int) -> str:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        return str(error) or type(error).__name__
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        # It accepted, which is all that was asked.
        return ""
    return ""
