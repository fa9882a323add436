"""Attempts that begin and end at the same time: what is posted in one never counts in another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import IcrfError
from icrf.protocol import CENTRALIZED
from icrf.testing.round_driver import CLUSTER, RUN, RoundDriver, activation
from icrf.testing.waiting import async_until
from icrf_agent.inline_substrate import InlineSubstrate
from icrf_agent.phases import Phases
from icrf_agent.runtime import HostedRuntime
from icrf_agent.substrate import Actor, Hosted


class Replies:
    """A topology manager whose answers come when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    async def call(self, method: str, *arguments: Any) -> Any:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]


def test_an_attempt_whose_opening_is_answered_late_does_not_take_the_place_of_the_next() -> None:
    async def main() -> None:
        manager: Replies = Replies()
        actor: Actor = manager
        phases, run = Phases(lambda: actor), Hosted(activation(CENTRALIZED), [], [])
        driver = RoundDriver(HostedRuntime(CLUSTER, InlineSubstrate()), run.activation, absmax=(1.0,), total=1)
        first, second = driver.next_start(1), driver.next_start(1)
        opening = [asyncio.create_task(phases.begin(run, start)) for start in (first, second)]
        await async_until(lambda: len(manager.waiting) == 2)
        for answer, task in zip(reversed(manager.waiting), reversed(opening), strict=True):
            answer.set_result(None)
            await asyncio.wait([task])
        await opening[1]
        with pytest.raises(IcrfError, match="P003"):
            await opening[0]
        assert run.tray.position == (1, 2)

    asyncio.run(main())


def driven(work: Callable[[RoundDriver], Awaitable[None]]) -> None:
    async def main() -> None:
        runtime = HostedRuntime(CLUSTER, InlineSubstrate())
        await runtime.start()
        driver = RoundDriver(runtime, activation(CENTRALIZED))
        try:
            await driver.activate()
            await work(driver)
        finally:
            await runtime.close()

    asyncio.run(main())


def test_voiding_an_attempt_leaves_a_later_one_alone() -> None:
    async def work(driver: RoundDriver) -> None:
        runtime, start = driver.runtime, replace(driver.next_start(1), attempt=2)
        await runtime.publish_model(RUN, start)
        await runtime.train(RUN, start)
        await runtime.abort(RUN, 1, 1)
        assert (await runtime.aggregate(RUN, start)).model_hash
        await runtime.abort(RUN, 1, 2)
        with pytest.raises(IcrfError, match="P003"):
            await runtime.aggregate(RUN, start)

    driven(work)


def test_a_manager_that_hangs_does_not_hold_up_who_voids_an_attempt() -> None:
    async def main() -> None:
        manager: Replies = Replies()
        actor: Actor = manager
        phases, run = Phases(lambda: actor), Hosted(activation(CENTRALIZED), [], [])
        run.tray.waiting.append(asyncio.ensure_future(manager.call("publish_all")))
        await asyncio.wait_for(phases.drop(run), 60.0)
        assert run.tray.waiting == []

    asyncio.run(main())
