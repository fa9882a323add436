"""Nodes as virtual actors: how many are active at once, and whether hosts die over it, changes no bit."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from icrf.client import Fabric
from icrf.errors import ConfigErrors, error_from_json
from icrf.federation.base import FederatedBase
from icrf.federation.node import FederatedNode
from icrf.learning.datasets import Dataset
from icrf.protocol import COMPLETED
from icrf.residency import MEGABYTE, host_budget, resident_nodes
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf_agent import residents
from icrf_agent.host_notes import HostNotes
from icrf_agent.inline_substrate import InlineReferences
from icrf_agent.residents import Admission

ROWS_PER_NODE = 16


def synthetic(num_nodes: int) -> Dataset:
    """Sixteen rows a node, drawn around a centre per class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, num_nodes * ROWS_PER_NODE + 100)
    centres = rng.standard_normal((10, 64)).astype(np.float32)
    features = centres[labels] + rng.standard_normal((len(labels), 64), dtype=np.float32)
    return Dataset(features[100:], labels[100:], features[:100], labels[:100], 10, "synthetic")


def three_hundred() -> Dataset:
    return synthetic(300)


def ten_thousand() -> Dataset:
    return synthetic(10_000)


def ring(num_nodes: int, dataset: Callable[[], Dataset], **keys: Any) -> dict[str, Any]:
    return {
        "federation_id": "virtual",
        "federated_learning_schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "number_of_clients": num_nodes,
        "federated_learning_rounds": 3,
        "evaluate_every": 3,
        "model_type": "logistic",
        "dataset_type": f"{__name__}:{dataset.__name__}",
        "momentum": 0.9,
        "keep_optimizer_state": True,
        **keys,
    }


RING = ring(300, three_hundred)
STAR = {
    **RING,
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "keep_optimizer_state": False,
    "momentum": 0.0,
    "number_of_clients": 60,
    "client_fraction": 0.5,
    "aggregation_strategy": "SCAFFOLD",
}


def hashes(
    keys: dict[str, Any],
    clusters: int = 1,
    template: type | None = None,
    watch: Callable[[InlineFabric, str, int], None] | None = None,
    warnings: list[str] | None = None,
) -> list[str]:
    """The hashes of all rounds; `watch` is told of every event with the number of rounds that are done."""
    templates = {"local:Node": template} if template else None
    with InlineFabric(clusters, templates=templates) as fabric:
        config = FederationConfig.from_mapping({**keys, **({"client_template": "local:Node"} if template else {})})
        run = fabric.port.submit(build_submission(config))
        found = {}
        for event in fabric.port.watch(run.run_id):
            if event.kind == "warning" and warnings is not None:
                warnings.append(event.text)
            if event.round:
                found[event.round.number] = event.round.model_sha256
                if watch:
                    watch(fabric, run.run_id, event.round.number)
        info = fabric.port.get(run.run_id)
    assert (info.status, info.error_json) == (COMPLETED, "")
    return [*found.values(), info.model_sha256]


@pytest.fixture(scope="module")
def all_active() -> list[str]:
    return hashes(RING)


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_a_few_active_nodes_make_the_bits_of_all_at_once(all_active: list[str], clusters: int) -> None:
    assert hashes({**RING, "resident_nodes": 16}, clusters) == all_active


def test_the_state_of_the_optimizer_is_kept_and_part_of_a_nodes_identity(all_active: list[str]) -> None:
    fresh = hashes({**RING, "keep_optimizer_state": False})
    assert not set(fresh) & set(all_active)


@pytest.mark.parametrize("keys", [STAR, {**RING, "optimizer": "RMSprop"}], ids=["star", "RMSprop"])
def test_where_the_state_of_the_optimizer_cannot_be_kept_that_is_said(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigErrors, match=r"C012 .*keep_optimizer_state"):
        FederationConfig.from_mapping({**keys, "keep_optimizer_state": True})


@pytest.mark.parametrize("optimizer", [{"optimizer": "Adam", "momentum": 0.0}, {"private_keys": ["*bias"]}])
def test_moments_and_private_tensors_of_passive_nodes_are_kept(optimizer: dict[str, Any]) -> None:
    keys = {**RING, "number_of_clients": 20, **optimizer}
    assert hashes({**keys, "resident_nodes": 2}, 2) == hashes(keys)


def test_nodes_that_train_together_need_not_be_active_together() -> None:
    keys = {**RING, "number_of_clients": 20, "vectorize": 4}
    assert hashes({**keys, "resident_nodes": 2}, 2) == hashes(keys)


def test_what_clients_of_a_server_keep_may_lie_on_disk() -> None:
    assert hashes({**STAR, "resident_nodes": 3}, 2) == hashes(STAR)


