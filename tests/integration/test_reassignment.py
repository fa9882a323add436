"""Nodes that move while a run goes on: the bits are those of a run on one cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icrf.client import Fabric
from icrf.federation.message import Message
from icrf.federation.node import FederatedNode
from icrf.protocol import IDLE, RunInfo, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.clocks import MovedClock
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import follow, follow_until
from icrf.testing.waiting import until
from icrf_agent.mail import NO_MAIL, Mail
from icrf_agent.room import TopologyManager

ROUNDS = 6
BASE: dict[str, Any] = {
    "federation_id": "moving",
    "number_of_clients": 6,
    "federated_learning_rounds": ROUNDS,
    "evaluate_every": 3,
    "batch_size": 64,
    "checkpoint_every": 0,
}
STAR = {**BASE, "schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
PEERS = {**BASE, "schema": "DecentralizedFederatedLearning"}
RING = {**PEERS, "federated_learning_topology": "ring"}
MOMENTUM = {**RING, "momentum": 0.9, "keep_optimizer_state": True}
GROUPS = {"number_of_groups": 3, "global_every": 3}
HIERARCHY = {
    **BASE,
    **GROUPS,
    "schema": "HierarchicalFederatedLearning",
    "federated_learning_topology": "hierarchy",
}
DRIFT = {**STAR, "aggregation_strategy": "SCAFFOLD"}
ADAPTING = {
    **PEERS,
    "federated_learning_topology": "k_connected",
    "k_value": 2,
    "topology_adaptation_strategy": "random_rewire",
    "adaptation_share": 0.3,
}
OWN = {"client_template": "local:Node"}
FEDERATIONS = {
    "star": STAR,
    "star with states at nodes": DRIFT,
    "ring": RING,
    "ring with optimizer states": MOMENTUM,
    "hierarchy": HIERARCHY,
    "changing graph": ADAPTING,
    "own nodes in a star": {**STAR, **OWN},
    "own nodes in a ring": {**RING, **OWN},
    "own nodes in a hierarchy": {**HIERARCHY, **OWN},
}
EVERY_FEDERATION = pytest.mark.parametrize("name", list(FEDERATIONS))


Undisturbed = Callable[[str, int], list[str]]


class Talking(FederatedNode):
    """What it trains depends on what it has counted, and on letters that it reads long after they came."""

    def setup(self) -> None:
        self.state = {"rounds": 0, "heard": 0.0}

    def train(self, **kwargs: Any) -> dict[str, float]:
        number = self.state["rounds"] = int(self.state["rounds"]) + 1
        for to in self.neighbors:
            self.send("word", {"said": np.array([number * 10.0 + self.context.index])}, to=[to])
        if (number + self.context.index) % 3 == 0:
            for k, message in enumerate(self.sync()):
                self.state["heard"] = float(self.state["heard"]) + float(message.body["said"][0]) * (k + 1)
        first = next(self.model.parameters())
        first.data.add_(1e-4 * number + 1e-7 * float(self.state["heard"]))
        return {"loss": 0.0}


@dataclass
class Kept:
    """A run that goes on when it is told to."""

    fabric: InlineFabric
    clock: MovedClock
    run_id: str

    @property
    def info(self) -> RunInfo:
        return self.fabric.port.get(self.run_id)

    def go(self, rounds: int) -> None:
        self.fabric.port.advance(self.run_id, "run", rounds)
        follow_until(self.fabric, self.run_id, rounds)

    def homes(self) -> dict[str, str]:
        """Where nodes live now."""
        run = self.fabric.service._core._runs[self.run_id]
        return {node.id: run.cluster_of(k) for k, node in enumerate(run.submission.nodes)}

    def texts(self) -> list[str]:
        """What users have been told so far."""
        found = []
        for event in self.fabric.port.watch(self.run_id):
            found.append(event.text)
            if event.seq == len(self.fabric.service._core._runs[self.run_id].events):
                return found
        return found

    def hashes(self) -> list[str]:
        """End the run; the hash of every round and of the model."""
        self.fabric.port.finish(self.run_id)
        info, rounds = follow(self.fabric, self.run_id)
        assert (info.status, info.error_json) == ("COMPLETED", "")
        assert [r.number for r in rounds] == list(range(1, ROUNDS + 1))
        return [r.model_sha256 for r in rounds] + [info.model_sha256]


def submission(values: dict[str, Any], **more: Any) -> Submission:
    return build_submission(FederationConfig.from_mapping({**values, **more}), keep=True, stage="activate")


@contextmanager
def kept(values: dict[str, Any], clusters: int, **more: Any) -> Iterator[Kept]:
    """A run on so many clusters that waits to be told to go."""
    clock = MovedClock()
    with InlineFabric(clusters, templates={"local:Node": Talking}, clock=clock) as fabric:
        yield Kept(fabric, clock, fabric.port.submit(submission(values, **more)).run_id)


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    """The hashes of a run on one cluster that was stopped after a round: there groups are merged."""
    known: dict[tuple[str, int], list[str]] = {}

    def hashes(name: str, stop: int) -> list[str]:
        if (name, stop) not in known:
            with kept(FEDERATIONS[name], 1) as run:
                run.go(stop)
                run.go(ROUNDS)
                known[name, stop] = run.hashes()
        return known[name, stop]

    return hashes


# ---------------------------------------------------------------- by choice


@EVERY_FEDERATION
def test_a_new_cluster_gets_nodes_and_no_bit_changes(name: str, undisturbed: Undisturbed) -> None:
    with kept(FEDERATIONS[name], 2, clustering_period=3) as run:
        run.go(3)
        before = run.homes()
        run.fabric.start_agent("local-3")
        run.go(ROUNDS)
        after = run.homes()
        moved = [node for node in before if before[node] != after[node]]
        assert moved and {after[node] for node in moved} == {"local-3"}
        assert any(f"{len(moved)} of {len(before)} nodes move" in text for text in run.texts())
        assert run.hashes() == undisturbed(name, 3)


@EVERY_FEDERATION
def test_nodes_of_a_lost_cluster_go_to_the_others(name: str, undisturbed: Undisturbed) -> None:
    with kept(FEDERATIONS[name], 3, on_cluster_loss="reassign", checkpoint_every=2) as run:
        run.go(3)
        before = run.homes()
        lost = before["server"] if "server" in before else before["client_0"]
        run.fabric.stop_agent(lost)
        run.clock.ahead_s += 3.0
        run.go(ROUNDS)
        after = run.homes()
        assert lost not in after.values()
        assert {node for node in before if before[node] != after[node]} == {n for n in before if before[n] == lost}
        assert run.hashes() == undisturbed(name, 3)


def test_a_star_that_loses_clients_repeats_no_round(undisturbed: Undisturbed) -> None:
    with kept(STAR, 3, on_cluster_loss="reassign") as run:
        run.go(3)
        run.fabric.stop_agent(next(name for name in run.info.clusters if name != run.homes()["server"]))
        run.clock.ahead_s += 3.0
        run.go(ROUNDS)
        assert [row.row["round"] for row in run.fabric.store.rows("activations", (run.run_id,))] == [0, 3]
        assert run.hashes() == undisturbed("star", 3)


@pytest.mark.parametrize("every", [0, 1])
def test_what_nodes_are_told_between_rounds_is_heard_where_they_live_then(every: int) -> None:
    """Nodes move with it where the checkpoint has it; where that is older, they stay until there is another."""
    found = {}
    for clusters in (1, 2):
        with kept(FEDERATIONS["own nodes in a ring"], clusters, clustering_period=2, checkpoint_every=every) as run:
            run.go(2)
            word = Message("supervisor", "word", {"said": np.array([7.0])}).encode()
            run.fabric.port.send_message(run.run_id, ["client_0", "client_4"], word)
            homes = run.homes()
            if clusters == 2:
                run.fabric.start_agent("local-3")
            run.go(3)
            assert clusters == 1 or (run.homes() == homes) == bool(every)
            run.go(ROUNDS)
            assert clusters == 1 or run.homes() != homes
            found[clusters] = run.hashes()
    assert found[1] == found[2]


def test_letters_wait_where_their_nodes_go(monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed) -> None:
    """Without them the bits would be others, so the federation above is one that depends on them."""
    restore = TopologyManager.restore
    carried: list[int] = []

    def counted(room: TopologyManager, mail: Mail, here: Collection[int]) -> None:
        carried.append(len(mail.letters))
        restore(room, NO_MAIL if dropped else mail, here)

    monkeypatch.setattr(TopologyManager, "restore", counted)
    found = {}
    for dropped in (False, True):
        with kept(FEDERATIONS["own nodes in a ring"], 2, clustering_period=3) as run:
            run.go(3)
            run.fabric.start_agent("local-3")
            run.go(ROUNDS)
            found[dropped] = run.hashes()
    assert any(carried)
    assert found[False] == undisturbed("own nodes in a ring", 3) != found[True]


def test_nodes_follow_a_graph_that_changes(undisturbed: Undisturbed) -> None:
    """On three clusters, with no cluster coming or going: only because less crosses then."""
    with kept(FEDERATIONS["changing graph"], 3, clustering_period=1) as run:
        run.go(3)
        run.go(ROUNDS)
        moves = [text for text in run.texts() if "nodes move: " in text]
        assert moves
        assert run.hashes() == undisturbed("changing graph", 3)


@pytest.mark.parametrize("name", ["star", "own nodes in a ring"])
def test_a_cluster_that_comes_back_is_fenced_and_gets_nodes_again(name: str, undisturbed: Undisturbed) -> None:
    with kept(FEDERATIONS[name], 2, on_cluster_loss="reassign", clustering_period=1) as run:
        run.go(3)
        run.fabric.stop_agent("local-2")
        run.clock.ahead_s += 3.0
        until(lambda: "local-2" not in run.homes().values() and run.info.status == IDLE)
        run.fabric.start_agent("local-2")
        run.go(ROUNDS)
        assert "local-2" in run.homes().values()
        assert run.hashes() == undisturbed(name, 3)


def test_the_plan_of_a_run_is_the_one_in_force(tmp_path: Path) -> None:
    with InlineFabric(3) as fabric:
        config = FederationConfig.from_mapping({**ADAPTING, "clustering_period": 1})
        run = Fabric(fabric.port).submit(config)
        first = run.plan()
        run.save(tmp_path)
        found = json.loads((tmp_path / "plan.json").read_text())["assignment"]
        assert first is not None and first.assignment != found
        assert found == dict(zip(first.assignment, homes_in(fabric, run.id), strict=True))


def homes_in(fabric: InlineFabric, run_id: str) -> list[str]:
    """Where nodes lived last, out of the journal."""
    row = fabric.store.rows("assignments", (run_id,))[-1].row
    return [row["clusters"][k] for k in row["assignment"]]


def test_pinned_nodes_wait(undisturbed: Undisturbed) -> None:
    with kept(STAR, 2, on_cluster_loss="reassign", checkpoint_every=1, placement={"client_5": "local-2"}) as run:
        run.go(3)
        run.fabric.stop_agent("local-2")
        run.clock.ahead_s += 3.0
        until(lambda: "its nodes cannot move: " in run.info.waiting_for)
        assert "client_5" in run.info.waiting_for
        run.fabric.start_agent("local-2")
        run.go(ROUNDS)
        assert run.hashes() == undisturbed("star", 3)


@pytest.mark.parametrize("name", ["star with states at nodes", "own nodes in a ring"])
def test_a_mediator_that_is_restarted_after_a_move_goes_on(name: str, undisturbed: Undisturbed) -> None:
    with kept(FEDERATIONS[name], 2, clustering_period=1, checkpoint_every=2) as run:
        run.go(3)
        run.fabric.start_agent("local-3")
        run.go(4)
        assert "local-3" in run.homes().values()
        run.fabric.restart_mediator()
        until(lambda: run.info.status == IDLE)
        run.go(ROUNDS)
        with kept(FEDERATIONS[name], 1) as alone:
            for stop in (3, 4, ROUNDS):
                alone.go(stop)
            assert run.hashes() == alone.hashes()


@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("name", ["ring", "own nodes in a ring"])
def test_letters_survive_the_death_of_a_topology_manager(name: str, clusters: int, undisturbed: Undisturbed) -> None:
    with kept(FEDERATIONS[name], clusters, checkpoint_every=2) as run:
        run.go(3)
        run.fabric.substrates["local-1"].kill_manager()
        run.go(ROUNDS)
        generations = len(run.fabric.store.rows("assignments", (run.run_id,)))
        assert run.hashes() == undisturbed(name, 3)
    # Without letters there is nothing that only the manager had: the round is repeated.
    assert generations == (1 if name == "ring" else 2)
