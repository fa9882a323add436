"""The mediator's relay alone, for tests and measurements of gateways."""

from __future__ import annotations

import grpc

from icrf.loop_thread import LoopThread
from icrf.wire.addresses import SERVER_OPTIONS
from icrf_mediator.relay import RelayServicer

_STOP_S = 0.2


class RelayThread:
    """A relay that listens on this machine, in a thread of its own.

    Args:
        port: where; 0: any free one.

    Attributes:
        address: ``HOST:PORT`` to dial.
        relay: what serves.
    """

    def __init__(self, port: int = 0) -> None:
        self._thread = LoopThread("icrf-relay")
        self._server, self.relay, self.address = self._thread.call(self._start(port))

    async def _start(self, port: int) -> tuple[grpc.aio.Server, RelayServicer, str]:
        server, relay = grpc.aio.server(options=SERVER_OPTIONS), RelayServicer()
        relay.register(server)
        address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
        await server.start()
        return server, relay, address

    def stop(self) -> None:
        """End all transfers and the thread; harmless when called twice."""
        if not self._thread.loop.is_closed():
            self._thread.call(self._stop())
            self._thread.close()

    async def _stop(self) -> None:
        self.relay.close()
        await self._server.stop(_STOP_S)
