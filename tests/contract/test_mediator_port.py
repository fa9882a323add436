"""The contract of :class:`icrf.ports.MediatorPort`: one suite for every adapter, a whole fabric behind each."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from icrf import values
from icrf.errors import ConfigError, IcrfError, LocalError, NodeError, RoutingError, RunError
from icrf.federation.message import Message
from icrf.federation.node import FederatedNode
from icrf.model_file import tensor_sha256
from icrf.ports import MediatorPort
from icrf.protocol import RunEvent, RunInfo, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.waiting import async_until
from icrf.wire.mediator_client import GrpcMediator
from icrf_mediator.inprocess import InProcessMediator
from icrf_mediator.server import MediatorServer

MIB = 1 << 20


class Probe(FederatedNode):
    """A node to be called from afar."""

    def echo(self, value: Any, times: int = 1) -> Any:
        return [self.id, value * times]

    def boom(self) -> None:
        raise ValueError("the sensor is off")

    def heard(self) -> list[str]:
        return [f"{m.sender_id}: {m.header} {m.body['x']}" for m in self.sync()]


@pytest.fixture
def fabric() -> Iterator[InlineFabric]:
    with InlineFabric(2, templates={"local:Probe": Probe}) as one:
        yield one


@pytest.fixture(params=["in-process", "grpc"])
def port(request: pytest.FixtureRequest, fabric: InlineFabric) -> Iterator[MediatorPort]:
    if request.param == "in-process":
        yield fabric.port
        return
    server = MediatorServer(fabric.service, "127.0.0.1:0")
    on_loop = fabric._thread.call
    on_loop(server.start())
    client = GrpcMediator(server.address)
    yield client
    client.close()
    on_loop(server.stop(0.0))


def submission(**parts: Any) -> Submission:
    own = {k: parts.pop(k) for k in ("keep", "stage", "client_request_id") if k in parts}
    config = {
        "federation_id": "probes",
        "federated_learning_schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "number_of_clients": 4,
        "federated_learning_rounds": 2,
        "number_of_epochs": 0,
        "dataset_type": "digits",
        "model_type": "mlp",
        "client_template": "local:Probe",
        **parts,
    }
    return build_submission(FederationConfig.from_mapping(config), **own)


def ended(port: MediatorPort, run: RunInfo) -> RunInfo:
    """The run once it is over."""
    assert [e.kind for e in port.watch(run.run_id)][-1] == "end"
    return port.get(run.run_id)


def until(events: Iterator[RunEvent], status: str) -> list[RunEvent]:
    """The next events up to the one that tells this status."""
    seen = []
    for event in events:
        seen.append(event)
        if event.kind == "status" and event.status == status:
            return seen
    raise AssertionError(f"ended before {status}: {seen}")


# ---------------------------------------------------------------- submit, get, list, plan


def test_a_submission_runs_to_its_end_and_is_shown(port: MediatorPort) -> None:
    before = port.clusters()
    assert [(c.name, c.alive, c.free_slots) for c in before] == [("local-1", True, 2), ("local-2", True, 2)]
    run = port.submit(submission())
    assert (run.federation, run.flow, run.rounds_planned) == ("probes", "decentralized", 2)
    info = ended(port, run)
    assert (info.status, info.rounds_done, info.error_json) == ("COMPLETED", 2, "")
    assert info.clusters == ("local-1", "local-2")
    assert port.list_runs() == [info] and port.get(run.run_id[:6]) == info
    again = port.submit(submission(federation_id="second"))
    assert [r.run_id for r in port.list_runs()] == [again.run_id, run.run_id]
    ended(port, again)


def test_links_are_measured_each_way_and_known_from_then_on(port: MediatorPort) -> None:
    assert port.links() == []
    measured = port.measure_links()
    assert [(m.source, m.target, m.error_json) for m in measured] == [
        ("local-1", "local-2", ""),
        ("local-2", "local-1", ""),
    ]
    assert all(m.bytes_per_s > 0.0 and m.rtt_s >= 0.0 and m.measured_at > 0.0 for m in measured)
    assert port.links() == measured
    assert all(link.seconds_per_round > 0.0 for link in port.plan(submission()).links)


def test_submit_is_idempotent_by_its_request_id(port: MediatorPort) -> None:
    same = submission(client_request_id="once")
    run = port.submit(same)
    assert port.submit(same).run_id == run.run_id
    info = ended(port, run)
    assert port.submit(same) == info and len(port.list_runs()) == 1


def test_what_is_wrong_with_a_submission_is_told_with_its_place(port: MediatorPort) -> None:
    with pytest.raises(ConfigError, match=r"placement\.client_0: .* cluster 'mars' not in fabric") as caught:
        port.submit(submission(placement={"client_0": "mars"}))
    assert caught.value.code == "C011" and [e.code for e in caught.value.errors] == ["C014"]  # type: ignore[attr-defined]
    with pytest.raises(IcrfError) as lacks:
        port.submit(submission(resources={"num_cpus": 64}))
    assert lacks.value.code == "R001" and "cluster local-1: 2 slots x 64 CPU" in lacks.value.message
    assert port.list_runs() == []


def test_a_plan_changes_nothing(port: MediatorPort) -> None:
    plan = port.plan(submission(placement={"client_1": "local-2"}))
    assert plan.feasible and plan.assignment["client_1"] == "local-2" and port.list_runs() == []


# ---------------------------------------------------------------- watch


def test_past_events_come_first_then_live_ones_until_the_end(port: MediatorPort) -> None:
    run = port.submit(submission(stage="reserve", keep=True))
    events = port.watch(run.run_id)
    seen = until(events, "RESERVED")
    port.advance(run.run_id, "activate")
    seen += until(events, "READY")
    port.advance(run.run_id, "run")
    seen += until(events, "IDLE")
    port.finish(run.run_id)
    seen += list(events)
    assert [e.seq for e in seen] == list(range(1, len(seen) + 1))
    assert [e.round.number for e in seen if e.round] == [1, 2]
    assert (seen[-1].kind, seen[-1].status) == ("end", "COMPLETED")
    assert list(port.watch(run.run_id)) == seen


def test_a_watch_resumes_after_any_event_and_past_the_last_one(port: MediatorPort) -> None:
    run = port.submit(submission())
    everything = list(port.watch(run.run_id))
    for after in (1, 3, len(everything) - 1):
        assert list(port.watch(run.run_id, after)) == everything[after:]
    assert list(port.watch(run.run_id, len(everything))) == []
    assert list(port.watch(run.run_id, len(everything) + 1000)) == []


def test_a_watch_from_the_future_waits_and_harms_nobody(port: MediatorPort) -> None:
    run = port.submit(submission(stage="reserve", keep=True))
    seen: list[RunEvent] = []
    ahead = threading.Thread(target=lambda: seen.extend(port.watch(run.run_id, 1000)))
    ahead.start()
    until(port.watch(run.run_id), "RESERVED")
    port.cancel(run.run_id)
    ahead.join(10.0)
    assert not ahead.is_alive() and seen == []


def test_watchers_leave_nothing_behind(port: MediatorPort, fabric: InlineFabric) -> None:
    run = port.submit(submission(stage="reserve", keep=True))
    early, whole = port.watch(run.run_id), port.watch(run.run_id)
    assert next(early).seq == next(whole).seq == 1
    early.close()  # type: ignore[attr-defined]
    port.cancel(run.run_id)
    assert list(whole)[-1].kind == "end"

    fabric._thread.call(async_until(lambda: not fabric.service._watchers), 10.0)


def test_the_end_is_told_only_once_the_model_can_be_fetched(port: MediatorPort) -> None:
    run = port.submit(submission())
    for event in port.watch(run.run_id):
        if event.status == "COMPLETED":
            model = b"".join(port.fetch(run.run_id, "model.safetensors"))
            assert tensor_sha256(model) == port.get(run.run_id).model_sha256
    assert event.kind == "end"


# ---------------------------------------------------------------- cancel, advance, finish


@pytest.mark.parametrize("stage", ["reserve", "activate", "run"])
def test_a_cancelled_run_is_over_and_gives_everything_back(port: MediatorPort, stage: str) -> None:
    run = port.submit(submission(stage=stage, keep=True))
    events = port.watch(run.run_id)
    until(events, {"reserve": "RESERVED", "activate": "READY", "run": "IDLE"}[stage])
    info = port.cancel(run.run_id)
    assert info.status == "CANCELLED" and "F003" in info.error_json
    assert list(events)[-1].status == "CANCELLED"
    assert port.cancel(run.run_id) == port.finish(run.run_id) == info
    with pytest.raises(RunError, match="F005"):
        port.advance(run.run_id, "run")
    with pytest.raises(RunError, match="F005"):
        port.call_node(run.run_id, "client_0", "echo", values.encode([[1], {}]))
    # Its slots are free again: the next one gets all of them.
    assert ended(port, port.submit(submission())).status == "COMPLETED"


def test_advance_and_finish_may_be_repeated(port: MediatorPort) -> None:
    run = port.submit(submission(keep=True))
    events = port.watch(run.run_id)
    until(events, "IDLE")
    port.advance(run.run_id, "run", 2)
    port.advance(run.run_id, "run", 3)
    port.advance(run.run_id, "run", 3)
    until(events, "IDLE")
    assert port.get(run.run_id).rounds_done == 3
    with pytest.raises(RunError, match="unknown stage 'fly'"):
        port.advance(run.run_id, "fly")
    port.finish(run.run_id)
    port.finish(run.run_id)
    assert list(events)[-1].status == "COMPLETED"
    assert port.finish(run.run_id).rounds_done == 3


# ---------------------------------------------------------------- nodes


def test_nodes_are_called_wherever_they_live(port: MediatorPort) -> None:
    where = {f"client_{i}": f"local-{1 + i % 2}" for i in range(4)}
    run = port.submit(submission(stage="activate", keep=True, placement=where))
    until(port.watch(run.run_id), "READY")
    for name in ("client_0", "client_1"):
        found = port.call_node(run.run_id, name, "echo", values.encode([["ab"], {"times": 2}]))
        assert values.decode(found) == [name, "abab"]
    large = values.decode(port.call_node(run.run_id, "client_1", "echo", values.encode([[b"x"], {"times": 3 * MIB}])))
    assert large == ["client_1", b"x" * (3 * MIB)]

    with pytest.raises(NodeError) as raised:
        port.call_node(run.run_id, "client_1", "boom", values.encode([[], {}]))
    assert raised.value.code == "U001" and "the sensor is off" in str(raised.value)
    assert "client_1" in str(raised.value)
    with pytest.raises(RunError, match="F005 client_0: client_0 has no method 'nothing'"):
        port.call_node(run.run_id, "client_0", "nothing", values.encode([[], {}]))
    with pytest.raises(RoutingError, match="P012 no node 'client_9'"):
        port.call_node(run.run_id, "client_9", "echo", values.encode([[1], {}]))
    with pytest.raises(IcrfError, match="P001"):
        port.call_node(run.run_id, "client_0", "echo", b"no values")
    port.cancel(run.run_id)


def test_a_message_is_in_the_mailboxes_when_the_call_returns(port: MediatorPort) -> None:
    run = port.submit(submission(stage="activate", keep=True))
    until(port.watch(run.run_id), "READY")
    message = Message("note", "supervisor", {"x": 7}).encode()
    port.send_message(run.run_id, ["client_0", "client_3"], message)
    for name, heard in (("client_0", 1), ("client_1", 0), ("client_3", 1)):
        found = values.decode(port.call_node(run.run_id, name, "heard", values.encode([[], {}])))
        assert found == ["supervisor: note 7"] * heard
    with pytest.raises(RoutingError, match="P012"):
        port.send_message(run.run_id, ["client_0", "client_9"], message)
    port.cancel(run.run_id)


def test_calls_leave_nothing_behind(port: MediatorPort, fabric: InlineFabric) -> None:
    run = port.submit(submission(stage="activate", keep=True))
    until(port.watch(run.run_id), "READY")
    port.call_node(run.run_id, "client_0", "echo", values.encode([["x"], {}]))
    for name, method in (("client_0", "boom"), ("client_9", "echo")):
        with pytest.raises(IcrfError):
            port.call_node(run.run_id, name, method, values.encode([[], {}]))
    assert fabric.service._calls == {} and fabric.blobs._blobs == {}
    port.cancel(run.run_id)


# ---------------------------------------------------------------- artifacts and errors


def test_the_model_and_the_plan_can_be_fetched(port: MediatorPort) -> None:
    info = ended(port, port.submit(submission()))
    chunks = list(port.fetch(info.run_id, "model.safetensors"))
    assert max(map(len, chunks)) <= MIB and tensor_sha256(b"".join(chunks)) == info.model_sha256
    assert b'"client_0":' in b"".join(port.fetch(info.run_id[:8], "plan.json"))


def test_an_unknown_artifact_is_f006_at_the_call(port: MediatorPort) -> None:
    run = port.submit(submission(stage="reserve", keep=True))
    for artifact in ("model.safetensors", "../../etc/passwd", ""):
        with pytest.raises(RunError) as caught:
            port.fetch(run.run_id, artifact)
        assert caught.value.code == "F006"
    port.cancel(run.run_id)


@pytest.mark.parametrize("run_id", ["nowhere", "", "é"])
def test_an_unknown_run_is_f001_everywhere(port: MediatorPort, run_id: str) -> None:
    for call in (
        lambda: port.get(run_id),
        lambda: next(iter(port.watch(run_id))),
        lambda: port.cancel(run_id),
        lambda: port.advance(run_id, "run"),
        lambda: port.change_nodes(run_id, add=["client_0"]),
        lambda: port.finish(run_id),
        lambda: port.call_node(run_id, "client_0", "echo", b""),
        lambda: port.send_message(run_id, ["client_0"], b""),
        lambda: port.fetch(run_id, "model.safetensors"),
    ):
        with pytest.raises(RunError) as caught:
            call()
        assert caught.value.code == "F001"


# ---------------------------------------------------------------- in-process only


def test_a_stopped_mediator_is_l001() -> None:
    fabric = InlineFabric(0)
    run = fabric.port.submit(submission())
    events = fabric.port.watch(run.run_id)
    assert [e.kind for e in islice(events, 2)] == ["status", "waiting"]
    caught: list[IcrfError] = []

    def wait() -> None:
        try:
            next(events)
        except IcrfError as error:
            caught.append(error)

    watcher = threading.Thread(target=wait)
    watcher.start()
    fabric.close()
    watcher.join(10.0)
    assert [error.code for error in caught] == ["L001"]
    with pytest.raises(LocalError, match="L001 the mediator of this process is stopped"):
        fabric.port.list_runs()


def test_ctrl_c_ends_a_watch_and_leaves_the_fabric_in_order(fabric: InlineFabric) -> None:
    assert isinstance(fabric.port, InProcessMediator)
    run = fabric.port.submit(submission(stage="reserve", keep=True))
    events = fabric.port.watch(run.run_id)
    until(events, "RESERVED")
    strike = threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    strike.start()
    with pytest.raises(KeyboardInterrupt):
        next(events)
    strike.join()
    assert fabric.port.cancel(run.run_id).status == "CANCELLED"
    assert list(fabric.port.watch(run.run_id))[-1].kind == "end"
