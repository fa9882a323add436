"""How the tests of this folder start inline fabrics, submit runs to them and follow these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache

from icrf.protocol import COMPLETED, IDLE, TERMINAL, RoundResult, RunInfo, Submission
from icrf.testing.inline import InlineFabric


@contextmanager
def fabrics_on_demand(templates: Mapping[str, type] | None = None) -> Iterator[Callable[[int], InlineFabric]]:
    """Gives a fabric of so many clusters, started when it is first asked for; all are closed at the end."""
    with ExitStack() as opened:
        yield cache(lambda clusters: opened.enter_context(InlineFabric(clusters, templates=templates)))


def follow(fabric: InlineFabric, run_id: str) -> tuple[RunInfo, list[RoundResult]]:
    """Wait until a run has ended, in whichever way; the run and its rounds."""
    rounds = [event.round for event in fabric.port.watch(run_id) if event.round]
    return fabric.port.get(run_id), rounds


def completed(fabric: InlineFabric, submission: Submission) -> tuple[RunInfo, list[RoundResult]]:
    """A new run that completes, and its rounds."""
    info, rounds = follow(fabric, fabric.port.submit(submission).run_id)
    assert (info.status, info.error_json) == (COMPLETED, "")
    return info, rounds


def follow_until(fabric: InlineFabric, run_id: str, rounds_done: int) -> list[RoundResult]:
    """Wait until a kept run is idle after so many rounds; all results that were told until then."""
    found = []
    for event in fabric.port.watch(run_id):
        found += [event.round] if event.round else []
        info = fabric.port.get(run_id)
        assert info.status not in TERMINAL, info.error_json
        if event.status == IDLE and info.status == IDLE and info.rounds_done == rounds_done:
            return found
    raise AssertionError("the run has ended")
