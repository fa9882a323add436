"""Waiting for a condition, in a thread and on a loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from icrf.testing.waiting import async_until, until


def on_a_loop(look: Callable[[], Any], timeout_s: float) -> Any:
    return asyncio.run(async_until(look, timeout_s))


@pytest.mark.parametrize("wait", [until, on_a_loop])
def test_the_first_true_value_is_returned_and_asking_ends_there(wait: Callable[..., Any]) -> None:
    values = iter([None, 0, "", "there", "later"])
    assert wait(lambda: next(values), 30.0) == "there"
    assert list(values) == ["later"]


@pytest.mark.parametrize("wait", [until, on_a_loop])
def test_what_does_not_come_true_is_an_error_and_looked_for_at_least_once(wait: Callable[..., Any]) -> None:
    looks: list[None] = []
    with pytest.raises(TimeoutError, match="within 0 s"):
        wait(lambda: looks.append(None), 0.0)
    assert looks
    assert wait(lambda: True, 0.0) is True


@pytest.mark.parametrize("wait", [until, on_a_loop])
def test_what_a_look_raises_is_raised(wait: Callable[..., Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        wait(lambda: 1 // 0, 30.0)


def test_other_tasks_go_on_meanwhile() -> None:
    async def main() -> None:
        done: list[bool] = []

        async def other() -> None:
            await asyncio.sleep(0)
            done.append(True)

        task = asyncio.create_task(other())
        assert await async_until(lambda: done) == [True]
        await task

    asyncio.run(main())


def test_other_threads_go_on_meanwhile() -> None:
    came = threading.Event()
    thread = threading.Thread(target=came.set)
    thread.start()
    assert until(came.is_set)
    thread.join()
