"""The mediator's relay alone, for tests and measurements of gateways."""

from __future__ import annotations

from icrf.loop_thread import LoopThread
from icrf.wire.tls import TlsFiles
from icrf_mediator.relay import RelayServer

_STOP_S = 0.2


class RelayThread:
    """A relay that listens on this machine, in a thread of its own.

    Args:
        port: where; 0: any free one.
        tls: the mediator's certificate; None: plaintext.

    Attributes:
        address: ``HOST:PORT`` to dial.
        relay: what serves.
    """

    def __init__(self, port: int = 0, tls: TlsFiles | None = None) -> None:
        self._thread, self._server = LoopThread("icrf-relay"), RelayServer(tls)
        self.address = self._thread.call(self._server.start(port))
        self.relay = self._server.relay

    def stop(self) -> None:
        """End all transfers and the thread; harmless when called twice."""
        if not self._thread.loop.is_closed():
            self._thread.call(self._server.stop(_STOP_S))
            self._thread.close()
