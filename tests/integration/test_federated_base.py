"""``FederatedBase`` and its schemas on a real Ray cluster: the whole public face, on one fabric that all tests share.

A federation takes every slot of the cluster, so each class of tests has one and stops it before the next begins.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

import icrf
from icrf import (
    FederatedBase,
    FederatedNode,
    FederationConfig,
    MeshFederatedLearningSchema,
    RingFederatedLearningSchema,
    StarFederatedLearningSchema,
    VirtualNode,
    schema_factory,
)
from icrf.errors import ConfigError, IcrfError, NodeError, RoutingError, RunError
from icrf.federation.resources import get_resources_split
from icrf.federation.schemas import SCHEMAS
from icrf.federation.virtual_node import NodeHandle
from icrf.protocol import CANCELLED, COMPLETED, READY, RESERVED
from icrf.testing.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

WAIT_S = 60.0


def config(federation: str, **values: Any) -> FederationConfig:
    return FederationConfig.from_mapping(
        {
            "federation_id": federation,
            "schema": "StarFederatedLearning",
            "federated_learning_topology": "star",
            "federated_learning_rounds": 3,
            "learning_rate": 0.2,
            "momentum": 0.9,
            **values,
        }
    )


class Greeter(FederatedNode):
    """A plain template: counts its rounds, tells its neighbours, answers calls."""

    def build(self, **kwargs: Any) -> None:
        self.count = 0

    def train(self, **kwargs: Any) -> dict[str, float]:
        self.count += 1
        self.send("trained", {"count": self.count})
        return super().train(**kwargs)

    def greet(self, name: str, *, mark: str = "!") -> str:
        return f"{self.id} greets {name}{mark}"

    def tell(self, to: str, text: str) -> int:
        return self.send("told", {"text": text}, to=to)

    def read(self) -> list[tuple[str, str]]:
        return [(message.sender_id, message.header) for message in self.sync()]

    def wait_for_one(self) -> str:
        message = self.receive(block=True, timeout=WAIT_S)
        assert message is not None
        return message.header


@ray.remote
class RemoteGreeter(Greeter):
    """The same decorated as an actor, as the seeds write it."""


class Slow(FederatedNode):
    """Never done: says in a file that it has begun, and waits."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        Path(self.config.data_dir or "", "begun").touch()
        threading.Event().wait()
        return {}


