"""The command ``fabric-mediator``: puts journal, blobs, service and server together, and makes certificates."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from icrf import __version__, failpoints
from icrf.daemon import (
    MonotonicClock,
    StateFolder,
    check_cluster_name,
    configure_logging,
    default_state_dir,
    report_error,
    run_daemon,
)
from icrf.errors import IcrfError, LocalError
from icrf.wire.allocator import keep_freed_frames
from icrf.wire.identity import CLUSTER, THE_MEDIATOR, USER, Identity
from icrf.wire.tls import ENVIRONMENT, TlsFiles
from icrf_mediator.blobs import FolderBlobs
from icrf_mediator.certs import LEAF_DAYS
from icrf_mediator.certs import init_authority as make_authority
from icrf_mediator.certs import issue as make_certificate
from icrf_mediator.server import MediatorServer
from icrf_mediator.service import MediatorService
from icrf_mediator.store_sqlite import SqliteStore

JOURNAL_NAME, BLOBS_NAME = "journal.db", "blobs"
STOP_GRACE_S = 5.0

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="The mediator of the fabric."
)


certs = typer.Typer(no_args_is_help=True, help="Certificates of a fabric: make an authority, issue, renew.")
app.add_typer(certs, name="certs")

Dir = Annotated[
    Path | None, typer.Option("--dir", help="Folder of the authority.", show_default="$XDG_STATE_HOME/icrf/certs")
]
Host = Annotated[
    list[str] | None, typer.Option("--host", help="Name or address for other programs to dial; repeatable.")
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate holds.")]


async def serve_mediator(listen: str, state_dir: Path, stop: asyncio.Event, tls: TlsFiles | None = None) -> int:
    """Serve until `stop` is set; returns the exit code.

    Raises:
        LocalError: L002 to L007, about the address or the state folder.
        SecurityError: about the certificates.
    """
    failpoints.set_role("mediator")
    keep_freed_frames()
    with StateFolder(state_dir) as state:
        store = SqliteStore(state.path / JOURNAL_NAME)
        try:
            service = MediatorService(store, FolderBlobs(state.path / BLOBS_NAME), MonotonicClock())
            server = MediatorServer(service, listen, tls=tls)
            await service.start()
            try:
                await server.start()
                what = f"fabric-mediator {__version__} serving on {server.address}"
                how = "plaintext, loopback only" if tls is None else f"TLS, certificate of {tls.folder}"
                typer.echo(f"{what} ({how}), state in {state.path}")
                await stop.wait()
            finally:
                # Together: the agents' streams, which the service ends, would use up the server's grace.
                await asyncio.gather(server.stop(STOP_GRACE_S), service.stop())
        finally:
            store.close()
    return 0


@app.command()
def serve(
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "127.0.0.1:7443",
    state: Annotated[
        Path | None, typer.Option(help="Folder of journal and models.", show_default="$XDG_STATE_HOME/icrf/mediator")
    ] = None,
    tls_dir: Annotated[
        Path | None,
        typer.Option(
            envvar=ENVIRONMENT, help="Folder with ca.pem, cert.pem and key.pem; see certs.", show_default="none"
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plaintext, on loopback only; what is done without --tls-dir.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")] = False,
) -> None:
    """Serve the fabric until SIGTERM or Ctrl-C."""
    configure_logging(debug=debug)
    folder = state or default_state_dir("mediator")

    async def serving(stop: asyncio.Event) -> int:
        if insecure and tls_dir is not None:
            raise LocalError("L009", "--insecure is plaintext and --tls-dir is TLS", place="--insecure")
        return await serve_mediator(listen, folder, stop, TlsFiles.at(tls_dir))

    raise typer.Exit(run_daemon(serving, debug=debug))


@certs.command("init")
def init_certs(folder: Dir = None, host: Host = None, days: Days = LEAF_DAYS) -> None:
    """Make the fabric's authority and the mediator's certificate."""
    place = folder or default_state_dir("certs")
    try:
        made = make_authority(place, host or (), days)
    except IcrfError as error:
        raise typer.Exit(report_error(error)) from error
    typer.echo(f"authority in {place}: keep ca.key there, it can be anybody")
    typer.echo(f"mediator's certificate in {made}: fabric-mediator serve --listen HOST:PORT --tls-dir {made}")
    typer.echo("next, for each cluster: fabric-mediator certs issue NAME, and for each user: certs issue --user NAME")


@certs.command("issue")
def issue_certs(
    cluster: Annotated[str | None, typer.Argument(metavar="NAME", help="The cluster.", show_default=False)] = None,
    user: Annotated[str | None, typer.Option(metavar="NAME", help="Instead, for a user of SDK and commands.")] = None,
    mediator: Annotated[bool, typer.Option("--mediator", help="Instead, for the mediator again.")] = False,
    folder: Dir = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write it.", show_default="a folder of the authority's")
    ] = None,
    host: Host = None,
    days: Days = LEAF_DAYS,
) -> None:
    """Make a certificate, or a new one in place of the old: processes that run take it at their next connection."""
    try:
        identity = _one_of(cluster, user, mediator)
        made = make_certificate(folder or default_state_dir("certs"), identity, out=out, hosts=host or (), days=days)
    except IcrfError as error:
        raise typer.Exit(report_error(error)) from error
    typer.echo(f"certificate of {identity} in {made}, for {days} days; copy the folder to its machine, keys stay 0600")
    if identity.kind == CLUSTER:
        typer.echo(f"there: fabric-agent --cluster {cluster} --mediator HOST:PORT --tls-dir FOLDER")
    elif identity.kind == USER:
        typer.echo("there: fabric submit FED.yaml --mediator HOST:PORT --tls-dir FOLDER")


def _one_of(cluster: str | None, user: str | None, mediator: bool) -> Identity:
    if sum((cluster is not None, user is not None, mediator)) != 1:
        raise LocalError("L009", "name one: a cluster, --user NAME or --mediator", place="certs issue")
    if mediator:
        return THE_MEDIATOR
    if user is not None:
        return Identity(USER, check_cluster_name(user, place="--user", what="user"))
    assert cluster is not None
    return Identity(CLUSTER, check_cluster_name(cluster, place="NAME"))


def main() -> None:
    """Entry point; wrong usage exits with 2."""
    app()


if __name__ == "__main__":
    main()
