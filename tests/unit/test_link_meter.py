"""Measuring a link by payloads, on lines whose figures are known. No clock but the test's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from icrf.errors import ProtocolError
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf_agent import link_meter
from icrf_agent.link_meter import measure_link

MB = 1e6


class Line:
    """Takes a round trip and the time of the bytes; a first payload also has to open the connection."""

    def __init__(self, bytes_per_s: float, rtt_s: float, late: Iterator[float] = iter(())) -> None:
        self.bytes_per_s, self.rtt_s, self.late = bytes_per_s, rtt_s, late
        self.now_s = 0.0
        self.sent: list[PayloadHeader] = []

    def send(self, header: PayloadHeader, data: np.ndarray[Any, Any]) -> None:
        assert data.dtype == np.uint8 and data.size == header.num_elements
        self.now_s += self.rtt_s * (1 if self.sent else 3) + data.size / self.bytes_per_s + next(self.late, 0.0)
        self.sent.append(header)

    def measure(self) -> Any:
        return measure_link(self.send, "a", PeerAddress("b", ""), lambda: self.now_s)


@pytest.mark.parametrize("bytes_per_s", [0.05 * MB, 6.25 * MB, 1000 * MB])
@pytest.mark.parametrize("rtt_s", [0.0001, 0.08, 0.6])
def test_a_steady_line_is_measured_as_it_is(bytes_per_s: float, rtt_s: float) -> None:
    line = Line(bytes_per_s, rtt_s)
    found = line.measure()
    assert found.rtt_s == pytest.approx(rtt_s)
    assert found.bytes_per_s == pytest.approx(bytes_per_s) or (rtt_s > 0.05 and bytes_per_s > 100 * MB)
    assert line.now_s < link_meter.BUDGET_S + link_meter.PATIENCE_S
    assert sum(header.num_elements for header in line.sent) < 2 * link_meter.MOST_BYTES
    # Each payload is one of its own, so that none is taken for another that was sent again.
    assert len({(header.run_id, header.attempt) for header in line.sent}) == len(line.sent)
    assert line.measure() and line.sent[0].run_id != line.sent[-1].run_id


def test_a_ping_that_is_held_up_now_and_then_does_not_count() -> None:
    found = Line(6.25 * MB, 0.08, iter([0.0, 0.0, 2.0, 0.0, 0.0, 3.0])).measure()
    assert found.rtt_s == pytest.approx(0.08)


def test_a_stream_faster_than_a_ping_still_gives_a_figure() -> None:
    """Where round trips vary more than the bytes take, the figure is finite and no better than the stream was."""
    pings = [0.5, 0.1, 0.12, 0.14, 0.1, 0.11, 0.13, 0.12]
    line = Line(1e12, 0.0, iter(pings))
    found = line.measure()
    assert found.rtt_s == pytest.approx(statistics.median(pings[1:]))
    assert 0.0 < found.bytes_per_s <= 10 * 1e12 * 1.001


def test_a_slow_line_is_not_asked_for_more_than_it_can_carry() -> None:
    line = Line(5_000.0, 1.0)
    found = line.measure()
    assert found.bytes_per_s == pytest.approx(5_000.0)
    assert max(header.num_elements for header in line.sent) == link_meter.FIRST_BYTES


def test_a_line_that_leads_nowhere_is_an_error() -> None:
    def send(header: PayloadHeader, data: np.ndarray[Any, Any]) -> None:
        raise ProtocolError("P030", "cluster 'b' cannot be reached")

    with pytest.raises(ProtocolError, match="P030"):
        measure_link(send, "a", PeerAddress("b", ""))
