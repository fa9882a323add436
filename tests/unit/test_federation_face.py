"""The face of a federation in a Python program, without Ray: nodes, schemas, training on demand, messages, versions."""

from __future__ import annotations

import gc
import inspect
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from icrf.client import Fabric
from icrf.errors import ConfigError, IcrfError, NodeError, RoutingError, RunError
from icrf.federation.base import FederatedBase
from icrf.federation.node import FederatedNode
from icrf.federation.resources import get_resources_split
from icrf.federation.schemas import (
    SCHEMAS,
    MeshFederatedLearningSchema,
    RingFederatedLearningSchema,
    StarFederatedLearningSchema,
    schema_factory,
)
from icrf.federation.virtual_node import NodeHandle, VirtualNode
from icrf.protocol import CANCELLED, COMPLETED, IDLE
from icrf.spec import FederationConfig
from icrf.testing.inline import InlineFabric

VALUES: dict[str, Any] = {
    "federation_id": "face",
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 4,
    "federated_learning_rounds": 2,
    "learning_rate": 0.2,
    "momentum": 0.9,
}
RING = {**VALUES, "federated_learning_schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
GATE_S = 60.0


def config(**values: Any) -> FederationConfig:
    return FederationConfig.from_mapping({**VALUES, **values})


class Talker(FederatedNode):
    """Sends its number of trainings to its neighbours."""

    def build(self, **kwargs: Any) -> None:
        self.trained = 0

    def train(self, **kwargs: Any) -> dict[str, float]:
        self.trained += 1
        self.send("trained", {"count": self.trained, "weights": np.arange(2.0)})
        return super().train(**kwargs)

    def tell(self, to: str) -> int:
        return self.send("hello", {}, to=to)


class Gated(FederatedNode):
    """Trains only once the test lets it."""

    gate: ClassVar[threading.Event] = threading.Event()

    def train(self, **kwargs: Any) -> dict[str, float]:
        assert self.gate.wait(GATE_S)
        return super().train(**kwargs)


class Broken(FederatedNode):
    """Fails in its second round."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        if self.round == 2:
            raise ValueError("no such luck")
        return super().train(**kwargs)


@pytest.fixture(scope="module")
def fabric() -> Iterator[Fabric]:
    with InlineFabric(2) as inline:
        yield Fabric(inline.port)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    Gated.gate.clear()
    yield Gated.gate
    Gated.gate.set()  # the thread of the inline hosts serves the other tests too


def failure(kind: type[IcrfError], act: Callable[[], object]) -> IcrfError:
    with pytest.raises(kind) as caught:
        act()
    return caught.value


# ---------------------------------------------------------------- nodes


def bytes_each(count: int, make: Callable[[int], object]) -> float:
    gc.collect()
    tracemalloc.start()
    try:
        kept = make(count)
        gc.collect()
        total, _ = tracemalloc.get_traced_memory()
        assert kept is not None
    finally:
        tracemalloc.stop()
    return total / count


def test_a_virtual_node_is_at_most_a_kibibyte() -> None:
    plain = config()
    assert bytes_each(10_000, lambda n: [VirtualNode(None, f"client_{i}", "train-eval", plain) for i in range(n)]) < 512
    roles = ["train-eval"] * 10_000
    whole = bytes_each(10_000, lambda n: StarFederatedLearningSchema(roles=roles[:n], config=plain))
    assert whole < 1024


def test_a_node_that_belongs_nowhere_says_so() -> None:
    node = VirtualNode(None, "client_0", "train", config())
    assert (node.id, node.role, node.fed_id, node.built) == ("client_0", "train", "face", False)
    assert repr(node) == "VirtualNode(client_0, train)"
    for act in (lambda: node.handle, lambda: node.call("ping"), node.build, lambda: node.build(0, None)):
        error = failure(RunError, act)
        assert (error.code, "client_0" in error.message, "FederatedBase" in error.hint) == ("F005", True, True)


def test_a_placement_group_of_ones_own_is_refused() -> None:
    base = FederatedBase(config())
    error = failure(RunError, lambda: base["client_1"].build(0, object()))
    assert (error.code, error.place) == ("F005", "placement_group")
    assert "resources={'num_cpus'" in error.hint
    error = failure(ConfigError, lambda: FederatedBase(config(), resources=object()))  # type: ignore[arg-type]
    assert (error.code, error.place) == ("C006", "resources")
    assert "placement group" in error.hint


def test_a_handle_of_a_shared_host_starts_calls_by_name() -> None:
    calls: list[Any] = []
    handle = NodeHandle("client_1", lambda *args, **kw: calls.append((args, kw)) or "ref")
    assert handle.greet.remote("you", loud=True) == "ref"
    assert calls == [(("greet", "you"), {"loud": True})]
    assert repr(handle) == "NodeHandle(client_1)"
    assert not hasattr(handle, "_private")


# ---------------------------------------------------------------- a federation as a mapping of its nodes


def test_a_federation_is_a_mapping_of_its_nodes_in_index_order() -> None:
    base = FederatedBase(config(number_of_clients=11))
    names = ["server", *(f"client_{i}" for i in range(11))]
    assert (len(base), base.num_nodes, list(base), base.node_ids, base.keys()) == (12, 12, names, names, names)
    assert "client_10" in base and "client_11" not in base and 3 not in base
    assert base.values() == [base[name] for name in names]
    assert base.items()[1] == ("client_0", base["client_0"])
    error = failure(RoutingError, lambda: base["client_11"])
    assert (error.code, error.message) == ("P012", "no node 'client_11'")
    assert error.allowed.startswith("server, client_0")


def test_nothing_is_opened_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FederatedBase, "open_fabric", None)
    base = FederatedBase(config())
    assert [node.built for node in base.nodes] == [False] * 5
    assert (base.run, base.running, base.resources, base.collect_federation_metrics()) == (None, False, {}, [])
    assert base.stop() is None and base.stop() is None
    assert failure(IcrfError, base.train).code == "L009"


def test_a_fabric_of_its_own_is_opened_once_and_closed_by_stop(monkeypatch: pytest.MonkeyPatch, fabric: Fabric) -> None:
    class Own(Fabric):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    opened: list[Own] = []

    def open_one() -> Fabric:
        opened.append(Own(fabric.port))
        return opened[-1]

    monkeypatch.setattr(FederatedBase, "open_fabric", staticmethod(open_one))
    with FederatedBase(config(federated_learning_rounds=1)) as base:
        base.allocate_resources()
        base.train(blocking=True)
    assert [one.closed for one in opened] == [1]


# ---------------------------------------------------------------- schemas


@pytest.mark.parametrize(
    ("schema", "kind", "topology", "ids"),
    [
        (StarFederatedLearningSchema, "TraditionalFederatedLearning", "star", ["server", "client_0", "client_1"]),
        (RingFederatedLearningSchema, "DecentralizedFederatedLearning", "ring", ["client_0", "client_1"]),
        (MeshFederatedLearningSchema, "DecentralizedFederatedLearning", "mesh", ["client_0", "client_1"]),
    ],
)
def test_a_schema_shapes_the_configuration(schema: Any, kind: str, topology: str, ids: list[str]) -> None:
    other = FederationConfig.from_mapping({**RING, "min_nodes": 9, "number_of_clients": 9})
    base = schema(client_template=Talker, roles=["train-eval", "train-test"], config=other)
    found = base.config
    assert (found.federated_learning_schema, found.federated_learning_topology) == (kind, topology)
    assert (found.number_of_clients, found.min_nodes) == (2, 2)
    assert base.node_ids == ids
    assert [n.role for n in base.nodes[-2:]] == ["train-eval", "train-test"]
    assert base["client_0"].template is Talker
    assert inspect.signature(schema).parameters["config"].default is None
    assert failure(ConfigError, lambda: schema(roles=["train"])).code == "C016"
    assert failure(ConfigError, lambda: schema(roles=[], config=other)).code == "C008"


def test_a_configuration_that_fits_is_left_alone() -> None:
    plain = config(number_of_clients=2, min_nodes=2)
    assert StarFederatedLearningSchema(roles=["train"] * 2, config=plain).config is plain


def test_a_star_may_learn_several_models() -> None:
    clustered = config(number_of_clients=2, number_of_models=2, federated_learning_schema="ClusterFederatedLearning")
    assert StarFederatedLearningSchema(roles=["train"] * 2, config=clustered).config is clustered
    base = schema_factory("ClusterFederatedLearning", "star")(config(number_of_models=2))
    assert (base.node_ids[0], base.config.num_models) == ("server", 2)


def test_resources_of_a_slot() -> None:
    assert FederatedBase(config()).config.resources == "uniform"
    found = FederatedBase(config(), resources={"num_cpus": 0.5}).config.resources
    assert not isinstance(found, str)
    assert (found.num_cpus, found.num_gpus) == (0.5, 0.0)
    error = failure(ConfigError, lambda: FederatedBase(config(), resources={"cpus": 1}))
    assert "resources" in str(error)


def test_the_factory_finds_executors_by_name() -> None:
    base = schema_factory("StarFederatedLearning", "star")(config())
    assert base.node_ids[0] == "server"
    base = schema_factory("DecentralizedFederatedLearning", "ring")(config())
    assert (base.node_ids[0], base.config.federated_learning_topology) == ("client_0", "ring")
    error = failure(ConfigError, lambda: schema_factory("TraditionalFederated", "star"))
    assert (error.code, "TraditionalFederatedLearning" in error.hint) == ("C010", True)


def test_a_schema_of_ones_own_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCHEMAS, "_objects", dict(SCHEMAS._objects))
    asked: list[Any] = []

    def executor(given: FederationConfig, **keywords: Any) -> FederatedBase:
        asked.append((given.federated_learning_topology, keywords))
        return FederatedBase(given)

    schema_factory.register("GossipLearning", executor)
    schema_factory.register("GossipLearning", executor)
    assert len(schema_factory("GossipLearning", "mesh")(config(), extra=1)) == 4
    assert asked == [("mesh", {"extra": 1})]
    assert failure(ConfigError, lambda: schema_factory.register("GossipLearning", lambda c: None)).code == "C008"  # type: ignore[arg-type,return-value]


def test_several_classes_for_one_kind_of_node_are_refused(fabric: Fabric) -> None:
    plain = FederationConfig.from_mapping({**RING, "number_of_clients": 2})
    nodes = [VirtualNode(Talker, "a", "train", plain), VirtualNode(Broken, "b", "train", plain)]
    error = failure(ConfigError, lambda: FederatedBase(plain, nodes=nodes, topology="mesh", fabric=fabric).train())
    assert (error.code, error.place) == ("C008", "client_template")
    assert "Broken, Talker" in error.message


def test_roles_that_no_federation_can_use(fabric: Fabric) -> None:
    for roles, code in ((["evaluate"], "C010"), (["eval"], "C008")):
        base = RingFederatedLearningSchema(roles=roles * 3, config=config(), fabric=fabric)
        assert failure(ConfigError, base.allocate_resources).code == code


def test_equal_shares_of_a_cluster() -> None:
    assert get_resources_split(4, num_cpus=2) == [{"CPU": 0.5}] * 4
    assert get_resources_split(2, "uniform", num_cpus=8, num_gpus=1) == [{"CPU": 1.0, "GPU": 0.5}] * 2
    assert failure(ConfigError, lambda: get_resources_split(2, "greedy", num_cpus=8)).code == "C010"
    for num_nodes, num_cpus in ((0, 2), (2, 0)):
        assert failure(ConfigError, lambda n=num_nodes, c=num_cpus: get_resources_split(n, num_cpus=c)).code == "C007"


# ---------------------------------------------------------------- training on demand


def test_training_returns_at_once_and_goes_on_when_asked(fabric: Fabric, gate: threading.Event) -> None:
    base = StarFederatedLearningSchema(client_template=Gated, roles=["train-eval"] * 3, config=config(), fabric=fabric)
    future = base.train()
    assert base.running and not future.done()
    more = base.train(rounds=1)
    gate.set()
    assert future.result(GATE_S).rounds_done >= 2
    info = more.result(GATE_S)
    assert (info.rounds_done, info.status, base.running) == (3, IDLE, False)
    assert base.train(blocking=True).result().rounds_done == 3
    assert base.train(blocking=True, rounds=2).result().rounds_done == 5
    assert [r.number for r in base.collect_federation_metrics()] == [1, 2, 3, 4, 5]
    result = base.result()
    assert result.model_sha256 == result.rounds[-1].model_sha256
    for act in (lambda: base.train(rounds=1), lambda: base["client_0"].call("ping"), base.test):
        assert failure(RunError, act).code == "F005"
    assert base.stop().status == base.stop().status == COMPLETED  # type: ignore[union-attr]


def test_testing_waits_for_the_training(fabric: Fabric, gate: threading.Event) -> None:
    base = StarFederatedLearningSchema(client_template=Gated, roles=["train-eval"] * 2, config=config(), fabric=fabric)
    found: list[Any] = []
    base.train()
    waiting = threading.Thread(target=lambda: found.append(base.test()))
    waiting.start()
    assert found == []
    gate.set()
    waiting.join(GATE_S)
    assert list(found[0]) == ["server"]
    last = base.collect_federation_metrics()[-1].metrics
    assert found[0]["server"]["accuracy"] == last["accuracy"]
    assert list(base.test("eval")) == ["client_0", "client_1"]
    base.stop()


def test_stopping_cancels_a_training_that_runs(fabric: Fabric, gate: threading.Event) -> None:
    base = StarFederatedLearningSchema(client_template=Gated, roles=["train"] * 2, config=config(), fabric=fabric)
    future = base.train()
    base.materialize_all()
    assert base.stop().status == CANCELLED  # type: ignore[union-attr]
    assert failure(RunError, lambda: future.result(GATE_S)).code == "F003"
    assert base.stop().status == CANCELLED  # type: ignore[union-attr]
    assert not base["client_0"].built


def test_what_a_node_raises_reaches_whoever_waits(fabric: Fabric) -> None:
    base = StarFederatedLearningSchema(client_template=Broken, roles=["train"] * 2, config=config(), fabric=fabric)
    future = base.train()
    error = failure(RunError, lambda: future.result(GATE_S))
    cause = error.__cause__
    line = inspect.getsourcelines(Broken.train)[1] + 2
    assert isinstance(cause, NodeError) and (error.code, cause.code) == ("F002", "U001")
    for part in ("client_0", "ValueError: no such luck", f"{__file__}:{line} in train"):
        assert part in str(error)
    assert failure(RunError, base.test).code == "F002"
    assert [r.number for r in base.collect_federation_metrics()] == [1]
    base.stop()


def test_asking_whether_a_node_is_built_activates_nothing(fabric: Fabric) -> None:
    base = RingFederatedLearningSchema(roles=["train-test"] * 4, config=config(), fabric=fabric)
    base.allocate_resources()
    assert base.run is not None and base.run.info().status == "RESERVED"
    assert not base["client_0"].built and not base["client_3"].built
    assert base.run.info().status == "RESERVED"
    base["client_0"].build(bundle_idx=2)
    assert base["client_3"].built
    assert repr(base["client_3"]) == "VirtualNode(client_3, train-test, built)"
    assert base.resources["all"]["CPU"] == sum(v["CPU"] for k, v in base.resources.items() if k != "all")
    # Handles stay inside a process; calls go anywhere.
    error = failure(RoutingError, lambda: base["client_3"].handle)
    cluster = base["client_3"].call("ping")["cluster"]
    assert (error.code, cluster in error.message, "call(" in error.hint) == ("P010", True, True)
    assert {base[name].call("ping")["cluster"] for name in base} == {"local-1", "local-2"}
    base.stop()


def test_a_graph_of_ones_own(fabric: Fabric) -> None:
    plain = FederationConfig.from_mapping({**RING, "number_of_clients": 3, "federated_learning_rounds": 1})
    nodes = [VirtualNode(None, name, "train-test", plain) for name in ("left", "middle", "right")]
    path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    with FederatedBase(plain, nodes=nodes, topology=path, fabric=fabric) as base:
        base.train(blocking=True)
        assert list(base.test()) == ["left", "middle", "right"]
    for wrong, code in ((np.zeros((2, 2)), "T010"), (np.diag([1, 0], 1) + np.diag([1, 0], -1), "T006")):
        error = failure(IcrfError, FederatedBase(plain, nodes=nodes, topology=wrong, fabric=fabric).train)
        assert (error.code, error.place) == (code, "adjacency")


# ---------------------------------------------------------------- messages and versions


@pytest.fixture(scope="module")
def ring(fabric: Fabric) -> Iterator[FederatedBase]:
    """Four nodes over two clusters after two rounds."""
    with RingFederatedLearningSchema(Talker, ["train-test"] * 4, config(), fabric=fabric) as base:
        base.train(blocking=True)
        yield base


def test_messages_follow_the_edges_and_the_order_of_the_nodes(ring: FederatedBase) -> None:
    # What was sent in round 2 is readable after its barrier, which the start of round 3 is.
    got = [(m["sender_id"], m["body"]["count"]) for m in ring["client_1"].call("sync")]
    assert got == [("client_0", 1), ("client_2", 1)]
    assert ring["client_1"].call("sync") == []
    error = failure(RoutingError, lambda: ring["client_0"].call("tell", "client_2"))
    assert (error.code, "client_0 -> client_2" in error.message) == ("P011", True)
    assert "client_1" in error.allowed and "client_3" in error.allowed
    assert failure(RoutingError, lambda: ring["client_0"].call("tell", "nobody")).code == "P012"


def test_the_supervisor_needs_no_edge(ring: FederatedBase) -> None:
    ring.send("stop early", {"after": 3}, to=["client_0", "client_3"])
    for name in ("client_0", "client_3"):
        message = next(m for m in ring[name].call("sync") if m["header"] == "stop early")
        assert (message["sender_id"], message["body"]) == ("supervisor", {"after": 3})
    ring.send("all", {})
    ring.send("one", {}, to="client_2")
    assert [m["header"] for m in ring["client_2"].call("sync") if m["sender_id"] == "supervisor"] == ["all", "one"]
    assert failure(RoutingError, lambda: ring.send("x", {}, to="nobody")).code == "P012"
    assert failure(ConfigError, lambda: ring.send("x", {"bad": object()})).code == "C006"


def test_waiting_for_a_message_on_a_shared_slot_is_refused() -> None:
    with InlineFabric(1) as inline:
        base = StarFederatedLearningSchema(roles=["train"] * 6, config=config(), fabric=Fabric(inline.port))
        assert base["client_0"].call("receive") is None
        error = failure(NodeError, lambda: base["client_0"].call("receive", True))
        assert (error.code, "slots as nodes" in error.hint) == ("U010", True)


def test_versions_of_a_node(ring: FederatedBase) -> None:
    pulled = ring.pull_version("client_1")
    assert list(pulled) == ["id", "version", "model", "timestamp"]
    assert (pulled["id"], pulled["version"]) == ("client_1", 2)
    assert {name: w.shape for name, w in pulled["model"].items()}["hidden.weight"] == (128, 64)
    assert ring["client_1"].call("update_version", best=0.5) == 3
    assert ring.pull_version("client_1")["model"] == {"best": 0.5}
    assert [v["version"] for v in ring.pull_version()] == [2, 3, 2, 2]
    assert [v["id"] for v in ring.pull_version(["client_3", "client_0"])] == ["client_3", "client_0"]
    assert failure(RoutingError, lambda: ring.pull_version("nobody")).code == "P012"


def test_methods_that_a_node_does_not_have(ring: FederatedBase) -> None:
    for method in ("nothing", "_saved", "id"):
        error = failure(RunError, lambda m=method: ring["client_0"].call(m))
        assert (error.code, error.place, error.value) == ("F005", "client_0", method)
