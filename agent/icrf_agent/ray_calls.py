"""Blocking calls of Ray in threads of their own, so that Ray is left only when the last one has returned.

A call of Ray's API in a process that is not connected connects it: to a new cluster, if need be. A thread that an
ended task has left behind would do just that after ``ray.shutdown``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from icrf_agent.ray_probe import ClusterWatch

T = TypeVar("T")

SETTLE_S = 20.0
NAME_FREE_S = 10.0
POLL_S = 0.2


class RayCalls:
    """Threads for one life of a cluster; belongs to one asyncio loop.

    Args:
        watch: knows when that life is over: from then on, calls raise U003.
    """

    def __init__(self, watch: ClusterWatch) -> None:
        self._watch = watch
        self._pending: set[concurrent.futures.Future[Any]] = set()

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """What `call` returns; U003 as soon as the cluster is gone, when the call may never return.

        Neither that nor cancelling the caller ends the thread.
        """
        name = _name(call)
        self._watch.require("the cluster", name)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        # Not a pool's: Python waits for those at its end, and a call into a dead cluster may never return.
        work = (future, call, arguments)
        threading.Thread(target=_complete, args=work, name=f"icrf-ray-{name}", daemon=True).start()
        try:
            return await self._watch.answer_of(future, "the cluster", name)
        except Exception:
            # Whatever Ray makes of a cluster that has died meanwhile.
            self._watch.require("the cluster", name)
            raise

    async def find(self, name: str, namespace: str) -> Any | None:
        """The living actor of that name."""
        try:
            return await self.run(_get_actor, name, namespace)
        except ValueError:
            return None

    async def create(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        """Create a named actor; the name of one that was just killed takes a moment to be free."""
        deadline = time.monotonic() + NAME_FREE_S
        while True:
            try:
                return await self.run(kind.remote, *arguments)
            except ValueError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(POLL_S)

    async def settle(self, within_s: float = SETTLE_S) -> bool:
        """Wait for the calls that run; whether all of them have returned."""
        left = await asyncio.to_thread(concurrent.futures.wait, tuple(self._pending), within_s)
        return not left.not_done


def _complete(future: concurrent.futures.Future[T], call: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    try:
        future.set_result(call(*arguments))
    except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
        future.set_exception(error)


def _get_actor(name: str, namespace: str) -> Any:
    return ray.get_actor(name, namespace=namespace)


def _name(call: Callable[..., Any]) -> str:
    return getattr(call, "__name__", "a call").strip("_")
