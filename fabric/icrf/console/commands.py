"""What the commands that follow a run do, apart from parsing their arguments."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.text import Text

from icrf.client import Fabric, Run, cause_of
from icrf.console.doors import Doors
from icrf.console.format import format_bytes, format_count, safe_text, short_id
from icrf.console.live import RunView, Steps, open_view
from icrf.console.plan_view import nodes_by_cluster
from icrf.console.profile_view import show_profile
from icrf.console.runs_view import show_summary
from icrf.console.terminal import Terminal
from icrf.console.unfinished import (
    Unfinished,
    find_unfinished,
    new_state,
    read_summary,
    remember,
    remove_state,
    state_folder,
)
from icrf.errors import IcrfError, LocalError, ResourceError, RunError, error_from_dict
from icrf.protocol import (
    CANCELLED,
    CENTRALIZED,
    COMPLETED,
    HIERARCHICAL,
    TERMINAL,
    Plan,
    RoundResult,
    RunInfo,
    Submission,
)
from icrf.run_folder import RunFolder, default_folder, require_free, require_writable, summarize
from icrf.sinks import MetricsSink

Outcome = tuple[dict[str, Any], int]

# How long a cancelled run may take to say so before its folder is written as it is.
_CANCEL_WAIT_S = 10.0
_POLL_S = 1.0
DEMO = "digits-star.yaml"


def run_here(
    terminal: Terminal,
    doors: Doors,
    submission: Submission,
    clusters: int,
    out: Path | None,
    sinks: Sequence[MetricsSink] = (),
) -> Outcome:
    """``fabric run``: an embedded fabric for one federation. Its state lies in `out`, so that it can be resumed."""
    require_free(out) if out else require_writable(Path("runs"))
    require_feasible(doors.plan_local(submission, clusters))
    state = None if out is None else new_state(out)
    with _embedded(terminal, doors, clusters, state) as fabric:
        run, folder, _ = _start(terminal, fabric, submission, out, sinks)
        if state is not None:
            remember(state, Unfinished(run.id, clusters))
        with folder:
            outcome = _follow_here(terminal, run, folder)
    return _settled(outcome, state)


def require_feasible(plan: Plan) -> None:
    """R001 before anything starts, when this machine cannot hold what is asked for."""
    if not plan.feasible:
        hint = "`fabric plan` shows what each cluster would hold"
        raise ResourceError("R001", "; ".join(plan.problems), place="resources", hint=hint)


def resume_here(
    terminal: Terminal, doors: Doors, out: Path, clusters: int | None, sinks: Sequence[MetricsSink] = ()
) -> Outcome:
    """``fabric run --resume``: go on with the run of a folder, or show again how it ended."""
    found = find_unfinished(out)
    if found is None:
        return _shown_again(terminal, out)
    if clusters not in (None, found.clusters):
        raise LocalError(
            "L009",
            f"the run in {out} is on {format_count(found.clusters, 'local cluster')}",
            place="--clusters",
            value=clusters,
            hint="leave --clusters out with --resume",
        )
    state = state_folder(out)
    with _embedded(terminal, doors, found.clusters, state) as fabric:
        run = fabric.run(found.run_id, sinks=sinks)
        terminal.note(f"going on with run {short_id(run.id)} after round {run.info().rounds_done}")
        # The journal has every committed round: the folder is written anew, with each of them once.
        with RunFolder(out) as folder:
            outcome = _follow_here(terminal, run, folder)
    return _settled(outcome, state)


def run_demo(terminal: Terminal, doors: Doors, submission: Submission, clusters: int, out: Path | None) -> Outcome:
    """``fabric demo``: the packaged example, explained."""
    terminal.line(Text.assemble(("ICRF demo", "bold"), "  one federation over ", format_count(clusters, "Ray cluster")))
    terminal.line()
    require_free(out) if out else require_writable(Path("runs"))
    with _embedded(terminal, doors, clusters, None) as fabric:
        run, folder, plan = _start(terminal, fabric, submission, out)
        with folder:
            summary, code = _follow_here(terminal, run, folder)
    if summary["status"] == COMPLETED:
        _explain_demo(terminal, plan, summary, folder.path)
    return summary, code


def submit_there(
    terminal: Terminal,
    fabric: Fabric,
    submission: Submission,
    follow: bool,
    out: Path | None,
    sinks: Sequence[MetricsSink] = (),
) -> Outcome:
    """``fabric submit``: hand a federation to a mediator, and follow it if asked to."""
    if follow:
        require_free(out) if out else require_writable(Path("runs"))
    # Folders of this machine mean nothing there: a cluster runs user code that its own agent allows and finds.
    run = fabric.submit(replace(submission, code_path=""), sinks=sinks)
    if not follow:
        info = run.info()
        terminal.line(Text.assemble("submitted ", (short_id(run.id), "bold"), f"  {safe_text(info.federation)}"))
        terminal.line(f"fabric watch {short_id(run.id)} follows it")
        return summarize(info, []), 0
    with RunFolder(out or default_folder(run.id)) as folder, _detaching(terminal, run):
        return _follow(terminal, run, folder)


def watch_there(terminal: Terminal, run: Run) -> Outcome:
    """``fabric watch``: follow a run without writing anything."""
    info = run.info()
    rounds = []
    with _detaching(terminal, run), _view(terminal, run, info) as view:
        for event in run.events():
            if event.round is not None:
                rounds.append(event.round)
            view.show(event)
    return _ended(terminal, run.info(), summarize(run.info(), rounds), None, rounds)


def fetch_there(terminal: Terminal, run: Run, out: Path | None) -> Outcome:
    """``fabric fetch``: the folder of a run that has ended."""
    info = run.info()
    if info.status not in TERMINAL:
        raise RunError(
            "F005",
            f"run {short_id(run.id)} has not ended",
            value=info.status,
            hint=f"fabric watch {short_id(run.id)} follows it",
        )
    path = run.save(out)
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    show_summary(terminal, summary, path)
    return summary, 0


@contextmanager
def demo_file() -> Iterator[Path]:
    """The packaged example as a file."""
    with resources.as_file(resources.files("icrf.examples") / DEMO) as path:
        yield path


@contextmanager
def _embedded(terminal: Terminal, doors: Doors, clusters: int, state: Path | None) -> Iterator[Fabric]:
    with Steps(terminal, f"starting {format_count(clusters, 'local Ray cluster')}") as steps:
        handle = doors.local(clusters, state, steps.done)
    with Fabric(handle.port, local=handle) as fabric:
        yield fabric


def _start(
    terminal: Terminal, fabric: Fabric, submission: Submission, out: Path | None, sinks: Sequence[MetricsSink] = ()
) -> tuple[Run, RunFolder, Plan]:
    """Plan, submit and open the run folder; the folder is the caller's to close."""
    plan = fabric.plan(submission)
    placed = " · ".join(f"{name} {len(nodes):,}" for name, nodes in nodes_by_cluster(plan).items() if nodes)
    step = f"{format_count(len(plan.assignment), 'node')} placed: {placed}"
    if terminal.live:
        terminal.line(Text.assemble(("  ✓ ", "green"), safe_text(step)))
    else:
        terminal.line(f"done  {step}")
    run = fabric.submit(submission, sinks=sinks)
    folder = RunFolder(out or default_folder(run.id))
    folder.write_plan(plan)
    return run, folder, plan


