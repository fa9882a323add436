"""The command ``fabric-agent``: checks its flags, holds the state folder, has a Ray cluster ready, serves."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from icrf.daemon import (
    StateFolder,
    check_cluster_name,
    configure_logging,
    default_state_dir,
    run_daemon,
    stop_with_parent,
)
from icrf.errors import LocalError
from icrf.wire.addresses import dial_target, parse_address, refuse_plaintext
from icrf.wire.identity import CLUSTER, Identity
from icrf.wire.tls import ENVIRONMENT, TlsFiles
from icrf_agent.local_ray import DEFAULT_OBJECT_STORE_BYTES, LocalRay
from icrf_agent.settings import AgentSettings

LOCAL = "local"
DEFAULT_MEDIATOR = "127.0.0.1:7443"

_ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TlsDir = Annotated[
    Path | None, typer.Option(envvar=ENVIRONMENT, help="Folder of the cluster's certificate.", show_default="plaintext")
]


@dataclass(frozen=True)
class Flags:
    """The command line as it was typed; :func:`run_agent` checks it."""

    cluster: str
    mediator: str
    ray_address: str
    slots: int | None
    quota: int | None
    cpus: int | None
    gpus: int | None
    labels: dict[str, str]
    advertise: str | None
    allow: tuple[str, ...]
    state: Path | None
    object_store_mb: int | None
    trust_submitter: bool = False
    tls: TlsFiles | None = None


def parse_labels(pairs: Sequence[str]) -> dict[str, str]:
    """``["zone=a", "gpu=no"]`` as a mapping; a repeated key or a missing ``=`` is wrong usage."""
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--label")
        if key in labels:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--label")
        labels[key] = value
    return labels


def check_allow(entries: Sequence[str]) -> tuple[str, ...]:
    """Each entry must read ``MODULE:ATTR``."""
    for entry in entries:
        if not _ENTRY_POINT.fullmatch(entry):
            raise typer.BadParameter(f"{entry!r} is not MODULE:ATTR", param_hint="--allow")
    return tuple(entries)


async def run_agent(flags: Flags, stop: asyncio.Event) -> int:
    """Serve a cluster until `stop` is set or the mediator ends it; returns the exit code.

    Raises:
        ConfigError: C013 for the cluster's name.
        LocalError: L002, L003, L009 about flags, L005 and L006 about the state folder, L008 about Ray.
        SecurityError: S001, S002 or S004 about the certificate, which must name the cluster.
    """
    cluster = check_cluster_name(flags.cluster)
    dial_target(flags.mediator, place="--mediator", encrypted=flags.tls is not None)
    if flags.advertise is not None:
        host, _ = parse_address(flags.advertise, place="--advertise")
        if flags.tls is None:
            refuse_plaintext(host, place="--advertise")
    if flags.tls is not None:
        flags.tls.require(Identity(CLUSTER, cluster))
    if flags.ray_address != LOCAL:
        parse_address(flags.ray_address, place="--ray-address")
        _refuse_with_remote(flags)
    with StateFolder(flags.state or default_state_dir(f"agent-{cluster}")) as state:
        if flags.ray_address != LOCAL:
            return await _serve(flags, state, flags.ray_address, None, stop)
        ray = LocalRay()
        try:
            address = await _local_cluster(flags, state, ray)
            os.environ.update(ray.environment())
            return await _serve(flags, state, address, lambda: _renewed(flags, state, ray), stop)
        except Exception:
            # If the cluster is gone, its own log says more than what its driver ran into.
            ray.check()
            raise
        finally:
            await asyncio.to_thread(ray.stop)


def _refuse_with_remote(flags: Flags) -> None:
    for flag, value in (("--cpus", flags.cpus), ("--gpus", flags.gpus), ("--object-store-mb", flags.object_store_mb)):
        if value is not None:
            raise LocalError(
                "L009",
                f"{flag} is for a cluster that the agent starts, not for {flags.ray_address}",
                place=flag,
                hint="leave it out, or use --ray-address local",
            )


async def _local_cluster(flags: Flags, state: StateFolder, ray: LocalRay) -> str:
    num_cpus = flags.cpus or os.cpu_count() or 1
    typer.echo(f"cluster {flags.cluster}: starting a local Ray cluster ({num_cpus} CPUs) ...", nl=False)
    began = time.monotonic()
    try:
        address = await asyncio.to_thread(_ensure, flags, state, ray)
    except LocalError:
        typer.echo(" failed")
        raise
    found = " (found it running)" if ray.reattached else ""
    typer.echo(f" {time.monotonic() - began:.1f} s{found}")
    return address


def _ensure(flags: Flags, state: StateFolder, ray: LocalRay) -> str:
    num_cpus = flags.cpus or os.cpu_count() or 1
    num_bytes = DEFAULT_OBJECT_STORE_BYTES if flags.object_store_mb is None else flags.object_store_mb << 20
    return ray.ensure(
        state.path, num_cpus, lock_file=state.lock_file, num_gpus=flags.gpus or 0, object_store_bytes=num_bytes
    )


def _renewed(flags: Flags, state: StateFolder, ray: LocalRay) -> str:
    """The address of a new cluster in place of one whose head has died."""
    ray.stop()
    address = _ensure(flags, state, ray)
    os.environ.update(ray.environment())
    return address


async def _serve(
    flags: Flags, state: StateFolder, ray_address: str, renew: Callable[[], str] | None, stop: asyncio.Event
) -> int:
    if stop.is_set():
        return 0
    # This process is of one cluster: a call of Ray's API while that one is replaced must not start another.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    # Ray reads its environment when it is imported, and it takes seconds: only now.
    from icrf_agent.daemon import serve_agent  # noqa: PLC0415

    settings = AgentSettings(
        cluster=flags.cluster,
        mediator=flags.mediator,
        ray_address=ray_address,
        num_slots=flags.slots,
        quota=flags.quota,
        labels=flags.labels,
        advertise=flags.advertise,
        allow=None if flags.trust_submitter else flags.allow,
        state_dir=state.path,
        tls=flags.tls,
        renew=renew,
    )
    return await serve_agent(settings, stop)


@app.command()
def agent(
    cluster: Annotated[str, typer.Option(help="Name of the cluster, for example us-east.")],
    mediator: Annotated[
        str, typer.Option(envvar="ICRF_MEDIATOR", help="HOST:PORT of the mediator.")
    ] = DEFAULT_MEDIATOR,
    ray_address: Annotated[
        str, typer.Option(help="HOST:PORT of a Ray cluster, or 'local' for one that lives with this agent.")
    ] = LOCAL,
    slots: Annotated[int | None, typer.Option(min=1, help="Most hosts at once.", show_default="by CPUs")] = None,
    quota: Annotated[
        int | None, typer.Option(min=1, help="Most slots that one federation may hold at once.", show_default="all")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of a local cluster.", show_default="all")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of a local cluster.", show_default="0")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="For placement; repeatable.")] = None,
    advertise: Annotated[
        str | None, typer.Option(help="HOST:PORT where other clusters can dial the gateway.", show_default="relayed")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="MODULE:ATTR", help="User code that may run here; repeatable.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="State folder.", show_default="$XDG_STATE_HOME/icrf/agent-CLUSTER")
    ] = None,
    tls_dir: TlsDir = None,
    object_store_mb: Annotated[
        int | None, typer.Option(min=100, help="Object store of a local cluster, MiB.", show_default="512")
    ] = None,
    die_with_parent: Annotated[
        bool, typer.Option("--die-with-parent", help="Stop when the process that started this one is gone.")
    ] = False,
    trust_submitter: Annotated[
        bool,
        typer.Option("--trust-submitter", hidden=True, help="Run all code of submitters; for fabrics of one machine."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")] = False,
) -> None:
    """Serve one Ray cluster to the fabric until SIGTERM or Ctrl-C."""
    if die_with_parent:
        stop_with_parent()
    configure_logging(debug=debug)
    flags = Flags(
        cluster=cluster,
        mediator=mediator,
        ray_address=ray_address,
        slots=slots,
        quota=quota,
        cpus=cpus,
        gpus=gpus,
        labels=parse_labels(label or ()),
        advertise=advertise,
        allow=check_allow(allow or ()),
        state=state,
        object_store_mb=object_store_mb,
        trust_submitter=trust_submitter,
        tls=TlsFiles.at(tls_dir),
    )
    raise typer.Exit(run_daemon(lambda stop: run_agent(flags, stop), debug=debug))


def main() -> None:
    """Entry point; wrong usage exits with 2."""
    app()


if __name__ == "__main__":
    main()
