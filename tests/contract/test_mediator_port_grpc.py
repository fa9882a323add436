"""The SDK's side of the control wire: :class:`GrpcMediator` against the real servicers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from icrf.errors import IcrfError, LocalError, ProtocolError, RunError
from icrf.protocol import Graph, NodeSpec, RunEvent, Submission, TensorSpec
from icrf.testing.waiting import async_until
from icrf.wire.agent_link import GrpcAgentLink
from icrf.wire.codec import to_proto
from icrf.wire.mediator_client import GrpcMediator
from icrf.wire.status import from_rpc_error

PATIENCE_S = 10.0
MIB = 1 << 20

SUBMISSION = Submission(
    "request-1",
    "{}",
    "centralized",
    (NodeSpec("server", "aggregate"), NodeSpec("client_1", "train-eval")),
    Graph(2, (0, 1, 2), (1, 0)),
    (TensorSpec("w", (3, 4), "float32"),),
)


def event(seq: int, kind: str = "status", **more: Any) -> RunEvent:
    return RunEvent("run-1", seq, float(seq), kind, **more)


@pytest.fixture
def client(mediator: Any) -> Iterator[GrpcMediator]:
    one = GrpcMediator(mediator.address, contact_s=0.3, give_up_s=PATIENCE_S)
    yield one
    one.close()


# ---------------------------------------------------------------- the SDK's calls


def test_calls_and_their_values_cross_the_wire(mediator: Any, client: GrpcMediator) -> None:
    assert client.submit(SUBMISSION) == mediator.service.run
    assert client.plan(SUBMISSION) == mediator.service.plan_of_run
    assert client.get("run-1") == mediator.service.run
    assert client.list_runs() == [mediator.service.run] * 2
    assert client.clusters() == [mediator.service.cluster]
    assert client.links() == [mediator.service.link]
    assert client.measure_links() == [mediator.service.link] * 2
    assert client.cancel("run-1") == mediator.service.run
    assert client.advance("run-1", "run", 3) == mediator.service.run
    assert client.change_nodes("run-1", ["a"], ["b", "c"]) == mediator.service.run
    assert client.finish("run-1") == mediator.service.run
    assert client.call_node("run-1", "client_1", "predict", b"abc" * MIB) == b"abc" * (3 * MIB)
    client.send_message("run-1", ["client_1", "server"], b"hello")
    assert mediator.service.calls == [
        ("submit", SUBMISSION),
        ("measure_links",),
        ("cancel", "run-1"),
        ("advance", "run-1", "run", 3),
        ("change_nodes", "run-1", ("a",), ("b", "c")),
        ("finish", "run-1"),
        ("call_node", "run-1", "client_1", "predict"),
        ("send_message", "run-1", ("client_1", "server"), b"hello"),
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.get("run-9"),
        lambda c: c.cancel("run-9"),
        lambda c: c.advance("run-9", "run"),
        lambda c: c.change_nodes("run-9", ["a"]),
        lambda c: c.finish("run-9"),
        lambda c: c.call_node("run-9", "n", "m", b""),
        lambda c: c.send_message("run-9", ["n"], b""),
        lambda c: c.fetch("run-9", "model.safetensors"),
        lambda c: next(c.watch("run-9")),
    ],
    ids=["get", "cancel", "advance", "change_nodes", "finish", "call_node", "send_message", "fetch", "watch"],
)
def test_an_unknown_run_is_f001(client: GrpcMediator, call: Callable[[GrpcMediator], Any]) -> None:
    with pytest.raises(RunError) as caught:
        call(client)
    assert (caught.value.code, caught.value.place, caught.value.value) == ("F001", "run_id", "run-9")


def test_an_artifact_comes_in_chunks(mediator: Any, client: GrpcMediator) -> None:
    chunks = list(client.fetch("run-1", "model.safetensors"))
    assert b"".join(chunks) == mediator.service.artifacts["model.safetensors"]
    assert max(map(len, chunks)) <= MIB
    assert list(client.fetch("run-1", "empty")) == []


def test_an_unknown_artifact_is_told_at_the_call(client: GrpcMediator) -> None:
    with pytest.raises(RunError, match="F006"):
        client.fetch("run-1", "nothing")


def test_an_abandoned_download_ends(client: GrpcMediator) -> None:
    chunks = client.fetch("run-1", "model.safetensors")
    assert len(next(chunks)) == MIB
    chunks.close()  # type: ignore[attr-defined]


def test_text_that_cannot_travel_is_refused_here(client: GrpcMediator) -> None:
    with pytest.raises(ProtocolError, match="P001 run_id"):
        client.get("\udcff")


def test_a_message_beyond_the_limit_is_p026(client: GrpcMediator) -> None:
    with pytest.raises(ProtocolError, match="P026"):
        client.send_message("run-1", ["server"], bytes(64 * MIB + 1))


def test_a_defect_of_the_mediator_shows_a_reference_and_no_secret(
    mediator: Any, client: GrpcMediator, caplog: pytest.LogCaptureFixture
) -> None:
    mediator.service.artifacts["bug"] = b"yes"
    with caplog.at_level(logging.ERROR), pytest.raises(IcrfError) as caught:
        client.clusters()
    assert caught.value.code == "X001"
    assert "secret" not in str(caught.value)
    reference = caught.value.message.split()[-1]
    (record,) = [one for one in caplog.records if one.name == "icrf.mediator.wire"]
    assert reference in record.getMessage()
    assert record.exc_info is not None and "secret" in str(record.exc_info[1])


@pytest.mark.parametrize("method", ["Federation/Submit", "Federation/Get", "Cluster/Upload", "Cluster/Connect"])
def test_bytes_that_are_no_request_are_p001(mediator: Any, method: str) -> None:
    with grpc.insecure_channel(mediator.address) as channel:
        if method.startswith("Federation"):
            call = channel.unary_unary(f"/icrf.v1.{method}")
            request: Any = b"\xff\xff"
        else:
            call = channel.stream_unary(f"/icrf.v1.{method}")
            request = iter([b"\xff\xff"])
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value, mediator.address).code == "P001"


def test_a_submission_is_carried_through_although_its_caller_left(mediator: Any) -> None:
    mediator.hold()
    with grpc.insecure_channel(mediator.address) as channel:
        submit = channel.unary_unary("/icrf.v1.Federation/Submit")
        with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            submit(to_proto(SUBMISSION).SerializeToString(), timeout=0.2)
    mediator.let_go()
    mediator.seen(lambda: mediator.count("submit") == 1)


# ---------------------------------------------------------------- reaching the mediator


def test_an_absent_mediator_is_l001_soon(mediator: Any) -> None:
    mediator.stop()
    absent = GrpcMediator(mediator.address, contact_s=0.2)
    began = time.monotonic()
    for call in (absent.list_runs, lambda: next(absent.watch("run-1")), lambda: absent.fetch("run-1", "x")):
        with pytest.raises(LocalError) as caught:
            call()
        assert (caught.value.code, caught.value.place) == ("L001", mediator.address)
    assert time.monotonic() - began < PATIENCE_S
    absent.close()


def test_a_mediator_that_does_not_answer_is_l001(mediator: Any) -> None:
    mediator.hold()
    client = GrpcMediator(mediator.address, timeout_s=0.2, contact_s=0.1)
    with pytest.raises(LocalError, match="did not answer in time"):
        client.get("run-1")
    client.close()


def test_a_call_survives_a_restart_of_the_mediator(mediator: Any) -> None:
    client = GrpcMediator(mediator.address, contact_s=PATIENCE_S)
    assert client.get("run-1") == mediator.service.run
    mediator.stop()
    restart = threading.Timer(0.1, mediator.start)
    restart.start()
    assert client.get("run-1") == mediator.service.run
    restart.join()
    client.close()


def test_a_closed_client_says_so(mediator: Any) -> None:
    client = GrpcMediator(mediator.address)
    client.close()
    client.close()
    with pytest.raises(LocalError, match="connection to the mediator is closed"):
        client.list_runs()


@pytest.mark.parametrize("address, code", [("http://localhost:1", "L003"), ("10.0.0.1:7443", "L002")])
def test_a_bad_address_is_refused_before_any_call(address: str, code: str) -> None:
    for cls in (GrpcMediator, GrpcAgentLink):
        with pytest.raises(LocalError, match=code):
            cls(address)


# ---------------------------------------------------------------- watching


def test_a_watch_shows_past_and_live_events_until_the_end(mediator: Any, client: GrpcMediator) -> None:
    events = client.watch("run-1")
    assert [next(events), next(events)] == [event(1), event(2, "round", round=mediator.service.result)]
    mediator.publish(event(3), event(4, "end", status="COMPLETED"))
    assert list(events) == [event(3), event(4, "end", status="COMPLETED")]
    assert list(client.watch("run-1", after_seq=3)) == [event(4, "end", status="COMPLETED")]


def test_a_watch_goes_on_after_a_restart_without_gap_or_repetition(mediator: Any, client: GrpcMediator) -> None:
    events = client.watch("run-1")
    got = [next(events), next(events)]
    mediator.stop()
    warning = next(events)
    assert (warning.kind, warning.seq) == ("warning", 0)
    assert "mediator unreachable, retrying (last contact" in warning.text
    mediator.start()
    mediator.publish(event(3), event(4, "end"))
    got += [one for one in events if one.seq]
    assert [one.seq for one in got] == [1, 2, 3, 4]


def test_a_watch_gives_up_in_the_end(mediator: Any) -> None:
    client = GrpcMediator(mediator.address, contact_s=0.1, give_up_s=0.2)
    events = client.watch("run-1", after_seq=1)
    assert next(events).seq == 2
    mediator.stop()
    with pytest.raises(LocalError, match="L001"):
        for one in events:
            assert one.kind == "warning"
    client.close()


def test_closing_the_client_ends_its_watch(mediator: Any) -> None:
    client = GrpcMediator(mediator.address)
    events = client.watch("run-1", after_seq=1)
    assert next(events).seq == 2
    closer = threading.Timer(0.05, client.close)
    closer.start()
    with pytest.raises(LocalError, match="L001"):
        next(events)
    closer.join()


def test_an_abandoned_watch_leaves_no_watcher(mediator: Any, client: GrpcMediator) -> None:
    events = client.watch("run-1", after_seq=1)
    next(events)
    assert mediator.service.watchers == 1
    events.close()  # type: ignore[attr-defined]

    mediator.on_loop(async_until(lambda: not mediator.service.watchers))
