"""The command ``fabric``: a thin layer over the SDK. What it shows lives in ``console/``.

Heavy imports (torch, Ray, gRPC, the embedded fabric) happen inside the commands that need them, so that ``--help`` and
``validate`` answer at once.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icrf import __version__
from icrf.console.guard import Session, guarded, terminate
from icrf.console.options import (
    Clusters,
    FedFile,
    Json,
    Log,
    Mediator,
    Out,
    Overrides,
    Plain,
    Profile,
    RunId,
    TlsDir,
    Wan,
)
from icrf.console.terminal import Terminal
from icrf.errors import LocalError

if TYPE_CHECKING:
    from icrf.client import Fabric, LocalHandle
    from icrf.ports import MediatorPort
    from icrf.protocol import Plan, Submission
    from icrf.sinks import MetricsSink
    from icrf.spec import FederationConfig
    from icrf.wan import WanShape

DEFAULT_MEDIATOR = "127.0.0.1:7443"

app = typer.Typer(
    name="fabric",
    help="Inter-Cluster Ray Fabric: one federation over many Ray clusters, the same bits on one or on ten.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

HERE, THERE = "On this machine", "On a fabric"


def _remote(address: str, tls: Path | None) -> MediatorPort:
    from icrf.wire.mediator_client import GrpcMediator
    from icrf.wire.tls import TlsFiles

    return GrpcMediator(address, tls=TlsFiles.at(tls))


def _local(
    clusters: int, state_dir: Path | None, on_progress: Callable[[str], None], wan: WanShape | None = None
) -> LocalHandle:
    from icrf.local import open_local

    return open_local(clusters, state_dir=state_dir, on_progress=on_progress, wan=wan)


def _plan_local(submission: Submission, clusters: int) -> Plan:
    from icrf.local import plan_local

    return plan_local(submission, clusters)


@dataclass(frozen=True)
class Doors:
    """How the commands get at a fabric. Tests hand in others."""

    remote: Callable[[str, Path | None], MediatorPort] = _remote
    local: Callable[..., LocalHandle] = _local
    plan_local: Callable[[Submission, int], Plan] = _plan_local
    wall_s: Callable[[], float] = field(default=time.time)


def command(panel: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors become lines and exit codes."""
    return lambda function: app.command(name, rich_help_panel=panel)(guarded(function))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fabric {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """What holds for every command."""
    context.obj = Session(doors=context.obj or Doors(), debug=debug)


# ---------------------------------------------------------------- on this machine


@command(HERE)
def run(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FED.yaml", help="The federation; not needed with --resume.", show_default=False),
    ] = None,
    clusters: Annotated[
        int | None,
        typer.Option(
            "--clusters",
            min=1,
            max=64,
            metavar="N",
            help="How many local Ray clusters.",
            show_default="1",
        ),
    ] = None,
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="DIR", help="Go on with the run that was started with --out DIR.", show_default=False
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify-determinism", help="Run it twice and compare the hashes of all rounds.")
    ] = False,
    profile: Profile = False,
    log: Log = None,
    wan: Wan = None,
    override: Overrides = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Run a federation on this machine, over N local Ray clusters."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.commands import resume_here, run_here
    from icrf.console.verify import run_twice

    if resume is not None:
        changes = {
            "--override": bool(override),
            "--verify-determinism": verify,
            "--profile": profile,
            "--out": out not in (None, resume),
        }
        if place := next((option for option, given in changes.items() if given), ""):
            raise LocalError("L009", f"--resume goes on with what was started; {place} changes it", place=place)
        summary, status = resume_here(terminal, _doors(session, wan), resume, clusters, _sinks(log))
    elif file is None:
        raise LocalError(
            "L009", "a federation is needed", place="FED.yaml", hint="or --resume DIR for one that was begun"
        )
    else:
        submission = _submission(_load(file, override), file, profile=profile)
        begin = run_twice if verify else run_here
        summary, status = begin(terminal, _doors(session, wan), submission, clusters or 1, out, _sinks(log))
    _finish(terminal, summary, status, json)