def _settled(outcome: Outcome, state: Path | None) -> Outcome:
    """The state of a run that is complete is of no more use; that of a failed one has the logs that say why."""
    if state is not None and outcome[0]["status"] == COMPLETED:
        remove_state(state)
    return outcome


def _shown_again(terminal: Terminal, out: Path) -> Outcome:
    """The summary of a run that has ended."""
    summary = read_summary(out)
    if summary is None:
        raise RunError(
            "F001",
            f"{out} holds no run to go on with",
            place="--resume",
            hint="a run can be resumed from the folder that it was started with by --out",
        )
    show_summary(terminal, summary, out)
    if summary["status"] == COMPLETED:
        return summary, 0
    known = f"run {short_id(str(summary['run_id']))} was cancelled"
    error = error_from_dict(summary["error"]) if summary.get("error") else RunError("F003", known)
    terminal.error(error)
    return summary, error.exit_code


def _follow_here(terminal: Terminal, run: Run, folder: RunFolder) -> Outcome:
    """Follow a run of an embedded fabric; an interruption cancels it. (A command that is killed cancels nothing.)"""
    try:
        return _follow(terminal, run, folder)
    except KeyboardInterrupt:
        terminal.note(f"cancelling run {short_id(run.id)}; what it has reached is kept in {folder.path}")
        with suppress(IcrfError):  # the fabric may be gone already, and the interruption is what counts
            run.cancel()
            run.wait(_CANCEL_WAIT_S)
            run.close_folder(folder)
        raise