@pytest.mark.parametrize("keys", [RING, {**RING, "resident_nodes": 16}], ids=["all", "16"])
def test_a_host_killed_in_the_middle_of_a_round_changes_no_bit(all_active: list[str], keys: dict[str, Any]) -> None:
    killed = []

    class Victim(FederatedNode):
        """In round 2 the host that the last node shares is killed while it trains."""

        def train(self, **kwargs: Any) -> dict[str, float]:
            if self.round == 2 and self.context.index == 250 and not killed:
                killed.append(here[0])
                here[0].substrates["local-1"].kill_host(here[1], 1)
            return super().train(**kwargs)

    here: list[Any] = []

    def remember(fabric: InlineFabric, run_id: str, done: int) -> None:
        here[:] = [fabric, run_id]

    assert hashes(keys, 1, Victim, remember) == all_active and killed


class Gossiping(FederatedNode):
    """Its training depends on its own state, on letters that it reads one at a time, and on what `setup` has drawn."""

    def setup(self) -> None:
        self.state = {"rounds": 0, "heard": 0.0}
        self.offset = float(np.random.default_rng(self.context.index).random())

    def train(self, **kwargs: Any) -> dict[str, float]:
        letter = self.receive()
        self.state["rounds"] += 1
        self.state["heard"] += letter.body["value"] if letter else 0.5
        self.send("value", {"value": self.offset + self.state["rounds"]})
        next(self.model.parameters()).data.add_(1e-3 * self.state["heard"])
        self.update_version(heard=self.state["heard"])
        return {"loss": 0.0}


@pytest.mark.parametrize("clusters", [1, 2])
def test_states_letters_and_versions_of_passive_nodes_are_kept(clusters: int) -> None:
    keys = {**RING, "number_of_clients": 12, "federated_learning_rounds": 5, "checkpoint_every": 2}
    assert hashes({**keys, "resident_nodes": 1}, clusters, Gossiping) == hashes(keys, 1, Gossiping)


def restart_agents(fabric: InlineFabric, _: str, done: int) -> None:
    if done == 3:
        for name in list(fabric.agents):
            fabric.stop_agent(name)
            fabric.start_agent(name)


class Remembering(Gossiping):
    """The same without letters, which are in no checkpoint."""

    def receive(self, block: bool = False, timeout: float | None = None) -> None:
        return None


def test_passive_nodes_come_back_from_a_checkpoint() -> None:
    keys = {**RING, "number_of_clients": 12, "federated_learning_rounds": 5, "checkpoint_every": 2}
    few = {**keys, "resident_nodes": 2}
    assert hashes(few, 2, Remembering, restart_agents) == hashes(keys, 1, Remembering)


# ---------------------------------------------------------------- who is active


class Counted(FederatedNode):
    """Notes which nodes are made, and how many there are at a time."""

    living: ClassVar[weakref.WeakSet[Counted]] = weakref.WeakSet()
    made: ClassVar[Counter[str]] = Counter()
    most = 0

    def setup(self) -> None:
        self.living.add(self)
        self.made[self.id] += 1
        type(self).most = max(self.most, len(self.living))

    def whoami(self) -> str:
        return self.id


@pytest.fixture
def counted() -> type[Counted]:
    Counted.living.clear()
    Counted.made.clear()
    Counted.most = 0
    return Counted


def test_no_more_nodes_are_active_than_may_be(counted: type[Counted]) -> None:
    hashes({**RING, "number_of_clients": 40, "resident_nodes": 4}, 1, counted)
    # One more while the next one is made; two hosts.
    assert counted.most <= 2 * 4 + 1


def test_the_least_recently_used_node_makes_room_first() -> None:
    log: list[tuple[str, int]] = []

    def make(index: int) -> Any:
        log.append(("in", index))
        return index

    kept = residents.Residents(make, lambda node: log.append(("out", cast(int, node))))
    kept.limit = 2
    for index in (1, 2, 1, 3, 1, 2):
        kept.get(index)
    assert log == [("in", 1), ("in", 2), ("out", 2), ("in", 3), ("out", 3), ("in", 2)]
    assert list(kept.active) == [1, 2]


def test_nodes_that_do_not_take_part_are_not_made_active(counted: type[Counted]) -> None:
    keys = {**STAR, "sampled_clients": 1, "client_fraction": 1.0, "federated_learning_rounds": 1, "resident_nodes": 1}
    hashes({**keys, "aggregation_strategy": "FedAvg"}, 1, counted)
    # All once when they are set up, then the one of the round.
    assert sum(counted.made.values()) <= keys["number_of_clients"] + 1


def test_a_passive_node_answers_calls(counted: type[Counted]) -> None:
    values = {**RING, "number_of_clients": 10, "resident_nodes": 2, "client_template": "local:Node"}
    with InlineFabric(2, templates={"local:Node": counted}) as fabric:
        base = FederatedBase(FederationConfig.from_mapping(values), fabric=Fabric(fabric.port))
        base.train(rounds=1, blocking=True)
        assert [base[f"client_{k}"].call("whoami") for k in range(10)] == [f"client_{k}" for k in range(10)]
        assert base["client_3"].call("pull_version")["version"] == 1
        base.stop()


