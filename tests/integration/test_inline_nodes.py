"""What users' node classes may do, what the fabric says when they do something else, and messages between nodes."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icrf import values
from icrf.errors import IcrfError, NodeError, error_from_json
from icrf.federation.node import FederatedNode
from icrf.protocol import COMPLETED, FAILED, IDLE, RoundResult, RunInfo
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import follow_until

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}


class Session:
    """One kept run of a node class on so many clusters."""

    def __init__(self, clusters: int, client: type | None, *, server: type | None = None, rounds: int = 3, **keys: Any):
        self.templates = {f"local:{kind.__name__}": kind for kind in (client, server) if kind}
        data = {
            "federation_id": "fed",
            "number_of_clients": 4,
            "federated_learning_rounds": rounds,
            "batch_size": 64,
            "client_template": f"local:{client.__name__}" if client else None,
            "server_template": f"local:{server.__name__}" if server else None,
            **keys,
        }
        self.submission = build_submission(FederationConfig.from_mapping(data), keep=True)
        self.fabric = InlineFabric(clusters, templates=self.templates)
        self.run_id = ""

    def __enter__(self) -> Session:
        self.run_id = self.fabric.port.submit(self.submission).run_id
        for event in self.fabric.port.watch(self.run_id):
            info = self.fabric.port.get(self.run_id)
            if event.status == IDLE and info.status == IDLE:
                break
        return self

    def __exit__(self, *_: object) -> None:
        self.fabric.close()

    def call(self, node_id: str, method: str, *arguments: Any) -> Any:
        packed = values.encode([list(arguments), {}])
        return values.decode(self.fabric.port.call_node(self.run_id, node_id, method, packed))

    def more(self, rounds: int) -> None:
        """Let it go on to this many rounds in total."""
        self.fabric.port.advance(self.run_id, "run", rounds)
        follow_until(self.fabric, self.run_id, rounds)

    def finish(self) -> tuple[RunInfo, list[RoundResult], list[str]]:
        """The ended run, its rounds and its warnings."""
        self.fabric.port.finish(self.run_id)
        events = list(self.fabric.port.watch(self.run_id))
        rounds = [event.round for event in events if event.round]
        return self.fabric.port.get(self.run_id), rounds, [e.text for e in events if e.kind == "warning"]


def completed(clusters: int, client: type | None, **more: Any) -> tuple[RunInfo, list[RoundResult], list[str]]:
    with Session(clusters, client, **more) as session:
        outcome = session.finish()
    assert outcome[0].status == COMPLETED, outcome[0].error_json
    return outcome


def failure_of(clusters: int, client: type | None, **more: Any) -> IcrfError:
    with Session(clusters, client, **more) as session:
        info = session.fabric.port.get(session.run_id)
    assert info.status == FAILED
    return error_from_json(info.error_json)


def line_of(function: Any, text: str) -> str:
    """``FILE:LINE`` of the line of `function` that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    return f"{Path(__file__).name}:{first + next(k for k, line in enumerate(lines) if text in line)}"


# ---------------------------------------------------------------- what nodes may do


class Custom(FederatedNode):
    """Overrides everything that may be overridden."""

    def build(self, **kwargs: Any) -> None:
        self.built_with = (len(self.train_data[1]), self.num_samples)
        self.seen: list[int] = []

    def train(self, **kwargs: Any) -> dict[str, float]:
        self.seen.append(self.round)
        before = self.context.model.snapshot()
        metrics = super().train(**kwargs)
        return {**metrics, "moved": float(np.abs(self.context.model.flat - before).max())}

    def facts(self) -> dict[str, Any]:
        return {"built_with": list(self.built_with), "seen": self.seen, "round": self.round}


