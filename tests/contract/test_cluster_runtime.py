"""One suite for every adapter of ``ClusterRuntime``: inline objects and a real Ray cluster.

The neighbouring cluster is played by the tests: a bare transport that takes payloads and sends some.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import ray

from icrf import values
from icrf.errors import IcrfError
from icrf.exchange import MODEL, PARTIAL, compile_exchange
from icrf.federation.message import Message
from icrf.federation.node import FederatedNode
from icrf.loop_thread import LoopThread
from icrf.ports import Arrival, PayloadHeader, PayloadTransport, PhaseReport
from icrf.protocol import Activate, Activated, Capacity, PeerAddress, Reserve, Resources, StartRound
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf.update import choose_grid
from icrf_agent.cluster_gateway import GatewaySettings
from icrf_agent.gateway import GrpcTransport
from icrf_agent.gateway_inproc import InProcessTransport, TransportHub
from icrf_agent.inline_substrate import InlineSubstrate
from icrf_agent.ray_substrate import RaySubstrate
from icrf_agent.runtime import HostedRuntime, Substrate

PATIENCE_S = 60.0
HERE, THERE = "here", "there"


@dataclass
class Rig:
    """A running runtime, and the neighbouring cluster's end of the wire."""

    substrate: Callable[[], Substrate]
    neighbour: PayloadTransport
    is_ray: bool
    thread: LoopThread
    received: list[tuple[PayloadHeader, np.ndarray[Any, Any]]] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    came: threading.Condition = field(default_factory=threading.Condition)
    templates: dict[str, type] = field(default_factory=dict)
    address: str = ""
    neighbour_address: str = ""
    runs: int = 0

    def start(self) -> None:
        self.runtime = HostedRuntime(HERE, self.substrate(), templates=self.templates)
        self.neighbour_address = self.neighbour.serve(lambda header, array, size: self.received.append((header, array)))
        self.facts = self.call(self.runtime.start())
        self.address = self.facts.gateway_address
        self.watching = asyncio.run_coroutine_threadsafe(self._watch(), self.thread.loop)

    async def _watch(self) -> None:
        async for arrival in self.runtime.arrivals():
            with self.came:
                self.arrivals.append(arrival)
                self.came.notify_all()

    def await_arrivals(self, run_id: str, count: int) -> list[Arrival]:
        def mine() -> list[Arrival]:
            return [a for a in self.arrivals if a.header.run_id == run_id]

        with self.came:
            assert self.came.wait_for(lambda: len(mine()) >= count, PATIENCE_S)
            return mine()

    def call(self, work: Any) -> Any:
        return self.thread.call(work, PATIENCE_S)

    def fails(self, code: str, work: Any) -> IcrfError:
        with pytest.raises(IcrfError) as caught:
            self.call(work)
        assert caught.value.code == code, caught.value
        return caught.value

    def close(self) -> None:
        self.watching.cancel()
        self.call(self.runtime.close())
        self.call(self.runtime.close())
        self.neighbour.close()

    def template(self, kind: type) -> str:
        """Make a class of the tests known to the hosts. Define it in a function: workers cannot import this file."""
        name = f"local:{kind.__name__}"
        self.templates[name] = kind
        return name

    def activation(self, *, clusters: Sequence[str] = (HERE,), num_slots: int = 2, **keys: Any) -> Activate:
        """A star of a server and two clients; with two clusters the second client lives there."""
        self.runs += 1
        data = {
            "federation_id": "fed",
            "federated_learning_schema": "TraditionalFederatedLearning",
            "federated_learning_topology": "star",
            "number_of_clients": 2,
            "batch_size": 256,
            **keys,
        }
        submission = build_submission(FederationConfig.from_mapping(data))
        return Activate(
            run_id=f"{'ray' if self.is_ray else 'inline'}{self.runs}",
            generation=1,
            federation="fed",
            config_json=submission.config_json,
            flow=submission.flow,
            nodes=submission.nodes,
            graph=submission.graph,
            layout=submission.layout,
            clusters=tuple(clusters),
            assignment=(0, 0, len(clusters) - 1),
            peers=(PeerAddress(HERE, self.address), PeerAddress(THERE, self.neighbour_address)),
            num_slots=num_slots,
        )

    def reserve(self, activation: Activate, *, num_cpus: float = 0.5, deadline_s: float = 30.0) -> Any:
        slots, resources = activation.num_slots, Resources(num_cpus)
        request = Reserve(activation.run_id, 1, "fed", slots, resources, "PACK", deadline_s)
        return self.runtime.reserve(request)

    def activate(self, activation: Activate) -> Activated:
        self.call(self.reserve(activation))
        found: Activated = self.call(self.runtime.activate(activation))
        return found

    def node(self, activation: Activate, node_id: str, method: str, *arguments: Any) -> Any:
        packed = values.encode([list(arguments), {}])
        return values.decode(self.call(self.runtime.call_node(activation.run_id, node_id, method, packed)))