class Broken(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        raise ValueError("no such luck")


@pytest.fixture(scope="module")
def fabric() -> Iterator[icrf.Fabric]:
    with icrf.connect() as opened:
        yield opened
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def slots(fabric: icrf.Fabric) -> int:
    """How many hosts the cluster takes."""
    (cluster,) = fabric.clusters()
    return cluster.capacity.num_slots


def refused(kind: type[IcrfError], act: Any) -> IcrfError:
    with pytest.raises(kind) as caught:
        act()
    return caught.value


@pytest.fixture(scope="class")
def star(fabric: icrf.Fabric, slots: int) -> Iterator[FederatedBase]:
    roles = ["train-eval", *["train-eval-test"] * slots]
    base = StarFederatedLearningSchema(client_template=Greeter, roles=roles, config=config("star"), fabric=fabric)
    yield base
    assert base.stop().status == COMPLETED  # type: ignore[union-attr]
    assert base.stop().status == COMPLETED  # type: ignore[union-attr]


@pytest.fixture(scope="class")
def mesh(fabric: icrf.Fabric, slots: int) -> Iterator[FederatedBase]:
    assert slots >= 2
    plain = config("mesh", federated_learning_rounds=2)
    with MeshFederatedLearningSchema(RemoteGreeter, ["train-test"] * 2, plain, fabric=fabric) as base:
        yield base


class TestStar:
    """More nodes than slots: nodes share hosts."""

    def test_its_life_until_it_is_ready(self, star: FederatedBase, slots: int) -> None:
        assert len(star) == slots + 2
        assert list(star)[:2] == ["server", "client_0"]
        assert "client_1" in star and "client_x" not in star
        assert refused(RoutingError, lambda: star["client_x"]).code == "P012"
        assert star["client_1"].role == "train-eval-test"
        assert not star["client_1"].built
        star.allocate_resources()
        assert star.run is not None and star.run.info().status == RESERVED
        assert star.resources["all"] == {"CPU": slots, "GPU": 0.0}
        assert not star["client_1"].built
        assert star.run.info().status == RESERVED
        star.materialize_all()
        assert star["client_1"].built and star["server"].built
        assert star.run.info().status == READY

    def test_a_handle_has_the_methods_of_the_node(self, star: FederatedBase) -> None:
        handle = star["client_1"].handle
        assert isinstance(handle, NodeHandle)
        assert ray.get(handle.greet.remote("you", mark="?")) == "client_1 greets you?"
        assert star["client_1"].call("greet", "you") == "client_1 greets you!"
        assert ray.get(star["server"].handle.ping.remote())["cluster"] == "local-1"

    def test_training_returns_a_future_at_once(self, star: FederatedBase) -> None:
        future = star.train(blocking=False)
        assert not future.done() and star.running
        assert star.test()["server"]["accuracy"] > 0.8  # waits for the training
        assert future.done() and future.result().rounds_done == 3
        assert star.train(rounds=1).result(WAIT_S).rounds_done == 4
        assert [r.number for r in star.collect_federation_metrics()] == [1, 2, 3, 4]

    def test_messages_follow_the_edges(self, star: FederatedBase) -> None:
        clients = [n for n in star if n != "server"]
        # Of the rounds whose barrier has passed: all but the last, which opens with the next round.
        got = [(message["sender_id"], message["body"]["count"]) for message in star["server"].call("sync")]
        assert got == [(name, count) for name in clients for count in (1, 2, 3)]
        error = refused(RoutingError, lambda: star["client_0"].call("tell", "client_1", "psst"))
        assert (error.code, "client_0 -> client_1" in error.message, error.allowed) == ("P011", True, "server")
        star.send("hello", {"from": "outside"}, to="client_0")
        message = star["client_0"].call("receive")
        assert (message["header"], message["sender_id"], message["body"]) == (
            "hello",
            "supervisor",
            {"from": "outside"},
        )
        assert star["client_0"].call("receive") is None
        assert star["client_0"].call("sync") == []
        error = refused(NodeError, lambda: star["client_0"].call("receive", True))
        assert error.code == "U010"

    def test_versions(self, star: FederatedBase) -> None:
        (pulled,) = star.pull_version(["client_0"])
        assert list(pulled) == ["id", "version", "model", "timestamp"]
        assert (pulled["id"], pulled["version"]) == ("client_0", 4)
        assert pulled["model"]["output.bias"].shape == (10,)
        assert star["client_0"].call("update_version", epoch=7) == 5
        assert star.pull_version("client_0")["model"] == {"epoch": 7}

    def test_a_placement_group_of_ones_own_is_refused(self, star: FederatedBase) -> None:
        assert refused(RunError, lambda: star["client_0"].build(0, object())).code == "F005"


class TestMesh:
    """As many slots as nodes: each node has an actor of its own."""

    def test_a_handle_is_the_nodes_own_actor(self, mesh: FederatedBase) -> None:
        handle = mesh["client_1"].handle  # activates
        assert mesh["client_0"].built
        assert isinstance(handle, ActorHandle)
        assert ray.get(handle.greet.remote("you")) == "client_1 greets you!"
        assert mesh.run is not None
        named = ray.get_actor("mesh/client_1", namespace=mesh.run.id)
        assert named == handle
        pids = {ray.get(mesh[name].handle.ping.remote())["pid"] for name in mesh}
        assert len(pids) == 2

    def test_a_node_alone_may_wait_for_a_message(self, mesh: FederatedBase) -> None:
        waiting = mesh["client_0"].handle.wait_for_one.remote()
        mesh.send("go", {}, to="client_0")
        assert ray.get(waiting, timeout=WAIT_S) == "go"

    def test_everyone_tests_its_own_model(self, mesh: FederatedBase) -> None:
        assert mesh.train(blocking=True).result().rounds_done == 2
        assert list(mesh.test()) == ["client_0", "client_1"]
        assert mesh["client_0"].call("read") == [("client_1", "trained")]
        result = mesh.result()
        assert result.metrics["accuracy"] > 0.8


class TestEnds:
    """How federations end, and that the next one can start."""

    def test_stopping_cancels_a_training_that_runs(self, fabric: icrf.Fabric, tmp_path: Path) -> None:
        plain = config("slow", data_dir=str(tmp_path))
        base = RingFederatedLearningSchema(Slow, ["train"] * 3, plain, fabric=fabric)
        future = base.train()
        until((tmp_path / "begun").exists, WAIT_S)
        assert base.running
        assert base.stop().status == CANCELLED  # type: ignore[union-attr]
        assert refused(RunError, lambda: future.result(WAIT_S)).code == "F003"
        assert base.stop().status == CANCELLED  # type: ignore[union-attr]

    def test_what_a_node_raises_names_node_file_and_line(self, fabric: icrf.Fabric) -> None:
        base = StarFederatedLearningSchema(
            client_template=Broken, roles=["train"] * 2, config=config("b"), fabric=fabric
        )
        error = refused(RunError, lambda: base.train().result(WAIT_S))
        line = inspect.getsourcelines(Broken.train)[1] + 1
        # Both clients raise; the first to be heard ends the round.
        assert re.search(r"U001 client_[01] on local-1", str(error))
        for part in ("ValueError: no such luck", f"{__file__}:{line} in train"):
            assert part in str(error)
        assert isinstance(error.__cause__, NodeError)
        base.stop()

    def test_more_than_the_cluster_has(self, fabric: icrf.Fabric) -> None:
        base = RingFederatedLearningSchema(
            roles=["train"] * 3, config=config("huge"), resources={"num_cpus": 512}, fabric=fabric
        )
        error = refused(IcrfError, base.allocate_resources)
        assert "R001" in str(error) and "512 CPU" in str(error)
        base.stop()

    def test_the_factory_and_a_schema_of_ones_own(self, fabric: icrf.Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SCHEMAS, "_objects", dict(SCHEMAS._objects))

        def pairs(given: FederationConfig, **keywords: Any) -> FederatedBase:
            nodes = [VirtualNode(None, name, "train-test", given) for name in ("left", "right")]
            return FederatedBase(given, nodes=nodes, topology="mesh", **keywords)

        schema_factory.register("Pair", pairs)
        given = config("pair", schema="DecentralizedFederatedLearning", federated_learning_topology="mesh")
        assert len(schema_factory("DecentralizedFederatedLearning", "ring")(given)) == 10
        with pytest.raises(ConfigError, match="C010"):
            schema_factory("Pairs", "mesh")
        with SCHEMAS.get("Pair")(given, fabric=fabric) as base:
            base.train(rounds=1, blocking=True)
            assert list(base.test()) == ["left", "right"]


def test_equal_shares_of_the_cluster(slots: int) -> None:
    shares = get_resources_split(slots, num_cpus=float(slots))
    assert shares == [{"CPU": 1.0}] * slots
