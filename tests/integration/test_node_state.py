"""Durable state of nodes, overridden hooks and global randomness: the same on any placement, and after any fault."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from icrf.client import Fabric
from icrf.errors import IcrfError, error_from_json
from icrf.federation.base import FederatedBase
from icrf.federation.node import FederatedNode
from icrf.protocol import RoundResult, RunInfo, StartRound
from icrf.spec import FederationConfig
from icrf.testing.inline import InlineFabric
from icrf_agent.node_state import NodeStates

RING: dict[str, Any] = {
    "federation_id": "stateful",
    "federated_learning_schema": "DecentralizedFederatedLearning",
    "federated_learning_topology": "ring",
    "number_of_clients": 4,
    "federated_learning_rounds": 5,
    "evaluate_every": 5,
    "checkpoint_every": 2,
    "client_template": "local:Node",
}
STAR = {
    **RING,
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
}
HIERARCHY = {
    **RING,
    "federated_learning_schema": "HierarchicalFederatedLearning",
    "federated_learning_topology": "hierarchy",
}
FLOWS = pytest.mark.parametrize("values", [STAR, RING, HIERARCHY], ids=["star", "ring", "hierarchy"])


class Counting(FederatedNode):
    """Adds to the model what its state has counted: bits depend on the state of every round before."""

    def setup(self) -> None:
        self.state = {"rounds": 0, "trace": np.zeros(3)}

    def train(self, **kwargs: Any) -> dict[str, float]:
        self.state["rounds"] += 1
        self.state["trace"] += self.context.index
        first = next(self.model.parameters())
        first.data.add_(1e-3 * self.state["rounds"] + 1e-5 * float(self.state["trace"].sum()))
        return {"loss": 0.0, "rounds": float(self.state["rounds"])}

    def counted(self) -> int:
        return int(self.state["rounds"])

    def spoil(self) -> None:
        self.state["rounds"] = 1000


Midway = Callable[[InlineFabric, str], None]


def outcome(
    values: dict[str, Any], template: type, clusters: int = 1, midway: dict[int, Midway] | None = None
) -> tuple[RunInfo, list[RoundResult]]:
    """Run to the end; `midway` is what to do when a round has committed."""
    with InlineFabric(clusters, templates={"local:Node": template}) as inline:
        run = Fabric(inline.port).submit(FederationConfig.from_mapping(values))
        rounds = {}
        for result in run.rounds():
            if result.number not in rounds and midway and result.number in midway:
                midway[result.number](inline, run.id)
            rounds[result.number] = result
        return run.info(), list(rounds.values())


def hashes(found: tuple[RunInfo, list[RoundResult]]) -> list[str]:
    info, rounds = found
    assert (info.status, info.error_json) == ("COMPLETED", "")
    return [r.model_sha256 for r in rounds] + [info.model_sha256]


@FLOWS
def test_states_are_the_same_on_one_two_and_three_clusters(values: dict[str, Any]) -> None:
    found = {n: outcome(values, Counting, n) for n in (1, 2, 3)}
    assert hashes(found[1]) == hashes(found[2]) == hashes(found[3])
    assert found[2][1][-1].metrics["train_rounds"] == 5.0


@FLOWS
@pytest.mark.parametrize("host", [0, 1], ids=["first-host", "second-host"])
@pytest.mark.parametrize("cluster", ["local-1", "local-2"])
def test_states_survive_the_death_of_a_host(values: dict[str, Any], cluster: str, host: int) -> None:
    def kill(inline: InlineFabric, run_id: str) -> None:
        killed = inline.agents[cluster]._runtime._run(run_id).hosts[host]  # type: ignore[attr-defined]
        killed.process.kill()

    with_fault = outcome(values, Counting, 2, {3: kill})
    assert hashes(with_fault) == hashes(outcome(values, Counting, 2))


class Interrupted(Counting):
    """Its third training fails once with an error that asks for another attempt, after the state was changed."""

    failed = False

    def train(self, **kwargs: Any) -> dict[str, float]:
        found = super().train(**kwargs)
        if self.round == 3 and self.context.index == 2 and not Interrupted.failed:
            Interrupted.failed = True
            next(self.model.parameters()).data.mul_(1e6)  # leaves the grid: the round runs again with a coarser one
        return found


def test_a_repeated_round_finds_the_committed_state() -> None:
    Interrupted.failed = False
    info, rounds = outcome(STAR, Interrupted, 2)
    assert [r.attempt for r in rounds] == [1, 1, 2, 1, 1] and Interrupted.failed
    assert info.status == "COMPLETED"
    assert [r.metrics["train_rounds"] for r in rounds] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_what_is_changed_between_rounds_does_not_last() -> None:
    kept = {**RING, "federated_learning_rounds": 2}
    with InlineFabric(2, templates={"local:Node": Counting}) as inline:
        base = FederatedBase(FederationConfig.from_mapping(kept), fabric=Fabric(inline.port))
        base.train(rounds=2, blocking=True)
        base["client_1"].call("spoil")
        base.train(rounds=1, blocking=True)
        assert base["client_1"].call("counted") == 3
        base.stop()


def test_the_state_hash_of_a_peer_covers_its_state() -> None:
    class Elsewhere(Counting):
        def train(self, **kwargs: Any) -> dict[str, float]:
            found = super().train(**kwargs)
            self.state["unused"] = "a word that moves no weight"
            return found

    plain, worded = outcome(RING, Counting), outcome(RING, Elsewhere)
    assert plain[0].model_sha256 == worded[0].model_sha256  # the consensus model is of weights alone
    assert plain[1][0].model_sha256 != worded[1][0].model_sha256


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"x": object()}, "state['x']: values of type builtins.object"),
        ([1, 2], "client_0.state is list"),
        ({"x": np.zeros(3 << 20)}, "the state of client_0 is too large"),
    ],
)
def test_a_state_that_cannot_be_kept_ends_the_run_with_its_node(state: Any, says: str) -> None:
    class Wrong(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            self.state = state
            return {}

    info, _ = outcome(RING, Wrong)
    error: IcrfError = error_from_json(info.error_json)
    assert error.code == "U002" and says in error.message
    assert error.place == "client_0 on local-1, state"


class Drawing(FederatedNode):
    """Draws from all global generators, in the set-up and in every training."""

    def setup(self) -> None:
        self.state["drawn"] = random.random() + float(torch.rand(())) + float(np.random.rand())

    def train(self, **kwargs: Any) -> dict[str, float]:
        step = self.state["drawn"] + random.random() + float(torch.rand(())) + float(np.random.rand())
        next(self.model.parameters()).data.add_(1e-3 * step)
        return {"step": step, **super().train(**kwargs)}


@FLOWS
def test_the_global_generators_give_a_node_the_same_everywhere(values: dict[str, Any]) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    state = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy(), torch.get_rng_state()
    one = outcome({**values, "evaluate_every": 1}, Drawing, 1)
    assert random.getstate() == state[0]
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], state[1])
    assert torch.equal(torch.get_rng_state(), state[2])
    random.seed(2)
    two = outcome({**values, "evaluate_every": 1}, Drawing, 2)
    assert hashes(one) == hashes(two)
    reported = [found for result in one[1] for found in result.node_metrics.values()]
    steps = [found["train_step"] for found in reported if "train_step" in found]
    assert len(set(steps)) == len(steps) == 20
    assert hashes(outcome({**values, "evaluate_every": 1, "seed": 1}, Drawing)) != hashes(one)


class Reading(FederatedNode):
    """Takes its messages in `sync`, which the host calls."""

    def sync(self) -> list[Any]:
        found = super().sync()
        self.state["heard"] = self.state.get("heard", 0) + len(found)
        return found

    def train(self, **kwargs: Any) -> dict[str, float]:
        self.send("hello", {"from": self.id})
        return {"heard": float(self.state["heard"])}


def test_an_overridden_sync_is_called_once_in_every_round() -> None:
    _, rounds = outcome({**RING, "evaluate_every": 1}, Reading, 2)
    assert [r.metrics["train_heard"] for r in rounds] == [0.0, 2.0, 4.0, 6.0, 8.0]


class Nudged(FederatedNode):
    """Has no state of its own until somebody calls it."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        next(self.model.parameters()).data.add_(1e-3 + self.state.get("nudge", 0.0))
        return {"loss": 0.0}

    def nudge(self) -> None:
        self.state["nudge"] = 1.0