class Server(FederatedNode):
    """Halves the global model and says what it saw."""

    def build(self, **kwargs: Any) -> None:
        self.saw: list[Any] = []

    def aggregate(self, state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.saw.append([self.round, bool(np.array_equal(self.context.model.flat, state))])
        return state * np.float32(0.5)

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        return {**super().evaluate(phase), "largest": float(np.abs(self.context.model.flat).max())}

    def facts(self) -> list[Any]:
        return self.saw


@pytest.mark.parametrize("clusters", [1, 2])
def test_build_and_train_are_the_nodes_own(clusters: int) -> None:
    with Session(clusters, Custom, **STAR) as session:
        facts = session.call("client_3", "facts")
        assert facts["seen"] == [1, 2, 3] and facts["round"] == 3
        assert facts["built_with"][0] == facts["built_with"][1] > 0
        _, rounds, _ = session.finish()
    assert all(r.metrics["train_moved"] > 0 for r in rounds)


@pytest.mark.parametrize("clusters", [1, 2])
def test_the_server_has_the_last_word_on_the_model(clusters: int) -> None:
    with Session(clusters, None, server=Server, evaluate_every=3, **STAR) as session:
        assert session.call("server", "facts") == [[1, True], [2, True], [3, True]]
        _, rounds, _ = session.finish()
    plain = completed(clusters, None, evaluate_every=3, **STAR)[1]
    assert "largest" in rounds[2].metrics
    assert rounds[0].model_sha256 != plain[0].model_sha256


def test_a_class_of_ones_own_has_the_same_bits_on_any_number_of_clusters() -> None:
    for more in ({"server": Server, **STAR}, RING):
        hashes = [[r.model_sha256 for r in completed(c, Custom, **more)[1]] for c in (1, 2, 4)]
        assert hashes[0] == hashes[1] == hashes[2]


class Mixer(FederatedNode):
    """Keeps the state it is shown, as a user may."""

    def aggregate(self, state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.kept = [*getattr(self, "kept", []), state]
        self.copies = [*getattr(self, "copies", []), state.copy()]
        return state

    def still_equal(self) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(self.kept, self.copies, strict=True))


@pytest.mark.parametrize("graph", [STAR, RING])
def test_a_state_that_a_node_keeps_is_not_written_over(graph: dict[str, Any]) -> None:
    kinds = {"client": None, "server": Mixer} if graph is STAR else {"client": Mixer}
    with Session(1, rounds=5, **kinds, **graph) as session:
        assert session.call("server" if graph is STAR else "client_0", "still_equal")


# ---------------------------------------------------------------- messages


class Talker(FederatedNode):
    """Greets its neighbours in every phase, and notes what it hears and when."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        self.heard = [*getattr(self, "heard", []), *([self.round, m.sender_id, m.header] for m in self.sync())]
        self.send(f"train {self.round}", {"value": np.arange(3)})
        self.send(f"to one in {self.round}", {}, to=self.neighbors[0])
        return super().train(**kwargs)

    def aggregate(self, state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.send(f"aggregate {self.round}", {})
        return state

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        self.send(f"evaluate {self.round}", {})
        return super().evaluate(phase)

    def facts(self) -> list[Any]:
        return self.heard


@pytest.mark.parametrize("graph", [STAR, RING])
def test_nodes_hear_the_same_on_any_number_of_clusters(graph: dict[str, Any]) -> None:
    def heard(clusters: int) -> dict[str, Any]:
        with Session(clusters, Talker, server=Talker if graph is STAR else None, **graph) as session:
            session.call("client_1", "send", "called", {"x": 1})
            session.more(4)
            return {f"client_{k}": session.call(f"client_{k}", "facts") for k in range(4)}

    one = heard(1)
    assert heard(2) == one and heard(4) == one
    assert all(number >= 2 for lines in one.values() for number, _, _ in lines)
    speaker = "server" if graph is STAR else "client_0"
    said = [text for number, sender, text in one["client_1"] if sender == speaker and number == 3]
    assert said[-2:] == ["aggregate 2", "evaluate 2"]
    # The server does not train; in the ring a message from between the rounds comes with the round before it.
    assert graph is STAR or said[0] == "train 2"
    assert graph is STAR or [4, "client_1", "called"] in one["client_0"]


class Wanderer(FederatedNode):
    """One of them speaks to a node that is no neighbour."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        if self.id == "client_0" and self.round == 2:
            self.send("psst", {}, to="client_2")
        return super().train(**kwargs)


@pytest.mark.parametrize("clusters", [1, 2, 4])
def test_a_message_along_a_non_edge_fails_the_run_and_names_both_nodes(clusters: int) -> None:
    error = failure_of(clusters, Wanderer, **RING)
    assert error.code == "P011"
    assert "client_0" in str(error) and "client_2" in str(error)


class TalksTooSoon(FederatedNode):
    def build(self, **kwargs: Any) -> None:
        self.send("hello", {})


@pytest.mark.parametrize("clusters", [1, 2])
def test_nodes_cannot_send_before_all_are_set_up(clusters: int) -> None:
    error = failure_of(clusters, TalksTooSoon, **RING)
    assert error.code == "F005" and "client_" in str(error)


class Blocker(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        self.receive(block=True)
        return {}


def test_waiting_on_a_shared_slot_is_refused() -> None:
    error = failure_of(1, Blocker, **STAR)
    assert error.code == "U010" and "client_0" in str(error)


class Listener(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        first, rest = self.receive(), self.sync()
        self.heard = [*getattr(self, "heard", []), [m.header for m in ([first] if first else []) + rest]]
        if self.round == 2 and self.id == "client_2" and not getattr(self, "exploded", False):
            self.exploded = True
            self.context.model.load(self.context.model.snapshot() * np.float32(1e6))
            return {}
        self.send(f"said in {self.round}", {})
        return super().train(**kwargs)

    def facts(self) -> list[Any]:
        return self.heard


@pytest.mark.parametrize("clusters", [1, 2])
def test_a_repeated_round_hears_what_its_first_attempt_heard(clusters: int) -> None:
    with Session(clusters, Listener, server=Listener, **STAR) as session:
        heard = session.call("client_2", "facts")
        server = session.call("server", "sync")
        _, rounds, _ = session.finish()
    assert [r.attempt for r in rounds] == [1, 2, 1]
    assert len(heard) == 4 and heard[1] == heard[2]
    # What the void attempt said has vanished; the last round's is not open yet.
    assert sorted(m["header"] for m in server) == ["said in 1"] * 4 + ["said in 2"] * 4


# ---------------------------------------------------------------- what nodes may not do


class Raises(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        if self.round == 2 and self.id == "client_1":
            raise KeyError("no such column")
        return super().train(**kwargs)


class Exits(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        raise SystemExit(3)


class RaisesInTorch(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        self.model(self.train_data[0][:, :3])
        return {}


class RaisesInBuild(FederatedNode):
    def build(self, **kwargs: Any) -> None:
        raise OSError("no such sensor")


@pytest.mark.parametrize("graph", [STAR, RING])
@pytest.mark.parametrize(
    ("kind", "method", "line", "says"),
    [
        (Raises, "train", "raise KeyError", "KeyError: 'no such column'"),
        (Exits, "train", "raise SystemExit", "SystemExit: 3"),
        (RaisesInTorch, "train", "self.model(", "RuntimeError"),
        (RaisesInBuild, "build", "raise OSError", "OSError: no such sensor"),
    ],
)
def test_what_a_node_raises_is_told_with_node_cluster_file_and_line(
    kind: type, method: str, line: str, says: str, graph: dict[str, Any]
) -> None:
    error = failure_of(2, kind, **graph)
    assert isinstance(error, NodeError) and error.code == "U001"
    text = str(error)
    assert "client_" in text and "local-" in text and says in text
    assert line_of(getattr(kind, method), line) in text
    assert kind is not Raises or "client_1" in text


class WrongType(FederatedNode):
    def train(self, **kwargs: Any) -> Any:
        return [1, 2]


class WrongMetric(FederatedNode):
    def train(self, **kwargs: Any) -> Any:
        return {"loss": "low"}


class WrongEvaluation(FederatedNode):
    def evaluate(self, phase: str = "test") -> Any:
        return 0.5


class WrongAggregate(FederatedNode):
    def aggregate(self, state: np.ndarray[Any, Any]) -> Any:
        return list(state)


class WrongShape(FederatedNode):
    def aggregate(self, state: np.ndarray[Any, Any]) -> Any:
        return state[:-1]


class NanAggregate(FederatedNode):
    def aggregate(self, state: np.ndarray[Any, Any]) -> Any:
        state[0] = np.nan
        return state


@pytest.mark.parametrize(
    ("kind", "code", "method"),
    [
        (WrongType, "U002", "train"),
        (WrongMetric, "U002", "train"),
        (WrongEvaluation, "U002", "evaluate"),
        (WrongAggregate, "U002", "aggregate"),
        (WrongShape, "W010", ""),
        (NanAggregate, "W020", "aggregate"),
    ],
)
@pytest.mark.parametrize("graph", [STAR, RING])
def test_what_a_node_returns_must_fit(kind: type, code: str, method: str, graph: dict[str, Any]) -> None:
    error = failure_of(2, kind, server=kind if graph is STAR else None, **graph)
    assert error.code == code
    assert ("client_" in str(error) or "server" in str(error)) and "local-" in str(error) and method in str(error)


class NotANumber(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        if self.id == "client_2":
            self.context.model.layout.to_state_dict(self.context.model.flat)["output.weight"][0, 0] = np.nan
        return {}


@pytest.mark.parametrize("graph", [STAR, RING])
@pytest.mark.parametrize("clusters", [1, 2])
def test_non_finite_weights_name_node_and_tensor(clusters: int, graph: dict[str, Any]) -> None:
    error = failure_of(clusters, NotANumber, **graph)
    assert error.code == "W020"
    assert "client_2" in str(error) and "output.weight" in str(error)


class ShrinkingData(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        features, labels = self.train_data
        self.context.train_data = (features[1:], labels[1:])
        return super().train(**kwargs)


def test_the_sample_count_of_a_node_is_fixed() -> None:
    error = failure_of(1, ShrinkingData, **STAR)
    assert error.code == "W030" and "client_0" in str(error)


class NoNode:
    def __init__(self, **_: Any) -> None:
        pass


def test_a_template_must_be_a_federated_node() -> None:
    error = failure_of(1, NoNode, **STAR)
    assert error.code == "C017" and "NoNode" in str(error) and error.place == "client_template"
    assert failure_of(1, None, server=NoNode, **STAR).place == "server_template"


class Exiting(FederatedNode):
    def __init__(self, **_: Any) -> None:
        sys.exit(1)


def test_a_template_that_raises_is_named_with_its_node_and_its_line() -> None:
    error = failure_of(1, None, server=Exiting, **STAR)
    assert error.code == "U001" and error.place == "server on local-1, server_template 'local:Exiting'"
    assert line_of(Exiting.__init__, "sys.exit") in error.message


class Undefined(FederatedNode):
    """A metric of one node, or of the one that evaluates, has no value."""

    bad = "train"

    def train(self, **kwargs: Any) -> dict[str, float]:
        found = super().train(**kwargs)
        return {**found, "share": float("nan")} if self.bad == "train" and self.id == "client_2" else found

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        found = super().evaluate(phase)
        bad = (self.bad == phase and self.id in ("client_2", "server")) or self.bad == "consensus"
        return {**found, "share": float("inf")} if bad else found


class UndefinedTest(Undefined):
    bad = "test"


class UndefinedEval(Undefined):
    bad = "eval"


class UndefinedConsensus(Undefined):
    bad = "consensus"


@pytest.mark.parametrize(
    ("kind", "keys", "who"),
    [
        (Undefined, STAR, "client_2 on local-., train"),
        (Undefined, RING, "client_2 on local-., train"),
        (UndefinedTest, STAR, "server on local-., evaluate"),
        (UndefinedEval, {**STAR, "evaluate_clients": True}, "client_2 on local-., evaluate"),
        (UndefinedConsensus, RING, "client_. on local-., evaluate"),
    ],
)
def test_a_metric_that_is_not_finite_ends_the_run_whoever_measures_it(
    kind: type, keys: dict[str, Any], who: str
) -> None:
    error = failure_of(2, kind, server=kind if keys["federated_learning_topology"] == "star" else None, **keys)
    assert error.code == "W020" and "metric 'share' is not finite" in error.message
    assert re.fullmatch(who, error.place)


# ---------------------------------------------------------------- the exact grid


class Exploding(FederatedNode):
    """All weights of one node leave every bound that was to be expected, in one round."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        metrics = super().train(**kwargs)
        if self.round == 2 and self.id in ("client_1", "client_3"):
            self.context.model.load(self.context.model.snapshot() * np.float32(1e6))
        return metrics


@pytest.mark.parametrize("graph", [STAR, RING])
def test_an_overflow_of_the_grid_repeats_the_round_and_the_bits_stay_the_same(graph: dict[str, Any]) -> None:
    one, two, four = (completed(c, Exploding, learning_rate=1e-9, **graph) for c in (1, 2, 4))
    assert one[1][1].attempt > 1
    assert any("coarser" in text for text in one[2])
    for other in (two, four):
        assert [r.model_sha256 for r in other[1]] == [r.model_sha256 for r in one[1]]
        assert other[0].model_sha256 == one[0].model_sha256
        assert other[1][1].attempt > 1
