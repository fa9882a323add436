"""How tests open inline fabrics, submit runs to them and follow these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from icrf.client import raise_unless_completed
from icrf.errors import RunError
from icrf.protocol import IDLE, TERMINAL, RoundResult, RunInfo, Submission
from icrf.testing.inline import InlineFabric


@contextmanager
def fabrics_on_demand(templates: Mapping[str, type] | None = None) -> Iterator[Callable[[int], InlineFabric]]:
    """Gives a fabric of so many clusters, started when it is first asked for; all are closed at the end.

    Args:
        templates: node classes by ``local:NAME``.
    """
    with ExitStack() as opened:
        yield cache(lambda clusters: opened.enter_context(InlineFabric(clusters, templates=templates)))


def follow(fabric: InlineFabric, run_id: str) -> tuple[RunInfo, list[RoundResult]]:
    """Wait until a run has ended, in whichever way; the run and its rounds."""
    rounds = [event.round for event in fabric.port.watch(run_id) if event.round]
    return fabric.port.get(run_id), rounds


def completed(fabric: InlineFabric, submission: Submission) -> tuple[RunInfo, list[RoundResult]]:
    """A new run that completes, and its rounds.

    Raises:
        RunError: F002 if it failed, F003 if it was cancelled.
    """
    info, rounds = follow(fabric, fabric.port.submit(submission).run_id)
    raise_unless_completed(info)
    return info, rounds


def follow_until(fabric: InlineFabric, run_id: str, rounds_done: int) -> list[RoundResult]:
    """Wait until a kept run is idle after so many rounds; all results that were told until then.

    Raises:
        RunError: F002 if it failed, F003 if it was cancelled, F005 if it has completed.
    """
    found = []
    for event in fabric.port.watch(run_id):
        found += [event.round] if event.round else []
        info = fabric.port.get(run_id)
        if info.status in TERMINAL:
            raise_unless_completed(info)
        elif event.status == IDLE and info.status == IDLE and info.rounds_done == rounds_done:
            return found
    raise RunError("F005", f"run {run_id[:8]} has ended and was not idle after {rounds_done} rounds")


def facts(result: RoundResult) -> tuple[Any, ...]:
    """What of a round must not depend on how many clusters and hosts it ran."""
    return (
        result.number,
        result.attempt,
        result.model_sha256,
        result.parent_sha256,
        result.consensus_sha256,
        result.participants,
        sorted(result.metrics.items()),
    )