@pytest.mark.parametrize("values", [STAR, RING], ids=["star", "ring"])
def test_a_first_state_that_a_call_makes_between_rounds_does_not_last(values: dict[str, Any]) -> None:
    def trained(call: bool) -> list[str]:
        with InlineFabric(2, templates={"local:Node": Nudged}) as inline:
            base = FederatedBase(FederationConfig.from_mapping(values), fabric=Fabric(inline.port))
            base.train(rounds=1, blocking=True)
            if call:
                base["client_1"].call("nudge")
            base.train(rounds=1, blocking=True)
            assert base.run is not None
            base.stop()
            return [r.model_sha256 for r in base.run.rounds()]

    assert trained(call=True) == trained(call=False)


def test_what_is_changed_between_two_phases_of_a_round_is_not_committed_with_it() -> None:
    node: Any = SimpleNamespace(id="client_0", state={"n": 1})
    states = NodeStates({0: node}, [0], "local-1")
    states.begin()
    start = StartRound("r", 1, 1, 1, "", (), 1, evaluate=False)
    states.enter(start)
    node.state["n"] = 2
    states.stage(start)
    after_training = states.at(1)
    states.set_aside()
    node.state["n"] = 1000
    states.resume()
    states.stage(start)
    assert states.at(1) == after_training and node.state == {"n": 2}


class Counted(Counting):
    """Counts its evaluations, and trains by their number."""

    def setup(self) -> None:
        self.state = {"rounds": 0, "trace": np.zeros(3), "evaluations": 0}

    def train(self, **kwargs: Any) -> dict[str, float]:
        found = super().train(**kwargs)
        next(self.model.parameters()).data.add_(1e-3 * self.state["evaluations"])
        return found

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        self.state["evaluations"] += 1
        return super().evaluate(phase)


def restart_agents(inline: InlineFabric, _: str = "") -> None:
    for name in list(inline.agents):
        inline.stop_agent(name)
        inline.start_agent(name)


def test_what_the_evaluation_of_a_consensus_model_changes_does_not_last() -> None:
    values = {**RING, "evaluate_every": 1, "checkpoint_every": 1}
    assert hashes(outcome(values, Counted, 2, {2: restart_agents})) == hashes(outcome(values, Counted))


def test_a_round_that_was_the_last_one_is_evaluated_when_it_is_repeated() -> None:
    keys = {**STAR, "evaluate_clients": True, "evaluate_every": 10, "checkpoint_every": 0}
    with InlineFabric(2, templates={"local:Node": Counted}) as inline:
        base = FederatedBase(FederationConfig.from_mapping(keys), fabric=Fabric(inline.port))
        base.train(rounds=1, blocking=True)
        base.train(rounds=1, blocking=True)
        restart_agents(inline)
        base.train(rounds=1, blocking=True)
        assert base.run is not None
        base.stop()
        rounds = {r.number: r for r in base.run.rounds()}
    assert sorted(rounds) == [1, 2, 3] and rounds[3].generation > 1