def start_of(activation: Activate, activated: Activated, total: int, number: int = 1, attempt: int = 1) -> StartRound:
    grid = choose_grid(activated.absmax, total)
    return StartRound(activation.run_id, 1, number, attempt, "", grid, total, True)


def samples_of(activated: Activated) -> int:
    return sum(count for _, count in activated.num_samples)


def one_round(rig: Rig, activation: Activate, start: StartRound) -> tuple[PhaseReport, PhaseReport]:
    rig.call(rig.runtime.publish_model(activation.run_id, start))
    trained = rig.call(rig.runtime.train(activation.run_id, start))
    return trained, rig.call(rig.runtime.aggregate(activation.run_id, start))


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    loop = LoopThread("contract")
    yield loop
    loop.close()


@pytest.fixture(scope="module", params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def rig(request: pytest.FixtureRequest, thread: LoopThread) -> Iterator[Rig]:
    if request.param == "inline":
        hub = TransportHub()
        capacity = Capacity(4, 4.0, 0.0, 1 << 30)
        found = Rig(
            lambda: InlineSubstrate(capacity, lambda: InProcessTransport(hub, HERE)),
            InProcessTransport(hub, THERE),
            False,
            thread,
        )
    else:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            namespace="icrf",
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=200 << 20,
        )
        settings = GatewaySettings(HERE, "incarnation", "127.0.0.1:0", None)
        neighbour = GrpcTransport("127.0.0.1:0", None, THERE, "incarnation")
        found = Rig(lambda: RaySubstrate(None, settings, 4), neighbour, True, thread)
    try:
        found.start()
        yield found
        found.close()
        assert not found.is_ray or ray.util.list_named_actors(all_namespaces=True) == []
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def active(rig: Rig) -> Iterator[tuple[Activate, Activated]]:
    """A run that has done one round; for tests that change nothing."""
    activation = rig.activation()
    activated = rig.activate(activation)
    one_round(rig, activation, start_of(activation, activated, samples_of(activated)))
    yield activation, activated
    rig.call(rig.runtime.release(activation.run_id))


# ---------------------------------------------------------------- set-up


def test_a_runtime_says_what_it_found(rig: Rig) -> None:
    capacity = rig.facts.capacity
    assert (capacity.num_slots, capacity.num_cpus, len(capacity.machines)) == (4, 4.0, 1)
    assert rig.facts.fingerprint.num_threads == 1
    assert bool(rig.facts.gateway_address) == rig.is_ray


def test_activation_tells_samples_maxima_and_hash(active: tuple[Activate, Activated]) -> None:
    activation, activated = active
    assert [node for node, _ in activated.num_samples] == [1, 2]
    assert len(activated.absmax) == len(activation.layout)
    assert len(activated.model_hash) == 64 and not activated.state_hashes


def test_a_repeated_activation_is_the_same_one(rig: Rig, active: tuple[Activate, Activated]) -> None:
    activation, activated = active
    before = rig.node(activation, "client_0", "ping")["pid"]
    assert rig.call(rig.runtime.activate(activation)) == activated
    assert rig.node(activation, "client_0", "ping")["pid"] == before
    assert rig.node(activation, "client_0", "ping")["round"] == 1, "nothing was set up anew"


def test_what_never_fits_is_refused_with_numbers(rig: Rig) -> None:
    error = rig.fails("R001", rig.reserve(rig.activation(), num_cpus=2.5))
    assert all(number in str(error) for number in ("2 slots", "2.5 CPU", "5 CPU", "4 CPU in total"))


