"""Calls of Ray that their task has left behind: Ray is left when they have returned, and they start nothing anew."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from icrf.errors import NodeError
from icrf_agent.ray_calls import RayCalls
from icrf_agent.ray_probe import ClusterWatch

LIMIT_S = 30.0


def test_the_end_waits_for_a_call_whose_task_was_cancelled() -> None:
    entered, go_on, returned = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        go_on.wait(LIMIT_S)
        returned.set()

    async def main() -> None:
        calls = RayCalls(ClusterWatch())
        task = asyncio.create_task(calls.run(slow))
        await asyncio.to_thread(entered.wait, LIMIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await calls.settle(0.01)
        go_on.set()
        assert await calls.settle(LIMIT_S) and returned.is_set()

    asyncio.run(main())


def test_what_ray_says_of_a_dead_cluster_is_a_death() -> None:
    watch = ClusterWatch()

    def dies() -> Any:
        watch.lose("killed")
        raise RuntimeError("whatever Ray says")

    async def main() -> None:
        calls = RayCalls(watch)
        for _ in range(2):
            with pytest.raises(NodeError, match=r"U003 .*died during dies with its Ray cluster: killed"):
                await calls.run(dies)
        assert await calls.settle(LIMIT_S)

    asyncio.run(main())


def test_a_call_that_never_returns_ends_with_its_cluster() -> None:
    entered, go_on = threading.Event(), threading.Event()
    watch = ClusterWatch()

    def hangs() -> None:
        entered.set()
        go_on.wait(LIMIT_S)

    async def main() -> None:
        calls = RayCalls(watch)
        task = asyncio.create_task(calls.run(hangs))
        await asyncio.to_thread(entered.wait, LIMIT_S)
        watch.lose("killed")
        with pytest.raises(NodeError, match="U003"):
            await asyncio.wait_for(task, LIMIT_S)
        go_on.set()
        assert await calls.settle(LIMIT_S)

    asyncio.run(main())
