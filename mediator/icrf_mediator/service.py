"""The shell around the mediator's core: it brings the time, carries out effects, and keeps watchers informed.

Everything here runs on one asyncio loop; the core is called synchronously, so decisions never interleave. Effects
are carried out in the order writes, instructions, answers, events: what is told is already durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from icrf.errors import LocalError, RunError, error_from_json
from icrf.ports import AgentPort, BlobStore, BlobWriter, Clock, FederationStore
from icrf.protocol import (
    TERMINAL,
    CallDone,
    ClusterInfo,
    ClusterReset,
    MeasuredLink,
    Plan,
    Register,
    Reject,
    Report,
    RunEvent,
    RunInfo,
    Submission,
)
from icrf_mediator.effects import Effects, Now
from icrf_mediator.fail_places import BEFORE, DURABLE, TOLD, pass_by
from icrf_mediator.feasibility import fingerprint_differences
from icrf_mediator.mediator import FederationMediator, Policy
from icrf_mediator.plan_memo import PlanMemo
from icrf_mediator.planning import make_plan
from icrf_mediator.run_restore import run_event

log = logging.getLogger("icrf.mediator")

TICK_S = 0.5
CALL_TIMEOUT_S = 600.0
PLAN_ARTIFACT = "plan.json"
_OF_UNFINISHED_RUNS = (
    "goals",
    "assignments",
    "activations",
    "members",
    "participants",
    "graphs",
    "relinks",
    "commits",
    "checkpoints",
    "events",
)


@dataclass(frozen=True)
class Session:
    """One control stream of an agent."""

    cluster: str
    incarnation: str
    port: AgentPort


class MediatorService:
    """What the servicers and the in-process adapters call.

    Args:
        store: the journal.
        blobs: models and results of node calls.
        clock: time.
        policy: times of leases and deadlines.
        reach: where others dial the gateway of a cluster that listens at an address; None: there. An embedded fabric
            has a line in between.
    """

    def __init__(
        self,
        store: FederationStore,
        blobs: BlobStore,
        clock: Clock,
        policy: Policy | None = None,
        *,
        reach: Callable[[str, str], str] | None = None,
    ) -> None:
        self._reach = reach or (lambda cluster, address: address)
        self._plans = PlanMemo()
        self._core = FederationMediator(policy, self._plans)
        # Decisions that the journal has not taken yet: until it has, nobody is told or instructed.
        self._backlog: deque[tuple[Effects, Session | None]] = deque()
        self._store, self._blobs, self._clock = store, blobs, clock
        self._sessions: dict[str, Session] = {}
        self._by_cluster: dict[str, str] = {}
        self._calls: dict[str, asyncio.Future[CallDone]] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Replay the journal and let time pass."""
        tables = {name: self._store.rows(name) for name in ("submissions", "runs", "links")}
        unfinished = [write.key for write in tables["runs"] if write.row["status"] not in TERMINAL]
        for name in _OF_UNFINISHED_RUNS:
            tables[name] = [write for key in unfinished for write in self._store.rows(name, key)]
        self._carry_out(self._core.restore(tables, self._now()))
        self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        """Stop the clock and end every agent's stream; harmless when called twice."""
        if self._ticker:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None
        for session in list(self._sessions.values()):
            session.port.disconnect()
        self._sessions.clear()

    # ------------------------------------------------------------ SDK

    async def submit(self, submission: Submission) -> RunInfo:
        # Made ahead: planning a large graph takes longer than the loop may be kept from heartbeats.
        began = time.perf_counter()
        if self._core.made_by(submission.client_request_id) is None:
            await asyncio.to_thread(self._plans, submission, self._core.clusters(), self._core.links())
        planned_s = time.perf_counter() - began
        info, effects = self._core.submit(submission, uuid.uuid4().hex, self._now(), planned_s)
        self._carry_out(effects)
        return info

    async def plan(self, submission: Submission) -> Plan:
        plan, _ = await asyncio.to_thread(make_plan, submission, self._core.clusters(), self._core.links())
        return plan

    async def get(self, run_id: str) -> RunInfo:
        return self._core.get(run_id)

    async def list_runs(self) -> list[RunInfo]:
        return self._core.list_runs()

    async def clusters(self) -> list[ClusterInfo]:
        return self._core.clusters()

    async def links(self) -> list[MeasuredLink]:
        return list(self._core.links())

    async def measure_links(self) -> list[MeasuredLink]:
        """Measure every link each way; blocks this task until it is done."""
        call_id = uuid.uuid4().hex
        effects = self._core.measure_links(call_id, self._now())
        future = self._expect(call_id)
        self._carry_out(effects)
        await self._answer(call_id, future)
        return await self.links()

    async def watch(self, run_id: str, after_seq: int = 0) -> AsyncIterator[RunEvent]:
        """Past events after `after_seq`, then live ones; ends with the ``end`` event."""
        full_id, _ = self._core.events(run_id)
        changed = asyncio.Event()
        self._watchers.setdefault(full_id, set()).add(changed)
        after_seq = max(0, after_seq)
        try:
            while True:
                changed.clear()
                # Asked first: the events of a run that is over are all there.
                is_over = self._core.get(full_id).status in TERMINAL
                for event in await self._events_after(full_id, after_seq):
                    after_seq = event.seq
                    yield event
                if is_over:
                    return
                await changed.wait()
        finally:
            self._watchers[full_id].discard(changed)
            if not self._watchers[full_id]:
                del self._watchers[full_id]

    async def _events_after(self, full_id: str, after_seq: int) -> list[RunEvent]:
        _, events = self._core.events(full_id)
        if events is not None:
            return list(events[after_seq:])
        rows = await asyncio.to_thread(self._store.rows, "events", (full_id,))
        return [run_event(write.row) for write in rows[after_seq:]]

    async def cancel(self, run_id: str) -> RunInfo:
        return self._outcome(*self._core.cancel(run_id, self._now()))

    async def advance(self, run_id: str, stage: str, rounds: int) -> RunInfo:
        return self._outcome(*self._core.advance(run_id, stage, rounds, self._now()))

    async def change_nodes(self, run_id: str, add: Sequence[str], remove: Sequence[str]) -> RunInfo:
        return self._outcome(*self._core.change_nodes(run_id, add, remove, self._now()))

    async def finish(self, run_id: str) -> RunInfo:
        return self._outcome(*self._core.finish(run_id, self._now()))

    async def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes:
        """Call a node's method on whatever cluster it lives; blocks this task until its result is here."""
        call_id = uuid.uuid4().hex
        effects = self._core.call_node(run_id, node_id, method, arguments, call_id)
        future = self._expect(call_id)
        self._carry_out(effects)
        done = await self._answer(call_id, future)
        return b"".join(await asyncio.to_thread(self._take_result, done)) if done.artifact else b""

    async def send_message(self, run_id: str, recipients: Sequence[str], message: bytes) -> None:
        """Deliver a supervisor's message; returns when every recipient's mailbox has it."""
        call_ids = [uuid.uuid4().hex for _ in recipients]
        used, effects = self._core.send_message(run_id, recipients, message, call_ids)
        futures = {call_id: self._expect(call_id) for call_id in used}
        self._carry_out(effects)
        outcomes = await asyncio.gather(
            *(self._answer(call_id, future) for call_id, future in futures.items()), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def fetch(self, run_id: str, artifact: str) -> Iterator[bytes]:
        """The bytes of an artifact in chunks; F006 at once when there is none.

        ``plan.json`` is the plan in force, out of the journal; everything else comes from the blob store.
        """
        full_id = self._core.get(run_id).run_id
        rows = self._store.rows("assignments", (full_id,)) if artifact == PLAN_ARTIFACT else []
        if rows:
            return iter([json.dumps(rows[-1].row["plan"]).encode()])
        return self._blobs.read(full_id, artifact)

    # ------------------------------------------------------------ agents

    def holder(self, cluster: str) -> str | None:
        """Whose gateway may attach for a cluster now; None: anybody's. Of the event loop."""
        return self._core.holder(cluster, self._now())

    async def agent_connected(self, register: Register, port: AgentPort, peer: str) -> str:
        """Admit an agent's stream; a refused one gets a Reject through its port. Returns the session id."""
        session_id = uuid.uuid4().hex
        register = replace(register, address=self._reach(register.cluster, register.address))
        refusal, effects = self._core.register(register, peer, self._now())
        self._sessions[session_id] = Session(register.cluster, register.incarnation, port)
        if refusal:
            # Others may have lost their leases meanwhile: that was decided too.
            self._carry_out_in_time(effects)
            log.warning("refused an agent: %s", refusal)
            port.send(Reject(refusal.to_json()))
            return session_id
        older = self._sessions.get(self._by_cluster.get(register.cluster, ""))
        self._by_cluster[register.cluster] = session_id
        if older is not None:
            # A stream that broke without a word: what is sent there would go nowhere.
            older.port.disconnect()
        log.info("cluster %s registered from %s", register.cluster, peer)
        clusters = sorted(self._core.clusters(), key=lambda info: info.name != register.cluster)
        for difference in fingerprint_differences(clusters, "cuda"):
            # It may serve, alone or with its like: what a run may mix is for its `determinism` to say.
            log.warning("%s", difference)
        self._carry_out_in_time(effects)
        return session_id

    async def agent_report(self, session: str, report: Report) -> None:
        """Something an agent says over its stream."""
        who = self._sessions.get(session)
        if who is not None:
            if isinstance(report, ClusterReset):
                report = replace(report, address=self._reach(who.cluster, report.address))
            began = time.perf_counter()
            self._carry_out_in_time(self._core.report(who.cluster, who.incarnation, report, self._now()), who)
            self._core.handled(report, time.perf_counter() - began)

    async def agent_disconnected(self, session: str) -> None:
        """The stream of an agent ended."""
        who = self._sessions.pop(session, None)
        if who is not None and self._by_cluster.get(who.cluster) == session:
            del self._by_cluster[who.cluster]
            self._core.disconnected(who.cluster, who.incarnation)

    def upload_writer(self, run_id: str, artifact: str) -> BlobWriter:
        """A sink for an artifact of a run; F005 when the run is over."""
        info = self._core.get(run_id)
        if info.status in TERMINAL:
            raise RunError("F005", f"run {info.run_id[:8]} is {info.status}: it takes no artifact", place="artifact")
        return self._blobs.writer(info.run_id, artifact)

    # ------------------------------------------------------------ inside

    def _now(self) -> Now:
        return Now(self._clock.monotonic_s(), self._clock.wall_s())

    def _outcome(self, info: RunInfo, effects: Effects) -> RunInfo:
        self._carry_out(effects)
        return info

    def _carry_out(self, effects: Effects, reporter: Session | None = None) -> None:
        """Carry out one decision, after those that still wait for the journal.

        The core has decided and cannot go back. So a decision that the disk refuses is kept, with all that follows it,
        until the disk takes it: what is told stays durable and in order.

        Raises:
            LocalError: L005 or L007 while the journal cannot be written.
        """
        self._backlog.append((effects, reporter))
        while self._backlog:
            try:
                self._write(self._backlog[0][0])
            except LocalError:
                raise
            except BaseException:
                # A defect, no full disk: trying again would hold up everything behind it for ever.
                self._backlog.popleft()
                raise
            self._tell(*self._backlog.popleft())

    def _carry_out_in_time(self, effects: Effects, reporter: Session | None = None) -> None:
        """Like `_carry_out` for callers that cannot do anything about the disk: the clock tries again."""
        try:
            self._carry_out(effects, reporter)
        except LocalError as error:
            log.error("%s; trying again", error)

    def _write(self, effects: Effects) -> None:
        pass_by(effects, BEFORE)
        if effects.writes:
            began = time.perf_counter()
            self._store.apply(effects.writes)
            took = time.perf_counter() - began
            for event in effects.events:
                if event.round is not None:
                    self._core.commit_took(event.run_id, event.round.number, took)
        pass_by(effects, DURABLE)

    def _tell(self, effects: Effects, reporter: Session | None) -> None:
        """Instructions, answers, events. A refused reporter (it lost its lease) is answered on its own stream."""
        for cluster, instruction in effects.sends:
            session = self._sessions.get(self._by_cluster.get(cluster, ""))
            if isinstance(instruction, Reject) and reporter is not None:
                reporter.port.send(instruction)
            elif session is not None:
                session.port.send(instruction)
        pass_by(effects, TOLD)
        for answer in effects.answers:
            future = self._calls.get(answer.call_id)
            if future is not None and not future.done():
                future.set_result(answer)
            elif answer.artifact:
                # Nobody waits for it any more.
                self._blobs.delete_run(answer.run_id, answer.artifact)
        for run_id, artifact in effects.deletes:
            self._blobs.delete_run(run_id, artifact)
        for cluster in effects.dropped:
            session = self._sessions.get(self._by_cluster.get(cluster, ""))
            if session is not None:
                session.port.disconnect()
        for run_id in {event.run_id for event in effects.events}:
            for changed in self._watchers.get(run_id, ()):
                changed.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._carry_out_in_time(self._core.tick(self._now()))
            except Exception:
                # Leases and deadlines of all runs hang on this task: it must outlive a defect in one of them.
                log.exception("a tick failed")

    def _expect(self, call_id: str) -> asyncio.Future[CallDone]:
        future: asyncio.Future[CallDone] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        return future

    async def _answer(self, call_id: str, future: asyncio.Future[CallDone]) -> CallDone:
        try:
            done = await asyncio.wait_for(future, CALL_TIMEOUT_S)
        except TimeoutError as error:
            raise RunError("F002", f"the call was not answered within {CALL_TIMEOUT_S:.0f} s") from error
        finally:
            self._calls.pop(call_id, None)
        if done.error_json:
            raise error_from_json(done.error_json)
        return done

    def _take_result(self, done: CallDone) -> list[bytes]:
        chunks = list(self._blobs.read(done.run_id, done.artifact))
        self._blobs.delete_run(done.run_id, done.artifact)
        return chunks
