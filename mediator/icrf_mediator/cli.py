"""The command ``fabric-mediator``: puts journal, blobs, service and server together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from icrf import __version__, failpoints
from icrf.daemon import MonotonicClock, StateFolder, configure_logging, default_state_dir, run_daemon
from icrf_mediator.blobs import FolderBlobs
from icrf_mediator.server import MediatorServer
from icrf_mediator.service import MediatorService
from icrf_mediator.store_sqlite import SqliteStore

JOURNAL_NAME, BLOBS_NAME = "journal.db", "blobs"
STOP_GRACE_S = 5.0

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="The mediator of the fabric."
)


@app.callback()
def _group() -> None:
    """The mediator of the fabric."""


async def serve_mediator(listen: str, state_dir: Path, stop: asyncio.Event) -> int:
    """Serve until `stop` is set; returns the exit code.

    Raises:
        LocalError: L002 to L007, about the address or the state folder.
    """
    failpoints.set_role("mediator")
    with StateFolder(state_dir) as state:
        store = SqliteStore(state.path / JOURNAL_NAME)
        try:
            service = MediatorService(store, FolderBlobs(state.path / BLOBS_NAME), MonotonicClock())
            server = MediatorServer(service, listen)
            await service.start()
            try:
                await server.start()
                what = f"fabric-mediator {__version__} serving on {server.address}"
                typer.echo(f"{what} (plaintext, loopback only), state in {state.path}")
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
    insecure: Annotated[bool, typer.Option("--insecure", help="Plaintext, on loopback; so far the only way.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")] = False,
) -> None:
    """Serve the fabric until SIGTERM or Ctrl-C."""
    configure_logging(debug=debug)
    folder = state or default_state_dir("mediator")
    raise typer.Exit(run_daemon(lambda stop: serve_mediator(listen, folder, stop), debug=debug))


def main() -> None:
    """Entry point; wrong usage exits with 2."""
    app()


if __name__ == "__main__":
    main()