def test_nothing_is_created_without_a_reservation(rig: Rig) -> None:
    activation = rig.activation()
    rig.fails("F005", rig.runtime.activate(activation))
    rig.call(rig.runtime.release(activation.run_id))


def test_code_that_the_cluster_does_not_allow_is_refused(rig: Rig, thread: LoopThread) -> None:
    if rig.is_ray:
        pytest.skip("decided by the host, whatever carries it")

    async def try_it() -> None:
        runtime = HostedRuntime(HERE, InlineSubstrate(Capacity(2, 2.0, 0.0, 0)), allow=("my.module:Allowed",))
        await runtime.start()
        try:
            activation = replace(rig.activation(client_template="my.module:Node"), peers=())
            await runtime.reserve(Reserve(activation.run_id, 1, "fed", 2, Resources(), "PACK", 1.0))
            await runtime.activate(activation)
        finally:
            await runtime.close()

    error = rig.fails("A004", try_it())
    assert "my.module:Node" in str(error) and HERE in str(error) and "my.module:Allowed" in str(error)


def test_a_set_up_that_fails_half_way_can_be_released_and_leaves_nothing(rig: Rig) -> None:
    class FailsToBuild(FederatedNode):
        def build(self, **kwargs: Any) -> None:
            if self.id == "client_1":
                raise OSError("no sensor")

    activation = rig.activation(client_template=rig.template(FailsToBuild), num_slots=3)
    rig.call(rig.reserve(activation))
    error = rig.fails("U001", rig.runtime.activate(activation))
    assert "client_1 on here" in str(error) and "no sensor" in str(error)
    rig.call(rig.runtime.release(activation.run_id))
    assert_gone(rig, activation.run_id)
    again = rig.activation(num_slots=2)
    rig.call(rig.reserve(again, num_cpus=0.5))
    rig.call(rig.runtime.release(again.run_id))


# ---------------------------------------------------------------- rounds


def test_a_round_has_the_same_bits_on_every_substrate(rig: Rig, active: tuple[Activate, Activated]) -> None:
    activation, activated = active
    plain = Rig(InlineSubstrate, InProcessTransport(TransportHub(), THERE), False, rig.thread)
    plain.start()
    try:
        expected = plain.activate(activation)
        assert expected == activated
        start = start_of(activation, expected, samples_of(expected))
        _, aggregated = one_round(plain, activation, start)
        model = plain.call(plain.runtime.final_model(activation.run_id, 1))
    finally:
        plain.close()
    found = rig.call(rig.runtime.final_model(activation.run_id, 1))
    assert found.sha256 == model.sha256
    assert found.sha256 == aggregated.model_hash
    assert set(aggregated.metrics) == {"accuracy", "loss"}


def test_only_the_committed_model_can_be_had(rig: Rig, active: tuple[Activate, Activated]) -> None:
    activation, _ = active
    rig.fails("F006", rig.runtime.final_model(activation.run_id, 7))


def test_payloads_cross_between_clusters_once(rig: Rig) -> None:
    activation = rig.activation(clusters=(HERE, THERE))
    activated = rig.activate(activation)
    adjacency = HybridAdjacencyMatrix.from_graph(activation.graph)
    plan = compile_exchange(activation.flow, adjacency, [n.role for n in activation.nodes], activation.assignment)
    start = start_of(activation, activated, samples_of(activated) + 7)
    (transfer,) = plan.outbound(0, MODEL)
    rig.call(rig.runtime.publish_model(activation.run_id, start))
    rig.call(rig.runtime.send_payload(activation.run_id, start, transfer))
    sent, model = rig.received[-1]
    assert (sent.kind, sent.sender, sent.source, sent.target) == (MODEL, 0, HERE, THERE)
    assert model.dtype == np.float32 and [float(np.abs(model).max())] == [max(activated.absmax)]
    rig.call(rig.runtime.train(activation.run_id, start))

    partial = PayloadHeader(
        activation.run_id, 1, 1, 1, PARTIAL, -1, THERE, HERE, "float64", model.size, weight=7, recipients=(0,)
    )
    here = PeerAddress(HERE, rig.address)
    for _ in range(2):  # as after a lost acknowledgement
        rig.neighbour.send(partial, 7 * model.astype(np.float64), here, PATIENCE_S)
    for code, bad in (("P003", {"generation": 2}), ("P010", {"source": "nobody"}), ("P011", {"recipients": (1,)})):
        with pytest.raises(IcrfError, match=code):
            rig.neighbour.send(replace(partial, **bad), np.zeros(model.size), here, PATIENCE_S)
    letters = values.encode([[2, 1, [0], Message("from there", "client_1").encode()]])
    header = replace(partial, kind="message", dtype="uint8", num_elements=len(letters), recipients=(), weight=0)
    rig.neighbour.send(header, np.frombuffer(letters, np.uint8), here, PATIENCE_S)
    found = rig.await_arrivals(activation.run_id, 2)
    assert [a.header.kind for a in found] == [PARTIAL, "message"]
    assert found[0].wire_bytes > 8 * model.size
    report = rig.call(rig.runtime.aggregate(activation.run_id, start))
    assert len(report.model_hash) == 64
    assert rig.node(activation, "server", "sync") == []
    rig.call(rig.runtime.publish_model(activation.run_id, replace(start, round=2)))
    assert [m["header"] for m in rig.node(activation, "server", "sync")] == ["from there"]
    rig.call(rig.runtime.release(activation.run_id))


