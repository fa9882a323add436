"""The shell around the agent's core: it carries instructions to the cluster's runtime and outcomes to the mediator.

One asyncio loop; the core is called synchronously, every action runs as its own task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from icrf import __version__, failpoints
from icrf.errors import IcrfError, InternalError, error_from_json
from icrf.ports import AgentLink, ClusterFacts, ClusterRuntime, PhaseReport
from icrf.protocol import (
    PROTOCOL_VERSION,
    Activate,
    Activated,
    CallDone,
    CallNode,
    Checkpointed,
    ClusterReset,
    Dismiss,
    Draining,
    Goodbye,
    Heartbeat,
    Instruction,
    Lease,
    LinkMeasured,
    MeasureLink,
    ModelStored,
    Register,
    Reject,
    Release,
    Released,
    Relink,
    Relinked,
    Reserve,
    SaveCheckpoint,
    SendMessage,
    StartRound,
    StoreModel,
)
from icrf_agent.core import Action, Advance, AgentCore, Discard, Perform, Say, failure
from icrf_agent.journal import AgentJournal
from icrf_agent.kept import part_of
from icrf_agent.recovery import RETRY
from icrf_agent.round_machine import ADAPT, AGGREGATE, EVALUATE, INSTALL, PUBLISH, SEND, TRAIN

log = logging.getLogger("icrf.agent")

CHUNK_BYTES = 1 << 20
DRAIN_S = 60.0
# How long to ask for the mediator's consent when it has not answered for so many heartbeats.
DRAIN_UNHEARD_S, UNHEARD_BEATS = 2.0, 2
DRAIN_POLL_S = 0.5
# How long to wait before a round that has failed is tried again: nothing at first, then twice as long each time.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0
LEASE_LOST = "A002"
_PHASE_OF = {
    PUBLISH: "train",
    TRAIN: "train",
    SEND: "exchange",
    AGGREGATE: "aggregate",
    EVALUATE: "aggregate",
    INSTALL: "aggregate",
    ADAPT: "aggregate",
}
_PHASE_BY_ORDER: dict[type, str] = {Reserve: "reserve", Activate: "activate", StoreModel: "result"}


@dataclass(frozen=True)
class AgentIdentity:
    """Who this agent is; a new incarnation at every start."""

    cluster: str
    incarnation: str
    labels: dict[str, str] = field(default_factory=dict)
    agent_id: str = ""


class AgentService:
    """Serves one cluster until it is stopped or refused.

    Args:
        identity: cluster name, incarnation and labels.
        link: the control stream to the mediator.
        runtime: the cluster that computes.
        journal: what a restarted agent has to know; None where the agent does not outlive its cluster.
    """

    def __init__(
        self, identity: AgentIdentity, link: AgentLink, runtime: ClusterRuntime, journal: AgentJournal | None = None
    ) -> None:
        self._identity, self._link, self._runtime, self._journal = identity, link, runtime, journal
        self._core = AgentCore(identity.cluster)
        self._tasks: set[asyncio.Task[None]] = set()
        self._facts: ClusterFacts | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._heartbeat_s = self._heard_s = 0.0
        self._refusal: IcrfError | None = None
        self.registered = asyncio.Event()
        self._dismissed = asyncio.Event()
        # By run: the round that failed last because something had died, and how often in a row.
        self._failures: dict[str, tuple[int, int]] = {}
        # Runs that are being released: who reserves for one again waits for that.
        self._releasing: dict[str, asyncio.Event] = {}

    async def start(self) -> ClusterFacts:
        """Start the runtime and take over what an earlier life of this agent left on the cluster."""
        self._facts = await self._runtime.start()
        if self._journal is not None:
            for run_id in self._journal.reservations():
                self._core.inherited(run_id)
            for activation in self._journal.activations():
                held = await self._runtime.adopt(activation)
                if held is None:
                    continue
                self._core.adopted(activation, held)
                log.info("took over run %s in round %d", activation.run_id[:8], held.round)
        self._spawn(self._watch_arrivals())
        self._spawn(self._watch_cluster())
        return self._facts

    async def serve(self) -> None:
        """Serve until `stop`; raises the mediator's refusal (A001, P004) if there was one.

        An agent whose lease ran out while it was cut off registers again and is told what is left of its work.
        """
        while True:
            await self._link.run(self._register, self._deliver)
            if self._refusal is None:
                return
            refusal, self._refusal = self._refusal, None
            if refusal.code != LEASE_LOST:
                raise refusal
            log.warning("%s; registering again", refusal)

    async def drain(self, within_s: float = DRAIN_S) -> bool:
        """Leave in order: the open rounds end and their state becomes durable.

        Returns:
            False if that took longer than `within_s`, or the mediator is away.
        """
        if not self.registered.is_set() or not self._core.held():
            return True
        self._link.report(Draining(self._identity.incarnation))
        began = time.monotonic()
        while not self._dismissed.is_set():
            now = time.monotonic()
            unheard = now - self._heard_s > UNHEARD_BEATS * self._heartbeat_s
            left_s = began + (min(DRAIN_UNHEARD_S, within_s) if unheard else within_s) - now
            if left_s <= 0.0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dismissed.wait(), min(left_s, DRAIN_POLL_S))
        return True

    async def stop(self) -> None:
        """Say goodbye, end all tasks, close link and runtime; harmless when called twice."""
        self._link.report(Goodbye(self._identity.incarnation, "stopped"))
        await self._link.close()
        tasks = [t for t in (*self._tasks, self._heartbeat) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._heartbeat = None
        await self._runtime.close()

    # ------------------------------------------------------------ the link

    def _register(self) -> Register:
        assert self._facts is not None
        return Register(
            cluster=self._identity.cluster,
            incarnation=self._identity.incarnation,
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            capacity=self._facts.capacity,
            fingerprint=self._facts.fingerprint,
            labels=dict(self._identity.labels),
            address=self._facts.gateway_address,
            agent_id=self._identity.agent_id,
            held=self._core.held(),
        )

    def _deliver(self, instruction: Instruction) -> None:
        if isinstance(instruction, Lease):
            self.registered.set()
            self._heard_s, self._heartbeat_s = time.monotonic(), instruction.heartbeat_s
            if self._heartbeat is None:
                self._heartbeat = asyncio.create_task(self._beat(instruction.heartbeat_s))
        elif isinstance(instruction, Dismiss):
            self._dismissed.set()
        elif isinstance(instruction, Reject):
            self._refusal = error_from_json(instruction.error_json)
            self.registered.set()
        self._act(self._core.instructed(instruction, time.monotonic()))

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            self._link.report(Heartbeat(self._identity.incarnation))

    async def _watch_arrivals(self) -> None:
        async def watch() -> None:
            async for arrival in self._runtime.arrivals():
                self._act(self._core.arrived(arrival, time.monotonic()))

        try:
            await guarded(watch)
        except IcrfError as error:
            # Deaf to other clusters, this one would keep every round waiting until its deadline.
            log.error("cluster %s receives no payloads any more: %s", self._identity.cluster, error)
            self._refusal = error
            await self._link.close()

    async def _watch_cluster(self) -> None:
        """When the cluster itself dies, build it anew; the mediator decides what becomes of its runs."""
        while True:
            reason = await self._runtime.lost()
            log.warning("the Ray cluster of %s is lost (%s); building it again", self._identity.cluster, reason)
            self._core.reset()
            try:
                facts = self._facts = await guarded(self._runtime.rebuild)
            except IcrfError as error:
                self._refusal = error
                await self._link.close()
                return
            self._link.report(ClusterReset(self._identity.incarnation, reason, facts.capacity, facts.gateway_address))

    # ------------------------------------------------------------ actions

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Say):
                self._link.report(action.report)
            elif isinstance(action, Perform):
                self._spawn(self._perform(action.instruction))
            elif isinstance(action, Advance):
                self._spawn(self._advance(action))
            elif isinstance(action, Discard):
                self._spawn(self._runtime.abort(action.run_id, action.round, action.attempt, action.ahead))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", exc_info=task.exception())

    async def _advance(self, action: Advance) -> None:
        began = time.monotonic()
        try:
            result = await guarded(lambda: self._run_step(action))
        except IcrfError as error:
            if not self._core.is_open(action.start):
                return  # an attempt that was given up meanwhile
            log.warning("round %d on %s: %s", action.start.round, self._identity.cluster, error)
            recovery, error = await self._heal(action.start.run_id, error)
            if recovery == RETRY:
                await asyncio.sleep(self._pause_s(action.start))
            self._act(self._core.step_failed(action.start, error, recovery))
            return
        now = time.monotonic()
        self._act(self._core.step_done(action.start, action.step, result, now - began, now))

    def _pause_s(self, start: StartRound) -> float:
        """What died on another cluster takes its time to come back there, and whoever needs it fails at once."""
        number, times = self._failures.get(start.run_id, (0, 0))
        times = times + 1 if number == start.round else 1
        self._failures[start.run_id] = start.round, times
        return 0.0 if times == 1 else min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (times - 2))

    async def _heal(self, run_id: str, error: IcrfError) -> tuple[str, IcrfError]:
        """Bring back what died: the recovery it takes, and the error to report."""
        try:
            return await guarded(lambda: self._runtime.recover(run_id, error)), error
        except IcrfError as worse:
            return "", worse

    async def _run_step(self, action: Advance) -> PhaseReport | None:
        start, step, runtime = action.start, action.step, self._runtime
        failpoints.reached(_PHASE_OF[step.kind], start.round)
        if step.kind == TRAIN:
            return await runtime.train(start.run_id, start, action.ahead)
        if step.kind == AGGREGATE:
            return await runtime.aggregate(start.run_id, start)
        if step.kind == EVALUATE:
            return await runtime.evaluate(start.run_id, start)
        if step.kind == INSTALL:
            return await runtime.install(start.run_id, start)
        if step.kind == ADAPT:
            return await runtime.adapt(start.run_id, start)
        if step.kind == PUBLISH:
            await runtime.publish_model(start.run_id, start, action.ahead)
        elif step.kind == SEND and step.transfer is not None:
            await runtime.send_payload(start.run_id, start, step.transfer)
        return None

    async def _perform(self, instruction: Instruction) -> None:
        try:
            await guarded(lambda: self._carry_out(instruction))
        except IcrfError as error:
            log.warning("%s on %s: %s", type(instruction).__name__, self._identity.cluster, error)
            if error.code == "L001":
                return  # the mediator is away; it asks again when it is back
            if isinstance(instruction, Activate | Relink):
                _, error = await self._heal(instruction.run_id, error)
            if report := failure(instruction, error):
                self._link.report(report)

    async def _carry_out(self, instruction: Instruction) -> None:
        runtime, report = self._runtime, self._link.report
        if type(instruction) in _PHASE_BY_ORDER:
            failpoints.reached(_PHASE_BY_ORDER[type(instruction)])
        if isinstance(instruction, Reserve):
            if instruction.run_id in self._releasing:
                await self._releasing[instruction.run_id].wait()
            if self._journal is not None:
                await asyncio.to_thread(self._journal.reserve, instruction.run_id)
            await runtime.reserve(instruction)
            self._act(self._core.reserved(instruction))
        elif isinstance(instruction, Activate):
            report(await self._activate(instruction))
        elif isinstance(instruction, Relink):
            activation = await runtime.relink(instruction)
            if self._journal is not None:
                await asyncio.to_thread(self._journal.remember, activation)
            report(Relinked(instruction.run_id, instruction.generation))
        elif isinstance(instruction, SaveCheckpoint):
            await self._save_checkpoint(instruction)
        elif isinstance(instruction, Release):
            await self._release(instruction)
        elif isinstance(instruction, CallNode):
            value = await runtime.call_node(
                instruction.run_id, instruction.node_id, instruction.method, instruction.arguments
            )
            artifact = f"call/{instruction.call_id}"
            await self._link.upload(instruction.run_id, artifact, chunks_of(value))
            report(CallDone(instruction.run_id, instruction.call_id, artifact))
        elif isinstance(instruction, SendMessage):
            await runtime.send_message(instruction.run_id, instruction.recipients, instruction.message)
            report(CallDone(instruction.run_id, instruction.call_id))
        elif isinstance(instruction, MeasureLink):
            speed = await runtime.measure(instruction.peer)
            report(LinkMeasured(instruction.measurement, speed.bytes_per_s, speed.rtt_s))
        elif isinstance(instruction, StoreModel):
            await self._store_model(instruction)

    async def _activate(self, order: Activate) -> Activated:
        parts = [await self._link.download(order.run_id, artifact) for artifact in order.checkpoints]
        checkpoint = await asyncio.to_thread(part_of, order, self._identity.cluster, parts)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.remember, order)
        report = await self._runtime.activate(order, checkpoint)
        self._core.activated(order.run_id, order.generation)
        return report

    async def _release(self, order: Release) -> None:
        over = self._releasing[order.run_id] = asyncio.Event()
        try:
            self._failures.pop(order.run_id, None)
            await self._runtime.release(order.run_id)
            if self._journal is not None:
                self._journal.forget(order.run_id)
        finally:
            over.set()
            if self._releasing.get(order.run_id) is over:
                del self._releasing[order.run_id]
        self._link.report(Released(order.run_id, order.generation))

    async def _save_checkpoint(self, order: SaveCheckpoint) -> None:
        data = await self._runtime.checkpoint(order.run_id, order.round)
        artifact = f"checkpoint/{order.round}.{order.generation}/{self._identity.cluster}"
        sha256 = await self._link.upload(order.run_id, artifact, chunks_of(data))
        self._link.report(Checkpointed(order.run_id, order.generation, order.round, artifact, sha256))

    async def _store_model(self, order: StoreModel) -> None:
        model = await self._runtime.final_model(order.run_id, order.round)
        artifact = "model.safetensors"
        await self._link.upload(order.run_id, artifact, chunks_of(model.safetensors))
        self._link.report(ModelStored(order.run_id, order.generation, order.round, artifact, model.sha256))


def chunks_of(data: bytes) -> Any:
    """Slices of at most 1 MiB."""
    view = memoryview(data)
    return (bytes(view[i : i + CHUNK_BYTES]) for i in range(0, len(view), CHUNK_BYTES))


async def guarded(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run `work`; whatever is no IcrfError becomes X001, with its traceback in the log and not on the wire."""
    try:
        return await work()
    except (IcrfError, asyncio.CancelledError):
        raise
    except Exception as error:  # the last line of defence of a daemon: nothing may end a task in silence
        log.exception("unexpected")
        raise InternalError(
            "X001", f"{type(error).__name__}: {error}", hint="the agent's log has the traceback"
        ) from error