@command(HERE)
def demo(
    context: typer.Context,
    clusters: Clusters = 2,
    wan: Wan = None,
    out: Out = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """See it work: a small federation over two Ray clusters on this machine, in about a minute."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.commands import demo_file, run_demo

    doors = _doors(session, wan)
    with demo_file() as file:
        submission = _submission(_load(file, None), file)
    summary, status = run_demo(terminal, doors, submission, clusters, out)
    _finish(terminal, summary, status, json)


@command(HERE)
def validate(context: typer.Context, file: FedFile, override: Overrides = None, json: Json = False) -> None:
    """Check a federation's file and show where each value comes from."""
    terminal = context.obj.open(json=json)
    from icrf.console.config_view import show_sources
    from icrf.spec import explain_sources
    from icrf.submission import check_configuration

    config = _load(file, override)
    check_configuration(config, code_path=str(file.resolve().parent))
    show_sources(terminal, file, config, explain_sources(file, override or []))
    if json:
        terminal.json(config.model_dump())


@command(HERE)
def plan(
    context: typer.Context,
    file: FedFile,
    clusters: Annotated[
        int | None,
        typer.Option(
            "--clusters",
            min=1,
            max=64,
            metavar="N",
            help="Plan for N local clusters.",
            show_default="1",
        ),
    ] = None,
    mediator: Annotated[
        str | None, typer.Option("--mediator", metavar="HOST:PORT", help="Plan for the clusters of this fabric.")
    ] = None,
    tls_dir: TlsDir = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also show what other assignment strategies would come to.")
    ] = False,
    override: Overrides = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Dry run: where nodes would go, what would cross, how much memory. Starts nothing."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    if mediator is not None and clusters is not None:
        raise LocalError("L009", "--clusters plans for this machine and --mediator for a fabric", place="--clusters")
    from icrf.comparison import COMPARED, alternatives, compare_plans
    from icrf.console.plan_view import show_comparison, show_plan
    from icrf.protocol import Plan
    from icrf.run_folder import plan_to_dict

    submission = _submission(_load(file, override), file)
    strategies = COMPARED if compare else ()
    if mediator is None:
        plan_here = partial(session.doors.plan_local, clusters=clusters or 1)
        plans = compare_plans(plan_here, submission, strategies)
    else:
        with _open(session, mediator, tls_dir) as fabric:
            plans = fabric.compare(submission, strategies)
    # That of the federation itself comes first, or there is none at all.
    found = next(plan for plan in plans.values() if isinstance(plan, Plan))
    show_plan(terminal, found)
    if compare:
        show_comparison(terminal, plans)
    if json:
        terminal.json({**plan_to_dict(found), **({"alternatives": alternatives(plans)} if compare else {})})
    if not found.feasible:
        raise typer.Exit(LocalError("R001", "").exit_code)


# ---------------------------------------------------------------- on a fabric


@command(THERE)
def clusters(
    context: typer.Context,
    mediator: Mediator = DEFAULT_MEDIATOR,
    tls_dir: TlsDir = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the links between them first; placement goes by it.")
    ] = False,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """The clusters of a fabric, and the links between them."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.clusters_view import clusters_dict, show_clusters

    with _open(session, mediator, tls_dir) as fabric:
        links = fabric.measure_links() if measure else fabric.links()
        found = fabric.clusters()
    show_clusters(terminal, found, links, session.doors.wall_s())
    if json:
        terminal.json(clusters_dict(found, links))


@command(THERE)
def submit(
    context: typer.Context,
    file: FedFile,
    mediator: Mediator = DEFAULT_MEDIATOR,
    tls_dir: TlsDir = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run and write its folder.")] = False,
    out: Out = None,
    profile: Profile = False,
    log: Log = None,
    override: Overrides = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Submit a federation to a mediator."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.commands import submit_there

    if log and not (watch or out):
        raise LocalError("L009", "--log needs somebody who follows the run", place="--log", hint="add --watch")
    submission = _submission(_load(file, override), file, profile=profile)
    with _open(session, mediator, tls_dir) as fabric:
        summary, status = submit_there(terminal, fabric, submission, watch or out is not None, out, _sinks(log))
    _finish(terminal, summary, status, json)


@command(THERE, "list")
def list_runs(
    context: typer.Context,
    mediator: Mediator = DEFAULT_MEDIATOR,
    tls_dir: TlsDir = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """All runs, newest first."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.runs_view import run_dict, show_runs

    with _open(session, mediator, tls_dir) as fabric:
        infos = fabric.port.list_runs()
    show_runs(terminal, infos, session.doors.wall_s())
    if json:
        terminal.json([run_dict(info) for info in infos])


@command(THERE)
def show(
    context: typer.Context,
    run_id: RunId,
    mediator: Mediator = DEFAULT_MEDIATOR,
    tls_dir: TlsDir = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Where a run stands, and what it waits for."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.runs_view import run_dict, show_run
    from icrf.run_folder import round_line

    with _open(session, mediator, tls_dir) as fabric:
        found = fabric.run(run_id)
        info, rounds = found.info(), found.committed_rounds()
    show_run(terminal, info, rounds, session.doors.wall_s())
    if json:
        terminal.json({**run_dict(info), "committed": [round_line(r) for r in rounds]})


@command(THERE)
def watch(
    context: typer.Context,
    run_id: RunId,
    mediator: Mediator = DEFAULT_MEDIATOR,
    tls_dir: TlsDir = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Follow a run to its end."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.commands import watch_there

    with _open(session, mediator, tls_dir) as fabric:
        summary, status = watch_there(terminal, fabric.run(run_id))
    _finish(terminal, summary, status, json)


@command(THERE)
def cancel(
    context: typer.Context,
    run_id: RunId,
    mediator: Mediator = DEFAULT_MEDIATOR,
    tls_dir: TlsDir = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """End a run; one that has ended stays as it is."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.runs_view import run_dict, status_line

    with _open(session, mediator, tls_dir) as fabric:
        info = fabric.port.cancel(run_id)
    terminal.line(status_line(info))
    if json:
        terminal.json(run_dict(info))


@command(THERE)
def fetch(
    context: typer.Context,
    run_id: RunId,
    mediator: Mediator = DEFAULT_MEDIATOR,
    tls_dir: TlsDir = None,
    out: Out = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Write the folder of a run that has ended: model, rounds, report."""
    session: Session = context.obj
    terminal = session.open(json=json, plain=plain)
    from icrf.console.commands import fetch_there

    with _open(session, mediator, tls_dir) as fabric:
        summary, status = fetch_there(terminal, fabric.run(run_id), out)
    _finish(terminal, summary, status, json)


# ---------------------------------------------------------------- shared


def _load(file: Path, override: list[str] | None) -> FederationConfig:
    from icrf.spec import load_config

    return load_config(file, override or [])


def _submission(config: FederationConfig, file: Path, *, profile: bool = False) -> Submission:
    from icrf.submission import build_submission

    return build_submission(config, code_path=str(file.resolve().parent), profile=profile)


def _doors(session: Session, wan: str | None) -> Doors:
    """The session's, with local clusters as far apart as asked for."""
    doors: Doors = session.doors
    if wan is None:
        return doors
    from icrf.wan import parse_wan

    return replace(doors, local=partial(doors.local, wan=parse_wan(wan)))


def _sinks(specs: list[str] | None) -> list[MetricsSink]:
    from icrf.sinks import open_sink

    return [open_sink(spec) for spec in specs or ()]


def _open(session: Session, address: str, tls: Path | None) -> Fabric:
    from icrf.client import Fabric

    return Fabric(session.doors.remote(address, tls))


def _finish(terminal: Terminal, summary: dict[str, Any], exit_code: int, json: bool) -> None:
    if json:
        terminal.json(summary)
    if exit_code:
        raise typer.Exit(exit_code)


def main() -> None:
    """Entry point of the command ``fabric``."""
    signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal without UTF-8 shows a question mark; it is no reason to lose a run.
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
