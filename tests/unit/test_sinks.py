"""Where metrics go: every kind of sink, each event once, and failures that end nothing."""

from __future__ import annotations

import csv
import json
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from icrf.client import Fabric, Run
from icrf.errors import ConfigError
from icrf.protocol import COMPLETED, RoundResult, RunInfo
from icrf.sinks import CsvSink, open_sink, values_of
from icrf.spec import FederationConfig
from icrf.testing.scripted import Script, ScriptedMediator, scripted_round

STAR: dict[str, Any] = {
    "federation_id": "digits",
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 4,
    "federated_learning_rounds": 3,
}
BY_NODE = {"client_10": {"train_loss": 0.5}, "client_2": {"train_loss": 0.25}}


class Recorder:
    """Notes what it is told; raises where it is asked to."""

    def __init__(self, fails_in: str = "") -> None:
        self.told: list[str] = []
        self.fails_in = fails_in

    def on_run(self, info: RunInfo) -> None:
        self._note("on_run", info.federation)

    def on_round(self, result: RoundResult) -> None:
        self._note("on_round", str(result.number))

    def on_end(self, info: RunInfo) -> None:
        self._note("on_end", info.status)

    def _note(self, method: str, what: str) -> None:
        self.told.append(what)
        if method == self.fails_in:
            raise OSError("the disk is full")


def submit(*sinks: Any, script: Script | None = None) -> Run:
    return Fabric(ScriptedMediator(script)).submit(FederationConfig.from_mapping(STAR), sinks=sinks)


def info(run_id: str = "abcdef0123456789") -> RunInfo:
    return RunInfo(run_id, "digits", COMPLETED, "centralized", 1, 1, (), 0.0)


def test_values_are_the_means_and_then_the_nodes_by_number() -> None:
    result = replace(scripted_round(1, ["a"]), metrics={"loss": 1.0, "accuracy": 0.5}, node_metrics=BY_NODE)
    assert values_of(result) == [
        ("", "accuracy", 0.5),
        ("", "loss", 1.0),
        ("client_2", "train_loss", 0.25),
        ("client_10", "train_loss", 0.5),
    ]


@pytest.mark.parametrize("read", [Run.result, Run.wait, lambda run: run.wait(5.0), lambda run: list(run.rounds())])
def test_a_sink_is_told_everything_once_whoever_follows_the_run(read: Any) -> None:
    sink = Recorder()
    run = submit(sink)
    read(run)
    assert sink.told[:4] == ["digits", "1", "2", "3"]
    run.wait()
    list(run.events(after_seq=3))
    assert sink.told == ["digits", "1", "2", "3", COMPLETED]


@pytest.mark.parametrize("method", ["on_run", "on_round", "on_end"])
def test_a_sink_that_fails_ends_nothing_and_is_warned_about_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Recorder(method), Recorder()
    result = submit(broken, sound).result()
    assert result.info.status == COMPLETED
    assert sound.told == ["digits", "1", "2", "3", COMPLETED]
    assert len(broken.told) == {"on_run": 1, "on_round": 2, "on_end": 5}[method]
    texts = [r.getMessage() for r in caplog.records if r.name == "icrf.sinks"]
    assert texts == [f"Recorder.{method} raised OSError: the disk is full; it is left out"]


def test_csv_appends_one_row_per_value(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.csv"
    for run_id in ("one", "two"):
        sink = CsvSink(str(path))
        sink.on_run(info(run_id))
        sink.on_round(replace(scripted_round(1, ["a"]), metrics={"loss": 0.1}, node_metrics=BY_NODE))
        sink.on_end(info(run_id))
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["run_id", "federation", "round", "node", "name", "value"]
    assert rows[1:4] == [
        ["one", "digits", "1", "", "loss", "0.1"],
        ["one", "digits", "1", "client_2", "train_loss", "0.25"],
        ["one", "digits", "1", "client_10", "train_loss", "0.5"],
    ]
    assert [row[0] for row in rows[4:]] == ["two"] * 3


def test_jsonl_has_a_line_per_round(tmp_path: Path) -> None:
    run = submit(f"jsonl:{tmp_path / 'rounds.jsonl'}")
    run.wait()
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[0]["run_id"] == run.id and set(lines[0]["metrics"]) == {"train_loss", "loss", "accuracy"}


def test_sqlite_keeps_a_round_once_however_often_it_is_followed(tmp_path: Path) -> None:
    fabric = Fabric(ScriptedMediator())
    spec = f"sqlite:{tmp_path / 'metrics.db'}"
    run = fabric.submit(FederationConfig.from_mapping(STAR), sinks=[spec])
    run.wait()
    fabric.run(run.id, sinks=[spec]).wait()
    with closing(sqlite3.connect(tmp_path / "metrics.db")) as database:
        rows = database.execute("SELECT federation, round, node, name FROM metrics ORDER BY 2, 4").fetchall()
    assert len(rows) == 9 and rows[0] == ("digits", 1, "", "accuracy")


def test_tensorboard_gets_scalars_in_a_folder_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, *values: Any) -> None:
            written.append(values)

        def flush(self) -> None: ...

        def close(self) -> None:
            written.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    sink = open_sink("tensorboard:tb")
    sink.on_run(info())
    sink.on_round(replace(scripted_round(4, ["a"]), metrics={"loss": 1.0}, node_metrics=BY_NODE))
    sink.on_end(info())
    assert written == [
        "tb/digits-abcdef01",
        ("loss", 1.0, 4),
        ("nodes/train_loss/client_2", 0.25, 4),
        ("nodes/train_loss/client_10", 0.5, 4),
        "closed",
    ]


def test_without_tensorboard_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"C017.*TensorBoard is not installed.*icrf\[tensorboard\]"):
        open_sink("tensorboard:tb")


def test_a_sink_of_ones_own_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_sinks")
    module.Recorder = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_sinks", module)
    assert isinstance(open_sink("own_sinks:Recorder"), Recorder)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("csvv:some/x.csv", "C010 --log: sink 'csvv' unknown.*csv.*Did you mean 'csv'"),
        ("csv", "C016 --log"),
        ("", "C010"),
    ],
)
def test_a_description_that_means_nothing_is_refused(spec: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        open_sink(spec)
