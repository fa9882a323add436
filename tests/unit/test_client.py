"""The SDK against a mediator that plays a script: submit, follow, wait, results, and what a submission contains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import icrf
from icrf.client import Fabric, Result, connect
from icrf.errors import ConfigError, IcrfError, LocalError, NodeError, ProtocolError, RunError, TopologyError
from icrf.protocol import CENTRALIZED, COMPLETED, DECENTRALIZED, RUNNING, NodeSpec
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.scripted import Script, ScriptedMediator

STAR: dict[str, Any] = {
    "federation_id": "digits",
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 4,
    "federated_learning_rounds": 3,
}
RING = {**STAR, "federated_learning_schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}


@pytest.fixture(scope="module")
def star() -> FederationConfig:
    return FederationConfig.from_mapping(STAR)


@pytest.fixture(scope="module")
def ring() -> FederationConfig:
    return FederationConfig.from_mapping(RING)


# ---------------------------------------------------------------- what a submission contains


def test_a_star_has_its_server_first_and_its_edges_from_and_to_it(star: FederationConfig) -> None:
    submission = build_submission(star)
    assert submission.flow == CENTRALIZED
    assert [n.id for n in submission.nodes] == ["server", "client_0", "client_1", "client_2", "client_3"]
    assert submission.nodes[0].role == "aggregate-test"
    assert submission.graph.indptr == (0, 4, 5, 6, 7, 8)
    assert submission.graph.indices == (1, 2, 3, 4, 0, 0, 0, 0)


def test_a_ring_has_only_clients_with_the_configured_role(ring: FederationConfig) -> None:
    submission = build_submission(ring)
    assert submission.flow == DECENTRALIZED
    assert submission.nodes == tuple(NodeSpec(f"client_{i}", ring.client_role) for i in range(4))
    assert submission.graph.indices == (1, 3, 0, 2, 1, 3, 0, 2)


def test_the_layout_is_in_name_order_and_the_configuration_is_resolved(star: FederationConfig) -> None:
    submission = build_submission(star)
    names = [t.name for t in submission.layout]
    assert names == sorted(names)
    assert all(t.dtype == "float32" for t in submission.layout)
    assert json.loads(submission.config_json)["learning_rate"] == star.learning_rate


def test_each_submission_is_a_run_of_its_own_unless_the_request_id_says_otherwise(star: FederationConfig) -> None:
    with Fabric(ScriptedMediator()) as fabric:
        first, second = fabric.submit(star), fabric.submit(star)
        again = [fabric.submit(star, client_request_id="one") for _ in range(2)]
    assert first.id != second.id
    assert again[0].id == again[1].id


@pytest.mark.parametrize(
    ("nodes", "code"),
    [
        ([("server", "aggregate"), ("a", "train"), ("a", "train")], "C008"),
        ([("server", "aggregate"), ("a", "learn")], "C010"),
        ([("a", "train"), ("b", "train")], "C008"),
        ([("server", "aggregate"), ("b", "aggregate-train")], "C008"),
        ([("server", "aggregate"), ("b", "eval")], "C008"),
    ],
)
def test_roles_that_a_star_cannot_use_are_refused(
    star: FederationConfig, nodes: list[tuple[str, str]], code: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_submission(star, nodes=[NodeSpec(*node) for node in nodes])
    assert caught.value.code == code


def test_an_own_matrix_is_the_graph_and_must_have_the_size_of_the_nodes(ring: FederationConfig) -> None:
    path = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
    assert build_submission(ring, adjacency=path).graph.indices == (1, 0, 2, 1, 3, 2)
    with pytest.raises(TopologyError) as caught:
        build_submission(ring, adjacency=path[:3, :3])
    assert caught.value.code == "T010"


def test_graphs_and_mixing_that_never_agree_are_refused_unless_told_otherwise(
    ring: FederationConfig, tmp_path: Path
) -> None:
    pairs = np.kron(np.eye(2, dtype=int), 1 - np.eye(2, dtype=int))
    (tmp_path / "swap.csv").write_text("0,0.5,0,0.5\n0.5,0,0.5,0\n0,0.5,0,0.5\n0.5,0,0.5,0\n")
    keys = {**ring.model_dump(), "mixing": "custom", "mixing_matrix_file_name": str(tmp_path / "swap.csv")}
    swapping = FederationConfig.from_mapping(keys)
    for config, adjacency, code in ((ring, pairs, "T006"), (swapping, None, "T012")):
        with pytest.raises(TopologyError) as caught:
            build_submission(config, adjacency=adjacency)
        assert caught.value.code == code
        allowed = FederationConfig.from_mapping({**config.model_dump(), "allow_no_consensus": True})
        assert build_submission(allowed, adjacency=adjacency).graph.num_nodes == 4


def test_a_directed_graph_needs_a_rule_that_takes_it(ring: FederationConfig) -> None:
    cycle = np.roll(np.eye(4, dtype=int), 1, axis=1)
    with pytest.raises(TopologyError) as caught:
        build_submission(ring, adjacency=cycle)
    assert caught.value.code == "T004" and "push_sum" in caught.value.hint
    pushing = FederationConfig.from_mapping({**ring.model_dump(), "mixing": "push_sum"})
    assert build_submission(pushing, adjacency=cycle).graph.indices == (1, 2, 3, 0)
    leaf = np.array([[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(TopologyError, match="3 nodes send their mass away") as caught:
        build_submission(pushing, adjacency=leaf)
    assert caught.value.code == "T012"


def test_sample_weights_are_made_from_the_partition(ring: FederationConfig) -> None:
    graph = build_submission(FederationConfig.from_mapping({**ring.model_dump(), "mixing": "sample_weighted"})).graph
    assert len(graph.weights) == 8 and len(graph.self_weights) == 4


def test_a_model_that_does_not_take_the_data_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "misfit_module.py").write_text(
        "import torch\n\n\ndef build(input_shape, num_classes):\n    return torch.nn.Linear(7, num_classes)\n"
    )
    config = FederationConfig.from_mapping({**STAR, "model_type": "misfit_module:build"})
    before = list(sys.path)
    with pytest.raises(ConfigError) as caught:
        build_submission(config, code_path=str(tmp_path))
    assert caught.value.code == "C018"
    assert sys.path == before


def test_user_code_is_found_next_to_the_file_and_only_there(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(
        "import torch\n\n\ndef build(input_shape, num_classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))\n"
    )
    config = FederationConfig.from_mapping({**STAR, "model_type": "my_model:build"})
    with pytest.raises(IcrfError) as caught:
        build_submission(config)
    assert caught.value.code == "C017"
    assert [t.name for t in build_submission(config, code_path=str(tmp_path)).layout] == ["1.bias", "1.weight"]


# ---------------------------------------------------------------- following a run


def test_rounds_arrive_in_order_and_the_run_ends(star: FederationConfig) -> None:
    with Fabric(ScriptedMediator()) as fabric:
        run = fabric.submit(star)
        rounds = list(run.rounds())
        assert [r.number for r in rounds] == [1, 2, 3]
        assert rounds[-1].metrics["accuracy"] == pytest.approx(1 - 0.7**3)
        assert run.wait().status == COMPLETED
        assert run.wait(timeout_s=5).status == COMPLETED


def test_a_run_is_found_by_the_first_characters_of_its_id(star: FederationConfig) -> None:
    with Fabric(ScriptedMediator()) as fabric:
        runs = [fabric.submit(star) for _ in range(3)]
        assert fabric.run(runs[1].id[:8]).id == runs[1].id
        assert [r.id for r in fabric.runs()] == [r.id for r in reversed(runs)]
        with pytest.raises(RunError) as caught:
            fabric.run("nothing")
        assert caught.value.code == "F001"


def test_a_wait_with_a_limit_tells_how_far_the_run_is(star: FederationConfig) -> None:
    with Fabric(ScriptedMediator(Script(held=True, num_rounds=2))) as fabric:
        run = fabric.submit(star)
        assert run.wait(timeout_s=0.01).status == RUNNING
        assert [r.number for r in run.committed_rounds()] == [1, 2]
        with pytest.raises(RunError) as caught:
            run.result(timeout_s=0.01)
    assert caught.value.code == "F005"
    assert "round 3 on us-east" in str(caught.value)


def test_the_error_of_a_failed_run_carries_its_cause(star: FederationConfig) -> None:
    cause = NodeError("U001", "ZeroDivisionError: division by zero", place="client_2 on us-east, task.py:14")
    with Fabric(ScriptedMediator(Script(num_rounds=1, error=cause))) as fabric:
        run = fabric.submit(star)
        with pytest.raises(RunError) as caught:
            run.result()
        assert caught.value.code == "F002"
        assert "task.py:14" in str(caught.value)
        assert isinstance(caught.value.__cause__, NodeError)
        assert len(list(run.rounds())) == 1


def test_a_cancelled_run_has_no_result(star: FederationConfig) -> None:
    with Fabric(ScriptedMediator(Script(held=True))) as fabric:
        run = fabric.submit(star)
        run.cancel()
        with pytest.raises(RunError) as caught:
            run.result()
    assert caught.value.code == "F003"


# ---------------------------------------------------------------- results


@pytest.fixture(scope="module")
def result(star: FederationConfig) -> Result:
    with Fabric(ScriptedMediator()) as fabric:
        return fabric.submit(star).result()


def test_a_result_outlives_its_fabric(result: Result, tmp_path: Path) -> None:
    path = result.save(tmp_path / "model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    assert all((tensor == 0.5).all() for tensor in tensors.values())
    assert result.metrics["accuracy"] == pytest.approx(1 - 0.7**3)
    assert len(result.model_sha256) == 64


def test_the_model_comes_back_as_a_module_with_the_trained_weights(result: Result) -> None:
    module = result.load_model()
    assert not module.training
    assert set(module.state_dict()) == set(result.state_dict())
    assert all((value == 0.5).all() for value in module.state_dict().values())


def test_a_notebook_shows_summary_and_curve(result: Result) -> None:
    page = result._repr_html_()
    assert "<svg" in page
    assert "accuracy" in page


def test_saving_where_nothing_can_be_written_names_the_place(result: Result, tmp_path: Path) -> None:
    with pytest.raises(LocalError) as caught:
        result.save(tmp_path / "missing" / "model.safetensors")
    assert caught.value.code == "L005"


def test_a_model_that_is_not_the_committed_one_is_refused(star: FederationConfig) -> None:
    with Fabric(ScriptedMediator(Script(corrupt_model=True))) as fabric:
        run = fabric.submit(star)
        with pytest.raises(ProtocolError) as caught:
            run.result()
    assert caught.value.code == "P021"


def test_a_kept_run_ends_when_it_is_finished(star: FederationConfig) -> None:
    with Fabric(ScriptedMediator()) as fabric:
        run = fabric.submit(star, keep=True)
        run.finish()
        assert run.result().info.status == COMPLETED


# ---------------------------------------------------------------- opening a fabric


class _Handle:
    def __init__(self) -> None:
        self.port = ScriptedMediator()
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_an_embedded_fabric_is_closed_once() -> None:
    handle = _Handle()
    asked: list[int] = []

    def open_local(clusters: int, **_: object) -> _Handle:
        asked.append(clusters)
        return handle

    with connect(clusters=2, open_local=open_local) as fabric:
        assert [c.name for c in fabric.clusters()] == ["eu-west", "us-east"]
        fabric.close()
    assert (asked, handle.closed) == ([2], 1)


def test_the_number_of_clusters_is_for_embedded_fabrics_only() -> None:
    with pytest.raises(LocalError) as caught:
        connect("127.0.0.1:1", clusters=2)
    assert caught.value.code == "L009"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, icrf; icrf.IcrfError; "
        "assert not {'torch', 'ray', 'grpc', 'numpy', 'pydantic'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_the_facade_exports_what_it_says() -> None:
    assert "connect" in dir(icrf)
    assert icrf.FederationConfig is FederationConfig
    with pytest.raises(AttributeError):
        _ = icrf.nothing_of_that_name
