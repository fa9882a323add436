"""Where a run's metrics go besides its folder: TensorBoard, CSV, JSON lines, SQLite, or an object of one's own.

A sink is told by whoever follows the run (``Run.rounds``, ``wait``, ``result``, ``save``; ``fabric run --log``). It
sees rounds when they are committed, so it can change nothing of them. One that raises is left out from then on, with a
warning.
"""

from __future__ import annotations

import csv
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from icrf.errors import ConfigError
from icrf.protocol import RoundResult, RunEvent, RunInfo
from icrf.registry import Registry, is_import_path, load_attr, unknown_name

log = logging.getLogger("icrf.sinks")

MEAN = ""  # the node of a value that belongs to the whole federation


class MetricsSink(Protocol):
    """Takes the metrics of runs. Errors are the fabric's to swallow: raise whatever is natural."""

    def on_run(self, info: RunInfo) -> None:
        """A run is followed from its beginning on."""

    def on_round(self, result: RoundResult) -> None:
        """A round was committed: means in ``result.metrics``, values of nodes in ``result.node_metrics``."""

    def on_end(self, info: RunInfo) -> None:
        """The run has ended; close what is open. Not called where nobody followed it that far."""


SINKS: Registry[Callable[[str], MetricsSink]] = Registry("sink")


def open_sink(spec: str) -> MetricsSink:
    """A sink by its description.

    Args:
        spec: ``KIND:TARGET`` with a registered kind (``csv``, ``jsonl``, ``sqlite``, ``tensorboard``), or
            ``module:attr`` of a class or function that takes nothing and returns a sink.

    Raises:
        ConfigError: C010 unknown kind, C016 no target, C017 code or a package that cannot be loaded, or that raises.
    """
    kind, _, target = spec.partition(":")
    if kind in SINKS.names():
        if not target:
            raise ConfigError("C016", f"'{kind}' needs a target", place="--log", allowed=f"{kind}:PATH")
        return SINKS.get(kind)(target)
    if not is_import_path(spec):
        raise unknown_name("sink", kind, [*SINKS.names(), "module:attr"], place="--log")
    with SINKS.calling(spec):
        made: MetricsSink = load_attr(spec, SINKS.key)()
    return made


def opened(sinks: Sequence[MetricsSink | str]) -> list[MetricsSink]:
    """Sinks, those among them that are descriptions opened by :func:`open_sink`."""
    return [open_sink(sink) if isinstance(sink, str) else sink for sink in sinks]


def values_of(result: RoundResult) -> list[tuple[str, str, float]]:
    """(node, name, value) of everything that a round measured; the node of a mean is the empty text."""
    means = [(MEAN, name, value) for name, value in sorted(result.metrics.items())]
    nodes = sorted(result.node_metrics, key=lambda node: (len(node), node))
    return means + [(n, name, value) for n in nodes for name, value in sorted(result.node_metrics[n].items())]


class Sinks:
    """Tells several sinks, each event once however often it is read, and survives their failures. Thread-safe.

    Args:
        sinks: whom to tell.
        warn: told once about each sink that raised.
    """

    def __init__(self, sinks: Sequence[MetricsSink], warn: Callable[[str], None] = log.warning) -> None:
        self._sinks = list(sinks)
        self._warn = warn
        self._lock = threading.Lock()
        self.seen = 0

    def __len__(self) -> int:
        return len(self._sinks)

    def show(self, event: RunEvent, info: Callable[[], RunInfo]) -> None:
        """Tell of an event unless it was told before; `info` is asked where sinks need it."""
        with self._lock:
            if event.seq != self.seen + 1:
                return
            self.seen = event.seq
            if event.seq == 1:
                self._tell("on_run", info)
            if event.round is not None:
                result = event.round
                self._tell("on_round", lambda: result)
            if event.kind == "end":
                self._tell("on_end", info)

    def _tell(self, method: str, argument: Callable[[], Any]) -> None:
        if not self._sinks:
            return
        value = argument()
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(value)
            except Exception as error:  # noqa: BLE001 - a logger of the user's must not end his run
                self._sinks.remove(sink)
                self._warn(f"{type(sink).__name__}.{method} raised {type(error).__name__}: {error}; it is left out")


class _FileSink:
    """A text file that grows by the rounds of one run after the other; each is on its way to disk at once."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._run = ("", "")

    def on_run(self, info: RunInfo) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._run = (info.run_id, info.federation)

    def on_end(self, info: RunInfo) -> None:
        """Nothing is open."""


@SINKS.register("csv")
class CsvSink(_FileSink):
    """Rows ``run_id, federation, round, node, name, value``, after those that are in the file; means have no node."""

    def on_round(self, result: RoundResult) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(["run_id", "federation", "round", "node", "name", "value"])
            writer.writerows([*self._run, result.number, *row] for row in values_of(result))


@SINKS.register("jsonl")
class JsonlSink(_FileSink):
    """One object per round: ``run_id``, ``federation``, ``round``, ``metrics``, ``nodes``, ``model_sha256``."""

    def on_round(self, result: RoundResult) -> None:
        line = {
            "run_id": self._run[0],
            "federation": self._run[1],
            "round": result.number,
            "metrics": result.metrics,
            "nodes": result.node_metrics,
            "model_sha256": result.model_sha256,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")


@SINKS.register("sqlite")
class SqliteSink(_FileSink):
    """Table ``metrics`` (run_id, federation, round, node, name, value) of a database; a round seen again replaces."""

    def on_round(self, result: RoundResult) -> None:
        rows = [(*self._run, result.number, *row) for row in values_of(result)]
        with closing(sqlite3.connect(self._path)) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS metrics (run_id TEXT, federation TEXT, round INTEGER, node TEXT, "
                "name TEXT, value REAL, PRIMARY KEY (run_id, round, node, name))"
            )
            database.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)


@SINKS.register("tensorboard")
class TensorBoardSink:
    """Scalars of each run in a folder of its own below `folder`; needs the package ``tensorboard``."""

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package
        except ImportError as error:
            raise ConfigError(
                "C017",
                "TensorBoard is not installed",
                place="--log",
                value=f"tensorboard:{folder}",
                hint='pip install "icrf[tensorboard]", or log to csv:FILE, jsonl:FILE or sqlite:FILE',
            ) from error
        self._folder = Path(folder)
        self._open: Callable[[str], Any] = SummaryWriter
        self._writer: Any = None

    def on_run(self, info: RunInfo) -> None:
        self._writer = self._open(str(self._folder / f"{info.federation}-{info.run_id[:8]}"))

    def on_round(self, result: RoundResult) -> None:
        for node, name, value in values_of(result):
            self._writer.add_scalar(f"nodes/{name}/{node}" if node else name, value, result.number)
        self._writer.flush()

    def on_end(self, info: RunInfo) -> None:
        self._writer.close()