def test_references_are_freed_with_their_round(monkeypatch: pytest.MonkeyPatch) -> None:
    most = {}
    for rounds in (5, 60):
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        counts = []
        put = InlineReferences.put

        def counting(
            self: InlineReferences, array: Any, kind: str, put: Any = put, alive: Any = alive, counts: Any = counts
        ) -> Any:
            kept = put(self, array, kind).view(_Referable)
            alive.add(kept)
            counts.append(len(alive))
            return kept

        with monkeypatch.context() as patched:
            patched.setattr(InlineReferences, "put", counting)
            hashes({**RING, "number_of_clients": 6, "federated_learning_rounds": rounds})
        most[rounds] = max(counts)
    assert most[60] == most[5]


class _Referable(np.ndarray):
    """An array that can be a member of a weak set."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        return self is other


# ---------------------------------------------------------------- admission


def admission(notes: HostNotes, num_nodes: int = 100, **keys: Any) -> Admission:
    config = FederationConfig.from_mapping({**RING, **keys})
    return Admission(config, num_nodes, 1, 100_000, notes)


def test_nodes_are_admitted_until_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [0]
    monkeypatch.setattr(residents, "resident_bytes", lambda: taken[0])
    measured = admission(HostNotes(""), resident_memory_mb=10)
    assert measured.limit(10) is None
    taken[0] = 9 * MEGABYTE
    assert measured.limit(9) is None and measured.limit(10) == 10


def test_all_are_active_where_all_fit() -> None:
    assert admission(HostNotes(""), num_nodes=4, resident_memory_mb=10_000).limit(4) is None


@pytest.mark.parametrize(("megabytes", "expected"), [(8, 40), (10_000, None)])
def test_a_host_that_may_have_died_of_its_nodes_comes_back_with_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int, expected: int | None
) -> None:
    monkeypatch.setattr(residents, "resident_bytes", lambda: 0)
    prefix = str(tmp_path / "host-0")
    first = HostNotes(prefix)
    assert first.earlier_residents == (0, 0)
    admission(first, resident_memory_mb=megabytes).note(80)
    second = admission(HostNotes(prefix), resident_memory_mb=megabytes)
    assert next((n for n in range(1, 80) if second.limit(n) is not None), None) == expected


@pytest.mark.parametrize(
    "keys", [{**RING, "number_of_clients": 40}, {**STAR, "client_fraction": 1.0}], ids=["ring", "star"]
)
def test_hosts_under_which_memory_ran_out_come_back_smaller_with_the_same_bits(keys: dict[str, Any]) -> None:
    """Four deaths in one round: more than a host has that dies of its nodes' own code."""
    here: list[Any] = []
    killed: list[int] = []
    told: list[str] = []
    last, mine = (39, 20) if keys["number_of_clients"] == 40 else (60, 30)

    class Hungry(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            if self.round == 2 and self.context.index == last and len(killed) < 4:
                killed.append(self.context.index)
                here[0].substrates["local-1"].kill_host(here[1], 1, starved=True)
            return super().train(**kwargs)

    def remember(fabric: InlineFabric, run_id: str, done: int) -> None:
        here[:] = [fabric, run_id]

    assert hashes(keys, 1, Hungry, remember, told) == hashes(keys)
    lines = [text for text in told if "R006" in text]
    wanted = [mine, mine // 2, mine // 4, mine // 8]
    assert [int(line.split("memory ran out with ")[1].split()[0]) for line in lines] == wanted
    assert lines[-1].startswith("local-1: R006 host-1 was killed in round 2")
    assert f"at most {mine // 16} active" in lines[-1]


def test_a_host_with_one_node_has_nothing_left_to_give_up() -> None:
    here: list[Any] = []

    class Hungry(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            if self.round == 2:
                here[0].substrates["local-1"].kill_host(here[1], 1, starved=True)
            return super().train(**kwargs)

    with InlineFabric(1, templates={"local:Node": Hungry}) as fabric:
        config = FederationConfig.from_mapping({**RING, "number_of_clients": 4, "client_template": "local:Node"})
        run = fabric.port.submit(build_submission(config))
        here[:] = [fabric, run.run_id]
        list(fabric.port.watch(run.run_id))
        error = error_from_json(fabric.port.get(run.run_id).error_json)
    assert error.code == "U004" and "died 3 times in round 2: out of memory" in error.message


def test_a_share_of_what_is_free_is_the_budget() -> None:
    assert host_budget(None, 1000, 2) == 250
    assert host_budget(3, 1000, 2) == 3 * MEGABYTE
    assert host_budget(None, None, 2) > 1 << 60
    assert resident_nodes(None, 100, 10, 250) == 25
    assert resident_nodes(8, 100, 10, 250) == 8
    assert resident_nodes(None, 100, 1000, 250) == 1


# ---------------------------------------------------------------- scale


@pytest.mark.slow
def test_ten_thousand_stateful_nodes_on_two_slots() -> None:
    keys = ring(10_000, ten_thousand, model_type="mlp", resident_nodes=64)
    killed = []

    def kill(fabric: InlineFabric, run_id: str, done: int) -> None:
        if done == 1 and not killed:
            killed.append(done)
            fabric.substrates["local-1"].kill_host(run_id, 1)

    assert hashes(keys, 1, None, kill) == hashes(keys) and killed
