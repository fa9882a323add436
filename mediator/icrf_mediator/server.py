"""The mediator's gRPC server: services, health and the listening socket. Decides nothing."""

from __future__ import annotations

import errno
import os
import socket

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from icrf.errors import ConfigError, LocalError
from icrf.wire.addresses import SERVER_OPTIONS, format_address, parse_address, refuse_plaintext
from icrf.wire.identity import THE_MEDIATOR
from icrf.wire.tls import TlsFiles, listen_on
from icrf_mediator.access import Access
from icrf_mediator.relay import RelayServicer
from icrf_mediator.service import MediatorService
from icrf_mediator.servicer import add_to_server

_SERVING = health_pb2.HealthCheckResponse.SERVING


class MediatorServer:
    """Serves a :class:`MediatorService` over gRPC: to holders of certificates, or in plaintext on loopback.

    Args:
        service: what the calls go to; the caller starts it before this server and stops it after.
        listen: ``HOST:PORT``; port 0 takes any free one.
        http: ``HOST:PORT`` of the web page.
        tls: the mediator's certificate; None: plaintext.

    Raises:
        LocalError: L003 for a malformed address, L002 for one off loopback without `tls`.
        SecurityError: S001, S002 or S004 for certificates that a mediator cannot use.
        ConfigError: C012, as there is no web page yet.
    """

    def __init__(
        self, service: MediatorService, listen: str, *, http: str | None = None, tls: TlsFiles | None = None
    ) -> None:
        if http is not None:
            raise ConfigError("C012", "the web page is not built yet", place="--http", hint="leave the flag out")
        self._host, self._port = parse_address(listen, place="--listen")
        if tls is None:
            refuse_plaintext(self._host, place="--listen")
        else:
            tls.require(THE_MEDIATOR)
        self._service, self._tls = service, tls
        self._access = Access(authenticated=tls is not None)
        self._relay = RelayServicer(holder=service.holder, access=self._access)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT`` to dial; the real port once started."""
        return format_address(self._host, self._port)

    async def start(self) -> int:
        """Listen, serve and then say so on the health service; returns the port.

        Raises:
            LocalError: L004 when the address cannot be listened on.
        """
        self._probe()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        add_to_server(server, self._service, self._access)
        self._relay.register(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            self._port = listen_on(server, self.address, self._tls)
        except RuntimeError as error:
            raise self._not_listening(str(error)) from error
        await server.start()
        self._server = server
        await self._health.set("", _SERVING)
        return self._port

    async def stop(self, grace_s: float) -> None:
        """Take no new calls and give running ones `grace_s` to end; harmless when called twice.

        The agents' streams end when the service is stopped, which may happen meanwhile.
        """
        server, self._server = self._server, None
        if server is None:
            return
        await self._health.enter_graceful_shutdown()
        self._relay.close()
        await server.stop(grace_s)

    def _probe(self) -> None:
        """Ask the kernel first: gRPC answers with lines of its own log and without the reason."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise self._not_listening(str(error.strerror)) from error
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                # As a server does: connections of an earlier one that are still closing are no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                except OSError as error:
                    raise self._not_listening(os.strerror(error.errno or 0), error.errno) from error

    def _not_listening(self, why: str, number: int | None = None) -> LocalError:
        if number == errno.EADDRINUSE:
            hint = "stop what listens there, or choose another port with --listen (port 0: any free one)"
            return LocalError("L004", f"port {self._port} is in use", place="--listen", value=self.address, hint=hint)
        return LocalError("L004", f"cannot listen on {self.address}: {why}", place="--listen")
