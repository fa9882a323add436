"""``fabric plan --compare``, against a scripted mediator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from icrf.cli import Doors, app
from icrf.errors import ConfigError
from icrf.testing.scripted import ScriptedMediator

FED = """\
federation_id: fed
federated_learning_schema: TraditionalFederatedLearning
federated_learning_topology: star
number_of_clients: 4
dataset_type: digits
model_type: logistic
"""


@pytest.mark.parametrize("where", [("--clusters", "3"), ("--mediator", "a:1")])
def test_plans_are_compared(tmp_path: Path, where: tuple[str, ...]) -> None:
    (tmp_path / "fed.yaml").write_text(FED)
    port = ScriptedMediator()
    asked = []

    def plan_local(submission, clusters):  # type: ignore[no-untyped-def]
        asked.append((json.loads(submission.config_json)["assignment_strategy"], clusters))
        return port.plan(submission)

    doors = Doors(remote=lambda *where: port, plan_local=plan_local)
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "fed.yaml"), "--compare", "--json", *where], obj=doors)
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout.splitlines()[-1])["alternatives"]
    assert compared.keys() == {"locality", "metis", "louvain", "capacity", "round_robin", "random"}
    assert all(each.keys() >= {"cut_edges", "bytes_inter_cluster_total", "feasible"} for each in compared.values())
    assert "placed by" in result.stderr and "round_robin" in result.stderr
    if where[0] == "--clusters":
        assert [name for name, clusters in asked if clusters == 3] == list(compared)


@pytest.mark.parametrize("where", [("--clusters", "3"), ("--mediator", "a:1")])
def test_a_strategy_that_makes_no_plan_shows_why_in_its_row(
    tmp_path: Path, where: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fed.yaml").write_text(FED)
    port = ScriptedMediator()
    plan = port.plan

    def plan_of(submission, clusters=0):  # type: ignore[no-untyped-def]
        if json.loads(submission.config_json)["assignment_strategy"] == "metis":
            raise ConfigError("C013", "no parts for metis", place="assignment_strategy")
        return plan(submission)

    monkeypatch.setattr(port, "plan", plan_of)
    doors = Doors(remote=lambda *where: port, plan_local=plan_of)
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "fed.yaml"), "--compare", "--json", *where], obj=doors)
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout.splitlines()[-1])["alternatives"]
    assert compared["metis"]["error"]["code"] == "C013"
    assert all("cut_edges" in each for name, each in compared.items() if name != "metis")
    assert "no parts for metis" in " ".join(result.stderr.split())
