"""Following a run: finished rounds scroll by as lines, one footer says what happens now.

Rounds are printed above the live footer instead of inside it, so that a run of any length fits any terminal and stays
in the scroll-back. Where there is no terminal, each round is one line and nothing is ever redrawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from icrf.console.format import (
    MISSING,
    format_bytes,
    format_clock,
    format_count,
    format_duration,
    format_metric,
    safe_text,
    sparkline,
)
from icrf.console.terminal import Terminal
from icrf.protocol import (
    ACTIVATING,
    QUEUED,
    READY,
    RESERVED,
    RESERVING,
    RUNNING,
    RoundResult,
    RunEvent,
)

# What is true once a status has been left; statuses that pass at once say nothing.
_DONE = {RESERVING: "slots reserved", ACTIVATING: "nodes set up"}
_DOING = {
    QUEUED: "waiting for the mediator",
    RESERVING: "reserving slots",
    RESERVED: "slots reserved",
    ACTIVATING: "setting up nodes",
    READY: "ready",
    RUNNING: "training",
}
_STEP_WIDTH = 58


class RunView(Protocol):
    """Shows the events of one run, as a context manager."""

    def show(self, event: RunEvent) -> None:
        """Take the next event."""

    def waiting(self, what: str) -> None:
        """What the run waits for now; empty for nothing. Callable from any thread."""

    def __enter__(self) -> RunView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_view(
    terminal: Terminal, rounds_planned: int, *, merges: bool = False, clock: Callable[[], float] = time.monotonic
) -> RunView:
    """The live view on a terminal, plain lines elsewhere.

    Args:
        merges: rounds that make one model for all groups are marked: others have one per group.
    """
    if terminal.live:
        return LiveView(terminal, rounds_planned, merges=merges, clock=clock)
    return PlainView(terminal, rounds_planned, merges=merges)


def step_line(terminal: Terminal, text: str, seconds: float) -> None:
    """One finished step with its time."""
    if terminal.live:
        label = safe_text(text)
        gap = " " * max(2, _STEP_WIDTH - len(label))
        terminal.line(Text.assemble(("  ✓ ", "green"), label, gap, (f"{format_duration(seconds):>9}", "dim")))
    else:
        terminal.line(f"done  {text}  {format_duration(seconds)}")


class Steps:
    """Tick lines for steps that go on at the same time, each with the time since the start; a spinner says it too."""

    def __init__(self, terminal: Terminal, doing: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
        self._clock = clock
        self._doing = doing
        self._since = clock()
        self._live = Live(console=terminal.console, get_renderable=self._footer, refresh_per_second=8, transient=True)

    def __enter__(self) -> Steps:
        if self._terminal.live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def done(self, text: str) -> None:
        """A step is finished; `text` says what is true now. Callable from any thread."""
        step_line(self._terminal, text, self._clock() - self._since)

    def _footer(self) -> RenderableType:
        return _spinner_line(Text.assemble(self._doing, (f"  {format_clock(self._clock() - self._since)}", "dim")))


class PlainView:
    """One line per round, for pipes and logs."""

    def __init__(self, terminal: Terminal, rounds_planned: int, *, merges: bool = False) -> None:
        self._terminal = terminal
        self._planned, self._merges = rounds_planned, merges
        self._out_of_contact = False

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def show(self, event: RunEvent) -> None:
        """Rounds, moves, warnings and waits; a change of status says nothing that a log would need."""
        repeated = self._out_of_contact
        self._out_of_contact = event.seq == 0
        if repeated and self._out_of_contact:
            return  # events without a number say over and over that the mediator is out of reach
        if event.round is not None:
            self._terminal.line(plain_round(event.round, self._planned, merges=self._merges))
        elif event.kind in ("move", "warning", "waiting"):
            self._terminal.line(f"{event.kind}  {event.text}")

    def waiting(self, what: str) -> None:
        """A log keeps what happened, not what is waited for."""


def plain_round(result: RoundResult, planned: int, *, merges: bool = False) -> str:
    """A round as one line of ``name value`` pairs."""
    total = f"/{planned}" if planned >= result.number else ""
    parts = [f"round {result.number:>{len(str(planned))}}{total}", f"nodes {result.participants}"]
    for name in ("train_loss", "loss", "accuracy"):
        if name in result.metrics:
            parts.append(f"{name} {format_metric(result.metrics[name])}")
    parts += [f"inter-cluster {format_bytes(result.bytes_inter_cluster)}", format_duration(result.wall_s)]
    if len(result.bytes_by_cluster) > 1:
        parts.append(f"received {cluster_cell(result, 10_000)}")
    if merges and result.consensus_sha256:
        parts.append("merged")
    if result.staleness:
        parts.append(f"late {len(result.staleness)}")
    if result.attempt > 1:
        parts.append(f"attempt {result.attempt}")
    return "  ".join(parts)


class LiveView:
    """Round lines above a footer with progress, what is waited for, and the course of the accuracy."""

    def __init__(
        self,
        terminal: Terminal,
        rounds_planned: int,
        *,
        merges: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._terminal = terminal
        self._planned = rounds_planned
        self._clock = clock
        self._started = self._step_since = self._wait_since = clock()
        self._status = QUEUED
        self._waiting = ""
        self._notice = ""
        self._done = 0
        self._seconds = 0.0
        self._accuracies: list[float] = []
        self._table = RoundTable(terminal, merges=merges)
        self._live = Live(console=terminal.console, get_renderable=self._footer, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, event: RunEvent) -> None:
        """Take the next event."""
        # Events without a number are no part of the run: they say that the mediator is out of reach just now.
        self._notice = event.text if event.seq == 0 else ""
        if self._notice:
            return
        if event.round is not None:
            self._round(event.round)
        elif event.kind == "warning":
            self._terminal.line(Text.assemble(("  ! ", "yellow"), safe_text(event.text)))
        elif event.kind == "move":
            self._terminal.line(Text.assemble(("  > ", "cyan"), safe_text(event.text)))
        elif event.kind == "waiting":
            self.waiting(event.text)
        elif event.kind == "status" and event.status != self._status:
            self._left_status(event.status)

    def waiting(self, what: str) -> None:
        """What the run waits for now; the time counts from when it changed."""
        if what != self._waiting:
            self._waiting, self._wait_since = what, self._clock()

    def _left_status(self, status: str) -> None:
        now = self._clock()
        if self._status in _DONE:
            step_line(self._terminal, _DONE[self._status], now - self._step_since)
        self._status, self._step_since = status, now
        self.waiting("")

    def _round(self, result: RoundResult) -> None:
        self._done, self._waiting = result.number, ""
        self._seconds += result.wall_s
        if "accuracy" in result.metrics:
            self._accuracies.append(result.metrics["accuracy"])
        self._table.row(result)

    def _footer(self) -> RenderableType:
        now = self._clock()
        head = _DOING.get(self._status, self._status.lower())
        if not self._done and self._status != RUNNING:
            lines = [_spinner_line(Text.assemble(head, (f"  {format_clock(now - self._step_since)}", "dim")))]
        else:
            lines = [self._progress(now)]
        note = Text("    ", style="dim")
        if self._notice:
            note.append(safe_text(self._notice), style="yellow")
        elif self._waiting:
            note.append(f"waiting for {safe_text(self._waiting)}, {format_clock(now - self._wait_since)}")
        line = sparkline(self._accuracies)
        if line:
            note.append("   " if note.plain.strip() else "").append("accuracy ").append(line, style="green")
        if note.plain.strip():
            note.truncate(self._terminal.console.width, overflow="ellipsis")
            lines.append(note)
        return Group(*lines)

    def _progress(self, now: float) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0))
        left = max(0, self._planned - self._done)
        estimate = f"about {format_clock(left * self._seconds / self._done)} left" if self._done and left else ""
        total = max(1, self._planned)
        grid.add_row(
            Spinner("dots", style="cyan"),
            Text(f"round {min(self._done + 1, total)} of {total}"),
            ProgressBar(total=total, completed=self._done, width=24, complete_style="cyan", finished_style="green"),
            Text(format_clock(now - self._started), style="dim"),
            Text(estimate, style="dim"),
        )
        return _indented(grid)


class RoundTable:
    """The lines of finished rounds, with columns as wide as the terminal allows."""

    _TITLES = ("round", "nodes", "train loss", "loss", "accuracy", "inter-cluster", "time")
    _WIDTHS = (5, 5, 10, 7, 8, 13, 8)

    def __init__(self, terminal: Terminal, *, merges: bool = False) -> None:
        self._terminal, self._merges = terminal, merges
        self._started = False
        self._best = float("-inf")

    def row(self, result: RoundResult) -> None:
        """Print one round, after the heading if it is the first."""
        rest = self._terminal.console.width - sum(self._WIDTHS) - 2 * len(self._WIDTHS) - 3
        if not self._started:
            self._started = True
            heading = "  ".join(t.rjust(w) for t, w in zip(self._TITLES, self._WIDTHS, strict=True))
            tail = "  received by" if len(result.bytes_by_cluster) > 1 and rest >= 12 else ""
            self._print(Text(f"\n  {heading}{tail}", style="dim"))
        metrics = result.metrics
        accuracy = metrics.get("accuracy")
        best = accuracy is not None and accuracy > self._best
        if accuracy is not None and best:
            self._best = accuracy
        cells = (
            (str(result.number), "bold"),
            (f"{result.participants:,}", ""),
            (format_metric(metrics.get("train_loss")), ""),
            (format_metric(metrics.get("loss")), ""),
            (format_metric(accuracy), "bold green" if best else ""),
            (format_bytes(result.bytes_inter_cluster), ""),
            (format_duration(result.wall_s), "dim"),
        )
        line = Text(" ")
        for (text, style), width in zip(cells, self._WIDTHS, strict=True):
            line.append(" ").append(text.rjust(width), style="dim" if text == MISSING else style).append(" ")
        if len(result.bytes_by_cluster) > 1 and rest >= 12:
            line.append(" ").append(cluster_cell(result, rest), style="dim")
        if self._merges and result.consensus_sha256:
            line.append("  merged", style="cyan")
        if result.attempt > 1:
            line.append(f"  try {result.attempt}", style="yellow")
        self._print(line)

    def _print(self, line: Text) -> None:
        self._terminal.console.print(line, no_wrap=True, overflow="ellipsis", crop=True)


def cluster_cell(result: RoundResult, width: int) -> str:
    """What each cluster received in a round, shortened to names or to a count where the width does not do."""
    items = sorted(result.bytes_by_cluster.items())
    full = " · ".join(f"{safe_text(name)} {format_bytes(size)}" for name, size in items)
    if len(full) <= width:
        return full
    sizes = " · ".join(format_bytes(size) for _, size in items)
    return sizes if len(sizes) <= width else format_count(len(items), "cluster")


def _spinner_line(text: Text) -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(Spinner("dots", style="cyan"), text)
    return _indented(grid)


def _indented(grid: Table) -> RenderableType:
    outer = Table.grid()
    outer.add_row("  ", grid)
    return outer
