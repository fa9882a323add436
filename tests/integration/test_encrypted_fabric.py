"""A fabric whose every connection is of TLS: the same bits, and nobody can be somebody else."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from icrf import connect
from icrf.errors import IcrfError, ProtocolError, SecurityError
from icrf.ports import PayloadHeader
from icrf.protocol import COMPLETED, Capacity, Fingerprint, Instruction, PeerAddress, Register
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing import InlineFabric, SocketFabric
from icrf.testing.waiting import async_until
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.addresses import CHANNEL_OPTIONS, SERVER_OPTIONS, dial_target
from icrf.wire.agent_link import GrpcAgentLink
from icrf.wire.gateway_rpc import ATTACH, RELAY_SERVICE, method_path
from icrf.wire.handshake import explain
from icrf.wire.identity import CLUSTER, THE_MEDIATOR, USER, Identity
from icrf.wire.mediator_client import GrpcMediator
from icrf.wire.status import from_rpc_error
from icrf.wire.tls import TlsFiles, listen_on, open_channel
from icrf_agent.gateway import GrpcTransport
from icrf_mediator.certs import init_authority, issue

US, EU = "us-east", "eu-west"
REGISTER = Register(
    US, "i-1", 1, "0.1", Capacity(2, 2.0, 0.0, 1 << 30), Fingerprint("2.13", "AVX2", "on", 1, "cpu"), {}
)
KEYS = {"federation_id": "fed", "schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
STAR = {**KEYS, "number_of_clients": 8, "federated_learning_rounds": 2, "batch_size": 64}
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
PATIENCE_S = 20.0


@dataclass
class World:
    """A fabric of two clusters, and certificates of its authority and of another."""

    fabric: SocketFabric
    certs: Path
    strangers: Path

    @property
    def mediator(self) -> str:
        return self.fabric.mediator_address

    def of(self, kind: str, name: str, *, stranger: bool = False, **options: Any) -> TlsFiles:
        """A certificate in a folder of its own."""
        source = self.strangers if stranger else self.certs
        out = source / "again" / str(len(list((source / "again").glob("*"))))
        found = TlsFiles.at(issue(source, Identity(kind, name), out=out, **options))
        assert found is not None
        return found

    def user(self) -> TlsFiles:
        return self.of(USER, "ann")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("certs")
    init_authority(folder / "strangers")
    with SocketFabric([EU, "ap-south"], certs=folder / "ours") as fabric:
        yield World(fabric, folder / "ours", folder / "strangers")


def hash_on(fabric: InlineFabric, port: Any) -> str:
    run = port.submit(build_submission(FederationConfig.from_mapping(STAR)))
    for _ in port.watch(run.run_id):
        pass
    info = port.get(run.run_id)
    assert info.status == COMPLETED, info.error_json
    assert info.bytes_inter_cluster > 0 or len(info.clusters) == 1
    return str(info.model_sha256)


@pytest.mark.parametrize("relay", [False, True], ids=["direct", "relayed"])
def test_the_bits_are_those_of_one_cluster_in_plaintext(tmp_path: Path, relay: bool) -> None:
    with InlineFabric(1) as fabric:
        expected = hash_on(fabric, fabric.port)
    with SocketFabric(2, relay=relay, certs=tmp_path) as fabric:
        tls = TlsFiles.at(issue(tmp_path, Identity(USER, "ann")))
        port = GrpcMediator(fabric.mediator_address, tls=tls)
        try:
            assert hash_on(fabric, port) == expected
        finally:
            port.close()


# ---------------------------------------------------------------- users


def asked(world: World, tls: TlsFiles | None) -> IcrfError | None:
    """What the mediator, or the way to it, says to a question."""
    port = GrpcMediator(world.mediator, tls=tls, contact_s=PATIENCE_S)
    try:
        port.list_runs()
    except IcrfError as error:
        assert "\n" not in str(error)
        return error
    finally:
        port.close()
    return None


def test_a_user_of_the_authority_is_let_in(world: World) -> None:
    assert asked(world, world.user()) is None
    with connect(world.mediator, tls=world.user().folder) as fabric:
        assert len(fabric.port.clusters()) == 2


def test_the_environment_names_the_certificate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICRF_TLS_DIR", world.user().folder)
    with connect(world.mediator) as fabric:
        assert {info.name for info in fabric.port.clusters()} == {EU, "ap-south"}


def test_plaintext_is_told_what_is_missing(world: World) -> None:
    error = asked(world, None)
    assert error is not None and error.exit_code == 77
    assert str(error).startswith(f"S003 {world.mediator}: the mediator wants TLS and was called in plaintext. ")
    assert "--tls-dir" in error.hint


def test_a_cluster_is_no_user(world: World) -> None:
    error = asked(world, world.of(CLUSTER, EU))
    assert error is not None and error.code == "S004"
    assert f"names cluster {EU}, which may not call ListRuns" in str(error)


def test_another_authority_is_refused_by_both_ends(world: World) -> None:
    error = asked(world, world.of(USER, "ann", stranger=True))
    assert error is not None and error.code == "S003"
    assert "certificate of the mediator was refused here: unable to get local issuer certificate" in str(error)
    # One who trusts the mediator, and is not trusted by it.
    stranger = world.of(USER, "ann", stranger=True)
    Path(stranger.folder, "ca.pem").write_bytes((world.certs / "ca.pem").read_bytes())
    error = asked(world, stranger)
    assert error is not None and error.code == "S003"
    assert "the mediator refused this certificate: it ended the connection" in str(error)


def test_an_expired_certificate_is_refused_by_its_owner_and_by_the_mediator(world: World) -> None:
    expired = world.of(USER, "ann", begins=LONG_AGO)
    with pytest.raises(SecurityError, match=r"S002 .*expired on 2020-12-31"):
        GrpcMediator(world.mediator, tls=expired)
    # Its owner does not look, and asks all the same.
    held = [Path(expired.folder, name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem")]
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", THE_MEDIATOR.server_name))
    with grpc.secure_channel(world.mediator, grpc.ssl_channel_credentials(*held), options=options) as channel:
        call: Any = channel.unary_unary("/icrf.v1.Federation/ListRuns")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=PATIENCE_S)
    assert isinstance(caught.value, grpc.Call) and caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "S002" in str(explain(world.mediator, expired, THE_MEDIATOR))


def test_whoever_is_not_the_mediator_is_not_taken_for_it(world: World) -> None:
    """A cluster of the same fabric that listens where the mediator is expected."""
    server = grpc.server(None, options=SERVER_OPTIONS)
    port = listen_on(server, "127.0.0.1:0", world.of(CLUSTER, EU))
    server.start()
    try:
        false = replace(world, fabric=type("At", (), {"mediator_address": f"127.0.0.1:{port}"})())
        error = asked(false, world.user())
    finally:
        server.stop(None).wait()
    assert error is not None and error.code == "S003"
    assert "Hostname mismatch, certificate is not valid for 'mediator.mediator.icrf.internal'" in str(error)


def test_tls_to_a_plaintext_mediator_is_told_so(world: World) -> None:
    with SocketFabric(1) as plain:
        port = GrpcMediator(plain.mediator_address, tls=world.user())
        with pytest.raises(SecurityError, match=r"S003 .*the mediator speaks plaintext"):
            port.list_runs()
        port.close()


# ---------------------------------------------------------------- agents


def registered(world: World, tls: TlsFiles | None, register: Register = REGISTER) -> tuple[IcrfError | None, list[Any]]:
    """How a registration ends: refused, or with the first instruction."""

    async def main() -> tuple[IcrfError | None, list[Any]]:
        delivered: list[Instruction] = []
        link = GrpcAgentLink(world.mediator, tls=tls, registration_s=PATIENCE_S)
        running = asyncio.create_task(link.run(lambda: register, delivered.append))
        try:
            await async_until(lambda: bool(delivered) or running.done(), PATIENCE_S)
            error = running.exception() if running.done() else None
        finally:
            await link.close()
            await asyncio.gather(running, return_exceptions=True)
        assert error is None or isinstance(error, IcrfError)
        return error, delivered

    return asyncio.run(main())


def names(world: World) -> set[str]:
    port: Any = world.fabric.port
    return {info.name for info in port.clusters()}


def test_a_cluster_cannot_register_as_another(world: World) -> None:
    error, delivered = registered(world, world.of(CLUSTER, US), replace(REGISTER, cluster=EU))
    assert error is not None and (error.code, delivered) == ("S004", [])
    assert f"the certificate names cluster {US}, which may not register as cluster {EU}" in str(error)
    error, delivered = registered(world, world.user())
    assert error is not None and (error.code, delivered) == ("S004", [])
    assert "names user ann, which may not call Connect" in str(error)
    assert names(world) == {EU, "ap-south"}


def test_an_agent_that_cannot_be_let_in_ends_with_the_reason(world: World) -> None:
    error, _ = registered(world, None)
    assert error is not None and "S003" in str(error) and "wants TLS" in str(error)
    error, _ = registered(world, world.of(CLUSTER, US, stranger=True))
    assert error is not None and "S003" in str(error)
    assert names(world) == {EU, "ap-south"}


def test_after_the_mediator_was_away_the_same_identity_is_let_in_again(tmp_path: Path) -> None:
    with SocketFabric([EU], certs=tmp_path) as fabric:
        # Whoever comes next comes with another key.
        issue(tmp_path, Identity(CLUSTER, EU))
        issue(tmp_path, THE_MEDIATOR)
        fabric.restart_mediator()
        port = GrpcMediator(fabric.mediator_address, tls=TlsFiles.at(issue(tmp_path, Identity(USER, "ann"))))
        try:
            assert [info.name for info in port.clusters()] == [EU]
            assert hash_on(fabric, port)
        finally:
            port.close()


# ---------------------------------------------------------------- payloads


def header_for(array: np.ndarray[Any, Any], source: str, target: str = EU) -> PayloadHeader:
    return PayloadHeader("r", 1, 1, 1, "partial", -1, source, target, array.dtype.name, array.size)


class Inbox:
    def __init__(self) -> None:
        self.came: list[PayloadHeader] = []

    def __call__(self, header: PayloadHeader, array: Any, wire_bytes: int) -> None:
        self.came.append(header)


ARRAY = np.arange(1000, dtype=np.float32)


@pytest.fixture(params=["direct", "relayed"])
def two(request: pytest.FixtureRequest, world: World) -> Iterator[tuple[GrpcTransport, PeerAddress, Inbox]]:
    """The gateway of us-east, the address of one of zone-b, and what came there."""
    direct, inbox = request.param == "direct", Inbox()
    there = GrpcTransport(
        "127.0.0.1:0" if direct else None,
        None if direct else world.mediator,
        "zone-b",
        "i-b",
        tls=world.of(CLUSTER, "zone-b"),
    )
    here = GrpcTransport(None, None if direct else world.mediator, US, "i-us", tls=world.of(CLUSTER, US))
    try:
        yield here, PeerAddress("zone-b", there.serve(inbox)), inbox
    finally:
        here.close()
        there.close()


def test_a_payload_comes_from_the_cluster_that_its_header_names(two: Any) -> None:
    here, peer, inbox = two
    here.send(header_for(ARRAY, US, "zone-b"), ARRAY, peer, PATIENCE_S)
    with pytest.raises(SecurityError) as caught:
        here.send(header_for(ARRAY, "ap-south", "zone-b"), ARRAY, peer, PATIENCE_S)
    assert caught.value.code == "S004"
    assert f"the certificate names cluster {US}, which may not send as cluster ap-south" in str(caught.value)
    assert [header.source for header in inbox.came] == [US]


def test_a_gateway_starts_with_the_certificate_of_its_cluster_only(world: World) -> None:
    with pytest.raises(SecurityError, match=f"S004 .*names cluster {EU}, not cluster {US}"):
        GrpcTransport("127.0.0.1:0", None, US, "i-1", tls=world.of(CLUSTER, EU))


def test_a_payload_is_not_given_to_a_gateway_of_another_cluster(world: World) -> None:
    """Somebody of the fabric has taken the address; the sender finds out before a byte of the payload leaves."""
    inbox = Inbox()
    thief = GrpcTransport("127.0.0.1:0", None, "ap-south", "i-1", tls=world.of(CLUSTER, "ap-south"))
    here = GrpcTransport(None, None, US, "i-us", tls=world.of(CLUSTER, US))
    try:
        address = thief.serve(inbox)
        with pytest.raises(ProtocolError, match=r"P030 .*Hostname mismatch.*eu-west\.cluster\.icrf\.internal"):
            here.send(header_for(ARRAY, US), ARRAY, PeerAddress(EU, address), 0.5)
    finally:
        here.close()
        thief.close()
    assert inbox.came == []


def test_nobody_gets_the_payloads_of_another_cluster_from_the_relay(world: World) -> None:
    attach = gateway_pb2.RelayAttach(cluster="zone-c", incarnation="i-1").SerializeToString()
    with open_channel(dial_target(world.mediator), world.of(CLUSTER, US), THE_MEDIATOR) as channel:
        offers: Any = channel.unary_stream(method_path(RELAY_SERVICE, ATTACH))
        with pytest.raises(grpc.RpcError) as caught:
            next(offers(attach, timeout=PATIENCE_S))
    error = from_rpc_error(caught.value, world.mediator)
    assert error.code == "S004"
    assert f"names cluster {US}, which may not receive for cluster zone-c" in str(error)


def test_an_artifact_of_a_run_is_not_for_other_clusters(world: World) -> None:
    port = GrpcMediator(world.mediator, tls=world.user())
    try:
        run = port.submit(build_submission(FederationConfig.from_mapping(STAR)))
        for _ in port.watch(run.run_id):
            pass
        info = port.get(run.run_id)
        assert info.status == COMPLETED and json.loads(info.error_json or "{}") == {}
        assert b"".join(port.fetch(run.run_id, "model.safetensors"))
    finally:
        port.close()

    async def download(name: str) -> bytes:
        link = GrpcAgentLink(world.mediator, tls=world.of(CLUSTER, name))
        try:
            return await link.download(run.run_id, "model.safetensors")
        finally:
            await link.close()

    assert asyncio.run(download(info.clusters[0]))
    with pytest.raises(IcrfError, match=r"F001 .*on cluster us-east"):
        asyncio.run(download(US))
