"""The core of the mediator: membership, assignment and the order of rounds. Pure: events in, effects out.

It has no sockets, no database, no threads and no clock: every call brings the time, and returns
:class:`~icrf_mediator.effects.Effects` for the shell (``service.py``) to carry out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from icrf.errors import IcrfError, RunError, make_error
from icrf.ports import Write
from icrf.protocol import (
    STOP,
    TERMINAL,
    Activated,
    CallDone,
    CallNode,
    Checkpointed,
    ClusterInfo,
    ClusterReset,
    Dismiss,
    Draining,
    Goodbye,
    Heartbeat,
    Lease,
    LinkMeasured,
    MeasuredLink,
    ModelStored,
    Register,
    Reject,
    Release,
    Released,
    Relinked,
    Report,
    Reserved,
    RoundReport,
    RunEvent,
    RunInfo,
    SendMessage,
    Submission,
    Warned,
)
from icrf_mediator.admission import Admission, Planner, refuse_infeasible
from icrf_mediator.checkpoints import CHECKPOINTS
from icrf_mediator.effects import Effects, Now
from icrf_mediator.measuring import Links
from icrf_mediator.membership import Membership
from icrf_mediator.moves import Moves
from icrf_mediator.planning import check_submission, make_plan
from icrf_mediator.run_restore import request_id, restore_run, run_event, run_info
from icrf_mediator.runs import RunMachine


@dataclass(frozen=True)
class Policy:
    """Times of the membership protocol, in seconds."""

    lease_ttl_s: float = 20.0
    heartbeat_s: float = 5.0
    reserve_s: float = 60.0
    activate_s: float = 300.0


RECENT_RUNS = 64
"""How many ended runs keep their events in memory; those of older ones are read from the journal."""


@dataclass(frozen=True)
class Archived:
    """A run that is over and holds nothing any more: only its record is left.

    Attributes:
        events: None when they are in the journal only.
    """

    info: RunInfo
    events: tuple[RunEvent, ...] | None


class FederationMediator:
    """Decides what happens to federations and clusters.

    Args:
        policy: times of leases and deadlines.
        planner: makes the plans; the shell may pass one that remembers what it has made ahead.
    """

    def __init__(self, policy: Policy | None = None, planner: Planner = make_plan) -> None:
        self.policy = policy or Policy()
        self._plan = planner
        self._members = Membership(self.policy.lease_ttl_s)
        self._links = Links(self._members)
        self._admission = Admission(self._members, planner, self._links.known)
        self._moves = Moves(self._members, self._admission, self._links.known)
        self._runs: dict[str, RunMachine] = {}
        self._archive: dict[str, Archived] = {}
        self._requests: dict[str, str] = {}
        self._calls: dict[str, tuple[str, str]] = {}
        # What lost clusters, and those of an earlier life, still have to release: cluster -> run -> generation.
        self._owed: dict[str, dict[str, int]] = {}

    # ------------------------------------------------------------ restoring

    def restore(self, tables: Mapping[str, Sequence[Write]], now: Now) -> Effects:
        """Take over the journal of an earlier life. Runs that had not ended wait for their clusters and go on.

        Args:
            tables: rows of ``links``, ``submissions``, ``runs`` and the other tables of runs; of those only what
                belongs to runs that had not ended is needed.
        """
        effects = Effects()
        self._links.restore(tables.get("links", []))
        events: dict[str, list[RunEvent]] = {}
        for write in tables.get("events", []):
            events.setdefault(str(write.key[0]), []).append(run_event(write.row))
        for write in tables.get("submissions", []):
            self._requests[request_id(write.row)] = str(write.key[0])
        infos = sorted((run_info(w.row) for w in tables.get("runs", [])), key=lambda i: (i.created_at, i.run_id))
        for info in infos:
            past = events.get(info.run_id)
            if info.status in TERMINAL:
                self._archive[info.run_id] = Archived(info, None if past is None else tuple(past))
            else:
                self._runs[info.run_id] = restore_run(
                    info, tables, past or [], self._members.address, now, effects, **self._times
                )
        return effects

    @property
    def _times(self) -> dict[str, float]:
        policy = self.policy
        return {"reserve_s": policy.reserve_s, "activate_s": policy.activate_s, "lease_s": policy.lease_ttl_s}

    # ------------------------------------------------------------ SDK

    def submit(self, submission: Submission, run_id: str, now: Now, planned_s: float = 0.0) -> tuple[RunInfo, Effects]:
        """Accept a federation under `run_id`, or return the run that the same request id made before.

        Args:
            planned_s: how long its plan took to make ahead.
        """
        effects = Effects()
        known = self.made_by(submission.client_request_id)
        if known is not None:
            return known, effects
        check_submission(submission)
        clusters = self._members.clusters()
        plan, _ = self._plan(submission, clusters, self._links.known())
        if clusters:
            refuse_infeasible(plan)
        run = RunMachine(run_id, submission, now, self._members.address, **self._times)
        self._requests[submission.client_request_id] = run_id
        self._runs[run_id] = run
        run.submitted(effects, now, planned_s)
        self._admit(effects, now)
        return run.info, effects

    def made_by(self, client_request_id: str) -> RunInfo | None:
        """The run that was submitted with this request id."""
        run_id = self._requests.get(client_request_id)
        return None if run_id is None else self.get(run_id)

    def get(self, run_id: str) -> RunInfo:
        """One run by its id or a unique prefix of it."""
        return self._find(run_id).info

    def list_runs(self) -> list[RunInfo]:
        infos = [r.info for r in self._runs.values()] + [a.info for a in self._archive.values()]
        return sorted(infos, key=lambda info: (-info.created_at, info.run_id))

    def clusters(self) -> list[ClusterInfo]:
        return self._members.clusters()

    def links(self) -> tuple[MeasuredLink, ...]:
        return self._links.known()

    def measure_links(self, call_id: str, now: Now) -> Effects:
        """Measure all links; answered through ``Effects.answers``."""
        effects = Effects()
        self._links.measure(effects, now, call_id)
        return effects

    def events(self, run_id: str) -> tuple[str, Sequence[RunEvent] | None]:
        """The full id of a run and its events so far (the live list); None for those that only the journal has."""
        run = self._find(run_id)
        return run.info.run_id, run.events

    def cancel(self, run_id: str, now: Now) -> tuple[RunInfo, Effects]:
        effects = Effects()
        run = self._find(run_id)
        if isinstance(run, RunMachine):
            run.cancel(effects, now)
            self._happened(effects, now, run)
        return run.info, effects

    def advance(self, run_id: str, stage: str, rounds: int, now: Now) -> tuple[RunInfo, Effects]:
        effects = Effects()
        if stage == STOP and isinstance(self._find(run_id), Archived):
            return self.get(run_id), effects
        run = self._live(run_id)
        run.advance(effects, now, stage, rounds)
        self._happened(effects, now, run)
        return run.info, effects

    def change_nodes(self, run_id: str, add: Sequence[str], remove: Sequence[str], now: Now) -> tuple[RunInfo, Effects]:
        effects = Effects()
        run = self._live(run_id)
        run.change_nodes(effects, now, add, remove)
        return run.info, effects

    def finish(self, run_id: str, now: Now) -> tuple[RunInfo, Effects]:
        effects = Effects()
        run = self._find(run_id)
        if isinstance(run, RunMachine):
            run.finish(effects, now)
            self._happened(effects, now, run)
        return run.info, effects

    def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes, call_id: str) -> Effects:
        """Route a call to the cluster of a node; answered through ``Effects.answers``."""
        effects = Effects()
        run = self._active(run_id)
        cluster = run.cluster_of(run.node_index(node_id))
        self._calls[call_id] = (run.run_id, cluster)
        run.called(call_id)
        effects.send(cluster, CallNode(run.run_id, run.generation, call_id, node_id, method, arguments))
        return effects

    def send_message(
        self, run_id: str, recipients: Sequence[str], message: bytes, call_ids: Sequence[str]
    ) -> tuple[list[str], Effects]:
        """Route a supervisor's message to the clusters of its recipients; the call ids that will be answered."""
        effects = Effects()
        run = self._active(run_id)
        by_cluster: dict[str, list[int]] = {}
        for node_id in recipients:
            index = run.node_index(node_id)
            by_cluster.setdefault(run.cluster_of(index), []).append(index)
        used = []
        for call_id, (cluster, nodes) in zip(call_ids, sorted(by_cluster.items()), strict=False):
            self._calls[call_id] = (run.run_id, cluster)
            run.called(call_id)
            used.append(call_id)
            effects.send(cluster, SendMessage(run.run_id, run.generation, call_id, tuple(nodes), message))
        return used, effects

    # ------------------------------------------------------------ agents

    def holder(self, cluster: str, now: Now) -> str | None:
        """Whose gateway may attach for a cluster now; None: anybody's."""
        return self._members.holder(cluster, now.monotonic_s)

    def register(self, request: Register, peer: str, now: Now) -> tuple[IcrfError | None, Effects]:
        """An agent asks to serve a cluster."""
        effects = Effects()
        # A lease may be over and no tick have seen it yet: its runs must end before the name goes to a new agent.
        self._expire(effects, now, keep_stream=request.cluster)
        refusal = self._members.register(request, peer, now.monotonic_s)
        if refusal:
            return refusal, effects
        cluster = request.cluster
        effects.send(cluster, Lease(self.policy.lease_ttl_s, self.policy.heartbeat_s))
        held = {run.run_id: run for run in request.held}
        owed = {**self._owed.pop(cluster, {}), **{run_id: what.generation for run_id, what in held.items()}}
        for run_id, generation in owed.items():
            known = self._runs.get(run_id)
            if known is None or known.has_left(cluster):
                effects.send(cluster, Release(run_id, known.generation if known else generation))
                if known is not None:
                    known.owes(cluster)
        for run_id, run in list(self._runs.items()):
            if run.placement is not None and cluster in run.clusters and not run.terminal:
                self._members.take(run_id, {cluster: run.needs(run.placement, run.held_since)[cluster]})
                run.cluster_joined(effects, now, cluster, held.get(run_id))
                self._happened(effects, now, run)
            elif run.has_left(cluster) and run.holds(cluster) and run_id not in owed:
                effects.send(cluster, Release(run_id, run.generation))
        self._admit(effects, now)
        return None, effects

    def report(self, cluster: str, incarnation: str, report: Report, now: Now) -> Effects:
        """Something an agent says. Only the incarnation that holds the cluster is listened to."""
        effects = Effects()
        if not self._members.owns(cluster, incarnation):
            error = make_error("A002", f"cluster {cluster}: lease of {incarnation[:8]} is lost", hint="start again")
            effects.send(cluster, Reject(error.to_json()))
            return effects
        if isinstance(report, Heartbeat):
            self._members.heartbeat(cluster, incarnation, now.monotonic_s)
            effects.send(cluster, Lease(self.policy.lease_ttl_s, self.policy.heartbeat_s))
        elif isinstance(report, Goodbye):
            self._members.leave(cluster, incarnation)
            effects.dropped.append(cluster)
            self._lost(effects, now, cluster)
        elif isinstance(report, Draining):
            self._members.drain(cluster)
            for run in list(self._runs.values()):
                run.drain(effects, now, cluster)
        elif isinstance(report, ClusterReset):
            self._members.rebuilt(cluster, report.capacity, report.address)
            for run in list(self._runs.values()):
                run.cluster_reset(effects, now, cluster, report.reason)
        elif isinstance(report, CallDone):
            if self._calls.get(report.call_id) == (report.run_id, cluster):
                self._answered(effects, report)
        elif isinstance(report, LinkMeasured):
            self._links.measured(effects, now, cluster, report)
        elif not isinstance(report, Register):
            self._run_report(effects, now, cluster, report)
        self._dismiss(effects)
        return effects

    def _dismiss(self, effects: Effects) -> None:
        """Let agents go that want to leave and whom no run needs any more."""
        for cluster in self._members.draining():
            if all(run.may_leave(cluster) for run in self._runs.values()):
                effects.send(cluster, Dismiss(self._members.incarnation(cluster)))

    def _run_report(
        self,
        effects: Effects,
        now: Now,
        cluster: str,
        report: Reserved | Activated | RoundReport | Relinked | Checkpointed | ModelStored | Released | Warned,
    ) -> None:
        run = self._runs.get(report.run_id)
        if run is None:
            if isinstance(report, Checkpointed) and report.run_id in self._archive:
                effects.deletes.append((report.run_id, CHECKPOINTS))
            return
        try:
            if isinstance(report, Reserved):
                run.reserved(effects, now, cluster, report)
            elif isinstance(report, Activated):
                run.activated(effects, now, cluster, report)
            elif isinstance(report, RoundReport):
                run.round_report(effects, now, cluster, report)
            elif isinstance(report, Relinked):
                run.relinked(effects, now, cluster, report)
            elif isinstance(report, Checkpointed):
                run.checkpointed(effects, now, cluster, report)
            elif isinstance(report, ModelStored):
                run.model_stored(effects, now, cluster, report)
            elif isinstance(report, Warned):
                run.warned(effects, now, f"{cluster}: {report.text}")
            elif run.has_left(cluster) and (report.generation == run.generation or not run.is_queued):
                self._members.give_back(report.run_id, cluster)
                run.released(cluster)
                self._admit(effects, now)
        except IcrfError as error:
            # What a report leads to may be impossible, such as a grid for a state that diverged: the run ends with it.
            run.fail(effects, now, error)
        self._happened(effects, now, run)

    def disconnected(self, cluster: str, incarnation: str) -> None:
        """The control stream of an agent ended; its lease runs on."""
        self._members.disconnected(cluster, incarnation)

    def tick(self, now: Now) -> Effects:
        """Let time pass: leases and deadlines."""
        effects = Effects()
        self._expire(effects, now)
        self._links.tick(effects, now)
        for run in list(self._runs.values()):
            if not run.terminal:
                run.tick(effects, now)
                self._happened(effects, now, run)
        rested = [run for run in self._runs.values() if run.wakes(now)]
        if rested:
            self._admit(effects, now)
        return effects

    def commit_took(self, run_id: str, number: int, seconds: float) -> None:
        """How long a commit took to become durable; shown in the round's result."""
        if run_id in self._runs:
            self._runs[run_id].commit_took(number, seconds)

    def handled(self, report: Report, seconds: float) -> None:
        """How long it took to decide on a report, to journal that and to tell it; shown in the profile of a round."""
        if isinstance(report, RoundReport | Relinked | Checkpointed) and report.run_id in self._runs:
            self._runs[report.run_id].handled(seconds)

    # ------------------------------------------------------------ inside

    def _expire(self, effects: Effects, now: Now, keep_stream: str = "") -> None:
        for cluster in self._members.expire(now.monotonic_s):
            if cluster != keep_stream:
                effects.dropped.append(cluster)
            self._lost(effects, now, cluster)

    def _lost(self, effects: Effects, now: Now, cluster: str) -> None:
        error = make_error("A003", f"cluster {cluster} was lost during the call")
        self._settle_calls(effects, error, cluster=cluster)
        for run in list(self._runs.values()):
            run.cluster_lost(effects, now, cluster)
            self._retire(effects, run)
        self._admit(effects, now)

    def _happened(self, effects: Effects, now: Now, run: RunMachine) -> None:
        """After every event of a run: it may look for other clusters, or be over, and others have waited for that."""
        self._moves.serve(run, effects, now)
        if run.terminal:
            self._retire(effects, run)
            self._admit(effects, now)

    def _retire(self, effects: Effects, run: RunMachine) -> None:
        """Forget all of a run that is over but its record, once every cluster has released it."""
        if not run.terminal:
            return
        error = RunError("F005", f"run {run.run_id[:8]} is {run.info.status}: the call was not answered")
        self._settle_calls(effects, error, run_id=run.run_id)
        for cluster in run.holders - self._members.names():
            self._owed.setdefault(cluster, {})[run.run_id] = run.generation
            run.released(cluster)
        if run.ended and run.run_id in self._runs:
            del self._runs[run.run_id]
            self._archive[run.run_id] = Archived(run.info, tuple(run.events))
            recent = [key for key, archived in self._archive.items() if archived.events is not None]
            for key in recent[:-RECENT_RUNS]:
                self._archive[key] = replace(self._archive[key], events=None)

    def _settle_calls(self, effects: Effects, error: IcrfError, *, run_id: str = "", cluster: str = "") -> None:
        """Answer calls that nobody else will answer any more."""
        for call_id, (of_run, where) in list(self._calls.items()):
            if of_run == run_id or where == cluster:
                self._answered(effects, CallDone(of_run, call_id, error_json=error.to_json()))

    def _answered(self, effects: Effects, answer: CallDone) -> None:
        of_run, _ = self._calls.pop(answer.call_id)
        self._runs[of_run].answered(answer.call_id)
        effects.answers.append(answer)

    def _admit(self, effects: Effects, now: Now) -> None:
        """Start queued runs in the order of their submission, as far as there is room; those that have lost a cluster
        are in line too, for other clusters."""
        for run in list(self._runs.values()):
            if run.looks_for_clusters(now) and not run.by_choice:
                self._moves.serve(run, effects, now)
                self._retire(effects, run)
        for run in self._admission.admit(list(self._runs.values()), effects, now):
            self._retire(effects, run)

    def _find(self, run_id: str) -> RunMachine | Archived:
        known = self._runs.get(run_id) or self._archive.get(run_id)
        if known is not None:
            return known
        everything: dict[str, RunMachine | Archived] = {**self._archive, **self._runs}
        found = [key for key in everything if run_id and key.startswith(run_id)]
        if len(found) > 1:
            raise RunError("F004", f"run id '{run_id}' is ambiguous", allowed=", ".join(k[:12] for k in found[:5]))
        if not found:
            raise RunError("F001", f"no federation '{run_id}'", hint="`fabric list` shows them")
        return everything[found[0]]

    def _live(self, run_id: str) -> RunMachine:
        run = self._find(run_id)
        if not isinstance(run, RunMachine):
            raise RunError("F005", f"run {run.info.run_id[:8]} is {run.info.status}")
        return run

    def _active(self, run_id: str) -> RunMachine:
        run = self._live(run_id)
        if run.terminal or not run.is_activated:
            raise RunError(
                "F005",
                f"run {run.run_id[:8]} is {run.info.status}: its nodes are not live",
                hint="call materialize_all() or train() first",
            )
        return run
