"""``fabric run --verify-determinism`` on fabrics without Ray: equal runs, runs that differ, runs that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from icrf.cli import Doors, app
from icrf.testing.inline import InlineFabric

FED = """\
federation_id: twice
schema: DecentralizedFederatedLearning
federated_learning_topology: ring
number_of_clients: 3
federated_learning_rounds: 3
evaluate_every: 3
"""
NODES = """\
from icrf import FederatedNode

calls = 0


class Drifting(FederatedNode):
    def train(self, **kwargs):
        global calls
        calls += 1
        if calls == 6:  # the third node in the second round of the first run
            next(self.model.parameters()).data.add_(1e-3)
        return super().train(**kwargs)


class Failing(FederatedNode):
    def train(self, **kwargs):
        global calls
        calls += 1
        if calls > 9:  # the second run
            raise RuntimeError("the disk is full")
        return super().train(**kwargs)
"""


class Command:
    """The command in a folder of its own, on inline fabrics; knows of how many clusters each one was."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.folder = folder
        self.clusters: list[int] = []
        (folder / "fed.yaml").write_text(FED + more)
        (folder / "twice_nodes.py").write_text(NODES)

    def __call__(self, *arguments: str) -> tuple[Any, dict[str, Any]]:
        doors = Doors(local=self._local)
        result = CliRunner().invoke(app, ["run", "fed.yaml", "--verify-determinism", "--json", *arguments], obj=doors)
        return result, json.loads(result.stdout.splitlines()[-1])

    def _local(self, clusters: int, *_: object) -> InlineFabric:
        self.clusters.append(clusters)
        return InlineFabric(clusters)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "twice_nodes", raising=False)
    return tmp_path


def test_equal_runs_on_one_and_on_two_clusters_are_verified(folder: Path) -> None:
    command = Command(folder)
    result, summary = command("--out", "here")
    assert result.exit_code == 0, result.output
    assert command.clusters == [1, 2]
    assert (summary["deterministic"], summary["clusters"], summary["second_run"]["clusters"]) == (True, 1, 2)
    assert summary["second_run"]["model_sha256"] == summary["model_sha256"]
    assert "both runs have the same hashes in all 3 rounds" in result.stderr
    assert json.loads((folder / "here/summary.json").read_text()) == summary
    assert (folder / "here/again/model.safetensors").exists()


def test_a_placement_that_needs_all_clusters_is_run_twice_on_them(folder: Path) -> None:
    command = Command(folder, "placement: {client_0: local-2}\n")
    result, summary = command("--clusters", "2")
    assert result.exit_code == 0, result.output
    assert command.clusters == [2, 2] and summary["deterministic"] is True


def test_runs_that_differ_end_with_x002_and_the_first_round_that_does(folder: Path) -> None:
    command = Command(folder, "client_template: twice_nodes:Drifting\n")
    result, summary = command("--out", "here")
    assert result.exit_code == 70
    assert "error X002 --verify-determinism: round 2 did not repeat" in result.stderr
    assert summary["deterministic"] is False
    assert summary["second_run"]["first_difference"]["round"] == 2
    assert all((folder / name / "rounds.jsonl").exists() for name in ("here", "here/again"))


def test_a_second_run_that_fails_verifies_nothing(folder: Path) -> None:
    command = Command(folder, "client_template: twice_nodes:Failing\n")
    result, summary = command("--out", "here")
    assert result.exit_code == 70
    assert "the disk is full" in result.stderr
    assert (summary["status"], summary["deterministic"]) == ("COMPLETED", None)


def test_a_resumed_run_cannot_be_verified(folder: Path) -> None:
    result = CliRunner().invoke(app, ["run", "--resume", "here", "--verify-determinism"])
    assert result.exit_code == 2 and "L009 --verify-determinism" in result.stderr