def test_an_aborted_attempt_is_over_and_the_next_one_gives_the_same_bits(
    rig: Rig, active: tuple[Activate, Activated]
) -> None:
    activation = rig.activation()
    activated = rig.activate(activation)
    first = start_of(activation, activated, samples_of(activated))
    rig.call(rig.runtime.publish_model(activation.run_id, first))
    rig.call(rig.runtime.abort(activation.run_id, 1, 1))
    rig.fails("P003", rig.runtime.publish_model(activation.run_id, first))
    _, report = one_round(rig, activation, replace(first, attempt=2))
    assert report.model_hash == rig.call(rig.runtime.final_model(active[0].run_id, 1)).sha256
    rig.call(rig.runtime.release(activation.run_id))


# ---------------------------------------------------------------- calls and messages


def test_nodes_can_be_called(rig: Rig, active: tuple[Activate, Activated]) -> None:
    activation, _ = active
    found = rig.node(activation, "client_1", "ping")
    assert (found["id"], found["cluster"], found["round"]) == ("client_1", HERE, 1)
    call = rig.runtime.call_node
    nothing = values.encode([[], {}])
    rig.fails("P012", call(activation.run_id, "client_9", "ping", nothing))
    rig.fails("F005", call(activation.run_id, "client_1", "no_such_method", nothing))
    rig.fails("F005", call(activation.run_id, "client_1", "_build", nothing))
    rig.fails("F005", call("no run", "client_1", "ping", nothing))
    error = rig.fails("U001", call(activation.run_id, "client_1", "evaluate", values.encode([[1, 2, 3], {}])))
    assert "client_1" in str(error) and "TypeError" in str(error)


def test_the_supervisors_messages_are_there_at_once(rig: Rig, active: tuple[Activate, Activated]) -> None:
    activation, _ = active
    for text in ("first of all", "then"):
        message = Message(text, "supervisor", {"x": np.arange(3)}).encode()
        rig.call(rig.runtime.send_message(activation.run_id, (1,), message))
    assert rig.node(activation, "client_0", "receive")["header"] == "first of all"
    assert [m["header"] for m in rig.node(activation, "client_0", "sync")] == ["then"]


# ---------------------------------------------------------------- the end of a run


def assert_gone(rig: Rig, run_id: str) -> None:
    """Nothing of the run is left; Ray ends actors and groups in its own time."""
    nothing = values.encode([[], {}])
    rig.fails("F005", rig.runtime.call_node(run_id, "client_0", "ping", nothing))
    rig.fails("P003", rig.runtime.send_message(run_id, (0,), Message("hi", "supervisor").encode()))
    if rig.is_ray:
        tick = threading.Event()
        for _ in range(int(PATIENCE_S / 0.05)):
            actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == run_id]
            groups = [g for g in ray.util.placement_group_table().values() if run_id in g["name"]]
            if not actors and all(g["state"] == "REMOVED" for g in groups):
                return
            tick.wait(0.05)
        raise AssertionError(f"left: {actors} {groups}")


