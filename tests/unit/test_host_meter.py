"""Where a host's time goes: no second is lost within a phase, and none counts twice."""

from __future__ import annotations

import numpy as np
import pytest

from icrf.exchange import UPDATE
from icrf.protocol import EVALUATING, EXCHANGING, HOST_PARTS, OTHER, SUMMING, TRAINING
from icrf_agent.host_meter import HostMeter, MeteredReferences


class Clock:
    """A clock that only `pass_` moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> HostMeter:
    return HostMeter(clock)


def test_what_is_inside_does_not_count_outside_and_all_adds_up(meter: HostMeter, clock: Clock) -> None:
    began_s = clock.now_s
    with meter.phase((1, 1), OTHER):
        clock.pass_(1.0)
        with meter.doing(TRAINING):
            clock.pass_(2.0)
            with meter.doing(EXCHANGING):
                clock.pass_(4.0)
            clock.pass_(8.0)
        with meter.doing(SUMMING):
            clock.pass_(16.0)
        clock.pass_(32.0)
    assert meter.seconds == {OTHER: 33.0, TRAINING: 10.0, EXCHANGING: 4.0, SUMMING: 16.0, EVALUATING: 0.0}
    assert sum(meter.seconds.values()) == clock.now_s - began_s


def test_phases_of_an_attempt_add_up_and_another_attempt_begins_at_zero(meter: HostMeter, clock: Clock) -> None:
    for part, seconds in ((OTHER, 1.0), (SUMMING, 2.0), (SUMMING, 4.0)):
        with meter.phase((3, 1), part):
            clock.pass_(seconds)
        clock.pass_(1000.0)
    assert (meter.seconds[OTHER], meter.seconds[SUMMING]) == (1.0, 6.0)
    with meter.phase((3, 2), OTHER):
        clock.pass_(0.5)
    assert meter.seconds == dict.fromkeys(HOST_PARTS, 0.0) | {OTHER: 0.5}


def test_between_phases_nothing_is_counted(meter: HostMeter, clock: Clock) -> None:
    with meter.doing(TRAINING):
        clock.pass_(5.0)
    assert not any(meter.seconds.values())


def test_a_phase_that_raises_ends_too(meter: HostMeter, clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError), meter.phase((1, 1), OTHER), meter.doing(TRAINING):
        clock.pass_(3.0)
        raise ZeroDivisionError
    clock.pass_(7.0)
    assert (meter.seconds[TRAINING], meter.seconds[OTHER]) == (3.0, 0.0)


def test_the_object_store_takes_time_of_exchange(meter: HostMeter, clock: Clock) -> None:
    class Slow:
        def put(self, array: object, kind: str = UPDATE) -> object:
            clock.pass_(2.0)
            return array

        get = put

    references = MeteredReferences(Slow(), meter)  # type: ignore[arg-type]
    array = np.zeros(2)
    with meter.phase((1, 1), SUMMING):
        assert references.get(references.put(array, UPDATE)) is array
    assert (meter.seconds[EXCHANGING], meter.seconds[SUMMING]) == (4.0, 0.0)