def _follow(terminal: Terminal, run: Run, folder: RunFolder) -> Outcome:
    with _view(terminal, run, run.info()) as view:
        summary = run.save_into(folder, view.show)
    return _ended(terminal, run.info(), summary, folder.path, folder.rounds)


def _ended(
    terminal: Terminal, info: RunInfo, summary: dict[str, Any], folder: Path | None, rounds: Sequence[RoundResult]
) -> Outcome:
    show_summary(terminal, summary, folder)
    show_profile(terminal, rounds)
    if info.status == COMPLETED:
        return summary, 0
    error = RunError("F003", f"run {short_id(info.run_id)} was cancelled")
    if info.status != CANCELLED:
        cause = cause_of(info)
        terminal.error(cause)
        return summary, cause.exit_code
    terminal.error(error)
    return summary, error.exit_code


@contextmanager
def _detaching(terminal: Terminal, run: Run) -> Iterator[None]:
    """A run on a remote fabric goes on when nobody watches; say so."""
    try:
        yield
    except KeyboardInterrupt:
        name = short_id(run.id)
        terminal.note(f"run {name} goes on; fabric watch {name} follows it again, fabric cancel {name} ends it")
        raise


@contextmanager
def _view(terminal: Terminal, run: Run, info: RunInfo) -> Iterator[RunView]:
    with open_view(terminal, info.rounds_planned, merges=info.flow == HIERARCHICAL) as view:
        if not terminal.live:
            yield view
            return
        with _Poller(run, view.waiting):
            yield view


class _Poller:
    """Asks once a second what a run waits for: within a round the event stream says nothing."""

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self._run = run
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="icrf-waiting-for", daemon=True)

    def __enter__(self) -> _Poller:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * _POLL_S)

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._tell(self._run.info().waiting_for)
            except IcrfError as error:
                self._tell(f"the mediator: {error.message}")


def flat_bytes(plan: Plan, rounds: int) -> int:
    """What a flat star would send between clusters: the model down and up for every client away from the server."""
    home = next(iter(plan.assignment.values()))
    remote = sum(cluster != home for cluster in plan.assignment.values())
    return 2 * remote * 4 * plan.num_parameters * rounds


def _explain_demo(terminal: Terminal, plan: Plan, summary: dict[str, Any], folder: Path) -> None:
    crossed = int(summary["bytes_inter_cluster"])
    if plan.flow == CENTRALIZED and crossed:
        flat = flat_bytes(plan, int(summary["rounds"]))
        terminal.facts([("flat star", f"would send {format_bytes(flat)}, {flat / crossed:.1f} times as much")])
    terminal.line()
    terminal.line(Text("Try next", style="bold"))
    config = folder / "config.yaml"
    terminal.facts(
        [
            ("same sha256", f"fabric run {config} --clusters 1"),
            ("a plan", f"fabric plan {config} --clusters 3"),
            ("another seed", f"fabric run {config} -o seed=1"),
            ("all the keys", f"fabric validate {config}"),
        ]
    )