def test_release_leaves_nothing_and_may_be_repeated(rig: Rig) -> None:
    activation = rig.activation(num_slots=3)
    rig.activate(activation)
    if rig.is_ray:
        names = {
            a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == activation.run_id
        }
        assert names == {"fed/server", "fed/client_0", "fed/client_1"}
        handle = ray.get_actor("fed/client_1", namespace=activation.run_id)
        assert ray.get(handle.ping.remote())["id"] == "client_1"
    for _ in range(2):
        rig.call(rig.runtime.release(activation.run_id))
    rig.call(rig.runtime.release("never heard of"))
    rig.call(rig.runtime.abort(activation.run_id, 1, 1))
    assert_gone(rig, activation.run_id)


def test_a_release_during_the_set_up_leaves_nothing(rig: Rig) -> None:
    activation = rig.activation()
    rig.call(rig.reserve(activation))

    async def overlap() -> None:
        activating = asyncio.ensure_future(rig.runtime.activate(activation))
        await asyncio.sleep(0)
        await rig.runtime.release(activation.run_id)
        await asyncio.gather(activating, return_exceptions=True)

    rig.call(overlap())
    assert_gone(rig, activation.run_id)


def test_what_was_given_back_can_be_reserved_again_at_once(rig: Rig) -> None:
    activation = rig.activation()
    for _ in range(4):
        rig.call(rig.reserve(activation, num_cpus=1.5))
        rig.call(rig.runtime.release(activation.run_id))
    assert_gone(rig, activation.run_id)


@pytest.mark.ray
@pytest.mark.parametrize("rig", ["ray"], indirect=True)
def test_a_reservation_that_is_released_while_it_waits_ends(rig: Rig) -> None:
    first, second = rig.activation(), rig.activation()
    rig.call(rig.reserve(first, num_cpus=1.5))

    async def overlap() -> BaseException | None:
        waiting = asyncio.ensure_future(rig.reserve(second, num_cpus=1.0, deadline_s=PATIENCE_S))
        await asyncio.sleep(0)
        await rig.runtime.release(second.run_id)
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
        return outcome

    outcome = rig.call(overlap())
    assert isinstance(outcome, IcrfError) and outcome.code == "F005"
    late = rig.fails("R003", rig.reserve(second, num_cpus=1.0, deadline_s=0.5))
    assert "1 CPU" in str(late) and f"icrf-{first.run_id} (3 CPU)" in str(late)
    rig.call(rig.runtime.release(first.run_id))
    assert_gone(rig, first.run_id)


@pytest.mark.ray
@pytest.mark.parametrize("rig", ["ray"], indirect=True)
def test_the_death_of_a_host_is_told_as_such(rig: Rig) -> None:
    activation = rig.activation()
    activated = rig.activate(activation)
    ray.kill(ray.get_actor("fed/host-0", namespace=activation.run_id))
    error = rig.fails("U003", one_publish(rig, activation, activated))
    assert "fed/host-0" in str(error)
    rig.call(rig.runtime.release(activation.run_id))
    assert_gone(rig, activation.run_id)


async def one_publish(rig: Rig, activation: Activate, activated: Activated) -> None:
    await rig.runtime.publish_model(activation.run_id, start_of(activation, activated, samples_of(activated)))


# ---------------------------------------------------------------- links


def test_a_way_is_measured_with_payloads_that_are_nobodys(rig: Rig) -> None:
    before, arrived = len(rig.received), len(rig.arrivals)
    speed = rig.call(rig.runtime.measure(PeerAddress(THERE, rig.neighbour_address)))
    assert speed.bytes_per_s > 0.0 and speed.rtt_s >= 0.0
    probes = [header for header, _ in rig.received[before:]]
    assert {(p.kind, p.source, p.target) for p in probes} == {("probe", HERE, THERE)}
    assert [p.num_elements for p in probes].count(0) >= 2 and max(p.num_elements for p in probes) <= 4 << 20
    # What others measure this way leaves nothing behind here.
    header = replace(probes[-1], source=THERE, target=HERE)
    rig.neighbour.send(header, np.zeros(header.num_elements, np.uint8), PeerAddress(HERE, rig.address), PATIENCE_S)
    assert len(rig.arrivals) == arrived
