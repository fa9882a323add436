"""The agent's journal: what was remembered is there after a restart, and damage is left out, not raised."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from icrf.protocol import CENTRALIZED, Activate, Graph, NodeSpec, PeerAddress, TensorSpec
from icrf_agent.journal import AgentJournal


def activation(run_id: str = "run-1", generation: int = 1) -> Activate:
    return Activate(
        run_id=run_id,
        generation=generation,
        federation="fed",
        config_json="{}",
        flow=CENTRALIZED,
        nodes=(NodeSpec("server", "aggregate"), NodeSpec("client_1", "train-eval")),
        graph=Graph(2, (0, 1, 2), (1, 0)),
        layout=(TensorSpec("w", (2, 3), "float32"),),
        clusters=("a", "b"),
        assignment=(0, 1),
        peers=(PeerAddress("b", "127.0.0.1:1"),),
        num_slots=1,
        restore_round=4,
        checkpoints=("checkpoint/4.2/a", "checkpoint/4.2/b"),
    )


def test_the_agent_id_is_made_once_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    made = AgentJournal(tmp_path / "new").agent_id
    assert len(made) == 32
    assert AgentJournal(tmp_path / "new").agent_id == made
    (tmp_path / "new" / "agent-id").write_text("not an id")
    again = AgentJournal(tmp_path / "new").agent_id
    assert len(again) == 32
    assert again != made


def test_activations_are_read_back_equal_and_the_newest_of_a_run_counts(tmp_path: Path) -> None:
    journal = AgentJournal(tmp_path)
    journal.remember(activation("b"))
    journal.remember(activation("a"))
    journal.remember(activation("a", generation=2))
    assert AgentJournal(tmp_path).activations() == [activation("a", generation=2), activation("b")]


def test_what_is_forgotten_is_gone_and_forgetting_twice_is_harmless(tmp_path: Path) -> None:
    journal = AgentJournal(tmp_path)
    journal.remember(activation())
    journal.reserve("run-1")
    journal.reserve("run-1")
    journal.reserve("../2")
    assert AgentJournal(tmp_path).reservations() == ["../2", "run-1"]
    journal.forget("run-1")
    journal.forget("run-1")
    assert AgentJournal(tmp_path).activations() == []
    assert AgentJournal(tmp_path).reservations() == ["../2"]


@pytest.mark.parametrize("run_id", ["../../outside", "/absolute", "a/b", "..", "ü ñ"])
def test_no_run_id_leaves_the_folder(tmp_path: Path, run_id: str) -> None:
    journal = AgentJournal(tmp_path / "journal")
    journal.remember(activation(run_id))
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    assert journal.activations() == [activation(run_id)]
    journal.forget(run_id)
    assert journal.activations() == []


def test_damaged_files_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = AgentJournal(tmp_path)
    journal.remember(activation("good"))
    journal.remember(activation("cut"))
    cut = tmp_path / "cut.activation"
    cut.write_bytes(cut.read_bytes()[:-7])
    (tmp_path / "empty.activation").write_bytes(b"")
    (tmp_path / "noise.activation").write_bytes(bytes(range(256)))
    (tmp_path / "another.activation").write_bytes((tmp_path / "good.activation").read_bytes())
    (tmp_path / "half.activation.part").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert journal.activations() == [activation("good")]
    assert {name for name in ("cut", "empty", "noise", "another") if f"{name}.activation" in caplog.text} == {
        "cut",
        "empty",
        "noise",
        "another",
    }


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    journal = AgentJournal(tmp_path)
    journal.remember(replace(activation(), config_json="x" * 10_000))
    journal.remember(activation())
    assert journal.activations() == [activation()]
    assert not list(tmp_path.glob("*.part"))
