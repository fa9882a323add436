"""A loop in a thread of its own: values and errors come out, and a wait may be broken off anywhere."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from icrf.loop_thread import LoopThread


class Interrupted(BaseException):
    """What the handler of a signal raises."""


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    loop = LoopThread("test")
    yield loop
    loop.close()


async def value() -> int:
    return 7


async def never() -> None:
    await asyncio.Event().wait()


async def fails() -> int:
    raise KeyError("x")


def test_values_and_errors_come_out(thread: LoopThread) -> None:
    assert thread.call(value()) == 7
    with pytest.raises(KeyError):
        thread.call(fails())


def test_a_wait_ends_after_its_time(thread: LoopThread) -> None:
    with pytest.raises(TimeoutError):
        thread.call(never(), timeout_s=0.01)


def interrupted_after(thread: LoopThread, delay_s: float) -> bool:
    """Wait on the loop again and again until a signal breaks off one of the waits."""
    try:
        # Again, as what is raised in a destructor is lost.
        signal.setitimer(signal.ITIMER_REAL, delay_s, 2.0)
        while True:
            thread.call(value())
    except Interrupted:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@pytest.mark.filterwarnings("ignore:coroutine 'value' was never awaited")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_that_raise_during_waits_leave_nothing_locked(thread: LoopThread) -> None:
    """Thousands of waits, and signals at any moment of them; each must leave a loop that answers."""

    def handler(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    try:
        assert all(interrupted_after(thread, 0.0002 + (k % 40) * 0.00002) for k in range(400))
    finally:
        signal.signal(signal.SIGALRM, before)
    answered = threading.Event()
    thread.loop.call_soon_threadsafe(answered.set)
    assert answered.wait(60.0), "the loop waits for a lock that nobody gives back"
    assert thread.call(value()) == 7
