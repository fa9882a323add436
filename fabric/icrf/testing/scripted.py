"""A mediator that plays a script: for tests of whatever submits, follows and fetches runs, without any cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import safetensors.numpy

from icrf.errors import IcrfError, RunError
from icrf.model_file import ARTIFACT, tensor_sha256
from icrf.protocol import (
    ACTIVATING,
    CANCELLED,
    COMPLETED,
    FAILED,
    IDLE,
    QUEUED,
    RESERVING,
    RUNNING,
    TERMINAL,
    Capacity,
    ClusterInfo,
    Fingerprint,
    LinkBytes,
    MeasuredLink,
    Plan,
    RoundResult,
    RunEvent,
    RunInfo,
    Submission,
    shared_size,
)

_FINGERPRINT = Fingerprint("2.13.0", "AVX2", "on", 1, "cpu")


@dataclass(frozen=True)
class Script:
    """What every run of a :class:`ScriptedMediator` does.

    Attributes:
        clusters: names of the registered clusters.
        num_rounds: rounds to commit; by default as many as the configuration asks for.
        error: fails the run after these rounds.
        held: the run stays ``RUNNING`` after these rounds, waiting for `waiting_for`.
        warnings: texts of warning events before the first round.
        corrupt_model: the stored model is not the committed one.
        links: what was measured between the clusters.
    """

    clusters: tuple[str, ...] = ("eu-west", "us-east")
    num_rounds: int | None = None
    error: IcrfError | None = None
    held: bool = False
    waiting_for: str = "round 3 on us-east"
    warnings: tuple[str, ...] = ()
    corrupt_model: bool = False
    links: tuple[MeasuredLink, ...] = ()


@dataclass
class _Scripted:
    info: RunInfo
    submission: Submission
    events: list[RunEvent] = field(default_factory=list)
    model: bytes = b""

    def add(self, kind: str, text: str = "", result: RoundResult | None = None) -> None:
        """Append the next event."""
        seq = len(self.events) + 1
        self.events.append(RunEvent(self.info.run_id, seq, 1000.0 + seq, kind, text, self.info.status, result))


class ScriptedMediator:
    """The :class:`icrf.ports.MediatorPort` without anything behind it. Runs do at once what the script says.

    Args:
        script: what runs do.
        on_idle: called when a watch has shown all there is and the run has not ended; it raises or changes the run.

    Attributes:
        closed: how often `close` was called.
    """

    def __init__(self, script: Script | None = None, *, on_idle: Callable[[], None] | None = None) -> None:
        self.script = script or Script()
        self.closed = 0
        self._on_idle = on_idle
        self._runs: dict[str, _Scripted] = {}
        self._by_request: dict[str, str] = {}

    # ------------------------------------------------------------ runs

    def submit(self, submission: Submission) -> RunInfo:
        """Accept a federation and play the script."""
        known = self._by_request.get(submission.client_request_id)
        if known is not None:
            return self._runs[known].info
        number = len(self._runs)
        run_id = hashlib.sha256(f"run {number}".encode()).hexdigest()[:32]
        config = json.loads(submission.config_json)
        info = RunInfo(
            run_id=run_id,
            federation=config["federation_id"],
            status=QUEUED,
            flow=submission.flow,
            rounds_done=0,
            rounds_planned=config["federated_learning_rounds"],
            clusters=self.script.clusters,
            created_at=1000.0 + number,
            config_json=submission.config_json,
        )
        run = _Scripted(info, submission)
        self._runs[run_id] = run
        self._by_request[submission.client_request_id] = run_id
        self._play(run)
        return run.info

    def _play(self, run: _Scripted) -> None:
        for status in (QUEUED, RESERVING, ACTIVATING, RUNNING):
            run.info = replace(run.info, status=status)
            run.add("status", f"{status.lower()} text")
        for text in self.script.warnings:
            run.add("warning", text)
        planned = self.script.num_rounds if self.script.num_rounds is not None else run.info.rounds_planned
        for number in range(1, planned + 1):
            result = scripted_round(number, self.script.clusters)
            run.info = replace(
                run.info,
                rounds_done=number,
                accuracy=result.metrics["accuracy"],
                bytes_inter_cluster=run.info.bytes_inter_cluster + result.bytes_inter_cluster,
            )
            run.add("round", result=result)
        if self.script.error is not None:
            run.info = replace(run.info, error_json=json.dumps(self.script.error.to_dict()))
            self._end(run, FAILED)
        elif self.script.held or run.submission.keep:
            status = RUNNING if self.script.held else IDLE
            run.info = replace(run.info, status=status, waiting_for=self.script.waiting_for)
            run.add("waiting", self.script.waiting_for)
        else:
            self._complete(run)

    def _complete(self, run: _Scripted) -> None:
        run.model = scripted_model(run.submission)
        run.info = replace(run.info, model_sha256=tensor_sha256(run.model))
        if self.script.corrupt_model:
            run.model = scripted_model(run.submission, value=0.25)
        self._end(run, COMPLETED)

    @staticmethod
    def _end(run: _Scripted, status: str) -> None:
        run.info = replace(run.info, status=status, waiting_for="", finished_at=run.info.created_at + 12.5)
        run.add("status")
        run.add("end")

    def get(self, run_id: str) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.get`."""
        return self._find(run_id).info

    def list_runs(self) -> list[RunInfo]:
        """See :meth:`icrf.ports.MediatorPort.list_runs`."""
        return [run.info for run in reversed(self._runs.values())]

    def watch(self, run_id: str, after_seq: int = 0) -> Iterator[RunEvent]:
        """See :meth:`icrf.ports.MediatorPort.watch`."""
        run = self._find(run_id)
        while True:
            while after_seq < len(run.events):
                event = run.events[after_seq]
                after_seq = event.seq
                yield event
                if event.kind == "end":
                    return
            if self._on_idle is None:
                raise RunError("F005", "the script ends here", value=run.info.status)
            self._on_idle()

    def cancel(self, run_id: str) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.cancel`."""
        run = self._find(run_id)
        if run.info.status not in TERMINAL:
            self._end(run, CANCELLED)
        return run.info

    def advance(self, run_id: str, stage: str, rounds: int = 0) -> RunInfo:
        """Changes nothing: scripted runs are as far as they get."""
        return self._find(run_id).info

    def change_nodes(self, run_id: str, add: Sequence[str] = (), remove: Sequence[str] = ()) -> RunInfo:
        """Changes nothing: scripted rounds have the nodes that they have."""
        return self._find(run_id).info

    def finish(self, run_id: str) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.finish`."""
        run = self._find(run_id)
        if run.info.status not in TERMINAL:
            self._complete(run)
        return run.info

    def _find(self, run_id: str) -> _Scripted:
        found = [key for key in self._runs if key.startswith(run_id)] if run_id else []
        if run_id in self._runs:
            found = [run_id]
        if not found:
            raise RunError("F001", f"no run {run_id!r}", hint="fabric list shows all runs")
        if len(found) > 1:
            raise RunError("F004", f"{run_id!r} begins {len(found)} run ids", allowed=", ".join(found[:5]))
        return self._runs[found[0]]

    # ------------------------------------------------------------ everything else

    def plan(self, submission: Submission) -> Plan:
        """Nodes go to the clusters in turn; bytes are those of one model per remote cluster and direction."""
        names = self.script.clusters
        assignment = {node.id: names[i % len(names)] for i, node in enumerate(submission.nodes)}
        parameters = shared_size(submission.layout)
        links = tuple(
            link
            for name in names[1:]
            for link in (LinkBytes(names[0], name, 4 * parameters), LinkBytes(name, names[0], 8 * parameters))
        )
        per_round = sum(link.bytes_per_round for link in links)
        rounds = json.loads(submission.config_json)["federated_learning_rounds"]
        edges = submission.graph.num_nodes - 1
        return Plan(
            federation=json.loads(submission.config_json)["federation_id"],
            flow=submission.flow,
            clusters=names,
            assignment=assignment,
            num_edges=2 * edges,
            cut_edges=edges,
            links=links,
            bytes_inter_cluster_per_round=per_round,
            bytes_inter_cluster_per_evaluation=0,
            bytes_inter_cluster_total=per_round * rounds,
            slem=-1.0,
            slem_kind="none",
            rounds_to_consensus=-1,
            peak_memory_bytes=300 << 20,
            slots=dict.fromkeys(names, 2),
            feasible=True,
            problems=(),
            num_parameters=parameters,
            strategy="locality",
            residents={name: list(assignment.values()).count(name) for name in names},
        )

    def clusters(self) -> list[ClusterInfo]:
        """See :meth:`icrf.ports.MediatorPort.clusters`."""
        return [
            ClusterInfo(name, f"incarnation-{name}", Capacity(2, 2.0, 0.0, 4 << 30), _FINGERPRINT, free_slots=2)
            for name in self.script.clusters
        ]

    def links(self) -> list[MeasuredLink]:
        """What the script says."""
        return list(self.script.links)

    def measure_links(self) -> list[MeasuredLink]:
        """The same."""
        return self.links()

    def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes:
        """Echoes the arguments."""
        self._find(run_id)
        return arguments

    def send_message(self, run_id: str, recipients: Sequence[str], message: bytes) -> None:
        """Accepts any message for an existing run."""
        self._find(run_id)

    def fetch(self, run_id: str, artifact: str) -> Iterator[bytes]:
        """See :meth:`icrf.ports.MediatorPort.fetch`."""
        run = self._find(run_id)
        if artifact != ARTIFACT or not run.model:
            raise RunError("F006", f"run {run_id} has no artifact {artifact!r}")
        return iter([run.model[i : i + 1000] for i in range(0, len(run.model), 1000)])

    def close(self) -> None:
        """See :meth:`icrf.ports.MediatorPort.close`."""
        self.closed += 1


def scripted_round(number: int, clusters: Sequence[str]) -> RoundResult:
    """Round `number` of every script: the loss halves, the accuracy closes in on one."""
    loss = 2.0 * 0.6**number
    return RoundResult(
        number=number,
        attempt=1,
        generation=1,
        wall_s=1.0 + number / 8,
        train_s=0.75,
        exchange_s=0.125,
        commit_s=0.001,
        metrics={"train_loss": loss * 0.9, "loss": loss, "accuracy": 1.0 - 0.7**number},
        bytes_inter_cluster=40_000 * (len(clusters) - 1),
        bytes_intra_cluster=80_000,
        participants=10,
        model_sha256=hashlib.sha256(f"round {number}".encode()).hexdigest(),
        parent_sha256=hashlib.sha256(f"round {number - 1}".encode()).hexdigest(),
        bytes_by_cluster=dict.fromkeys(clusters, 40_000 * (len(clusters) - 1) // len(clusters)),
    )


def scripted_model(submission: Submission, value: float = 0.5) -> bytes:
    """A safetensors file of the submission's layout, every element `value`."""
    return safetensors.numpy.save({t.name: np.full(t.shape, value, dtype=t.dtype) for t in submission.layout})
