"""An asyncio loop in a thread of its own, for embedding the asynchronous fabric in synchronous programs."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs one event loop until `close`.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and wait for its result.

        Raises:
            TimeoutError: after `timeout_s` seconds; the coroutine goes on.
            CancelledError: that of :mod:`concurrent.futures`; the thread was closed.
        """
        # A signal's handler may raise at any moment here. A queue's wait is one step; that of a future is many, and a
        # lock that stays taken in between would hold the loop for ever.
        ended: queue.SimpleQueue[asyncio.Task[T]] = queue.SimpleQueue()

        def over(task: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # seen: whoever waited may be gone
            ended.put(task)

        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(work).add_done_callback(over))
        try:
            task = ended.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if task.cancelled():
            raise CancelledError
        return task.result()

    def close(self) -> None:
        """Cancel what still runs and end the thread; harmless when called twice."""
        if self.loop.is_closed():
            return
        self.call(_cancel_all())
        self.call(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_all() -> None:
    tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
