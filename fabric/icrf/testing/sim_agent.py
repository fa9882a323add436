"""The shell around the agent's core in a simulation: it carries out actions as ``service.py`` does, one task each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from icrf.errors import IcrfError, error_from_json, make_error
from icrf.ports import Arrival, ModelFile, PayloadHeader
from icrf.protocol import (
    PROTOCOL_VERSION,
    Activate,
    Activated,
    Capacity,
    Checkpointed,
    ClusterReset,
    Dismiss,
    Draining,
    Fingerprint,
    Goodbye,
    Heartbeat,
    Instruction,
    Lease,
    ModelStored,
    Register,
    Reject,
    Release,
    Released,
    Relink,
    Relinked,
    Report,
    Reserve,
    Reserved,
    RoundReport,
    SaveCheckpoint,
    StoreModel,
)
from icrf.testing.sim_cluster import SimCluster
from icrf.testing.sim_mediator import Connection, SimMediator
from icrf.testing.sim_world import World
from icrf_agent.core import Action, Advance, AgentCore, Discard, Perform, Say, failure
from icrf_agent.round_machine import ADAPT, AGGREGATE, EVALUATE, INSTALL, PUBLISH, SEND, TRAIN

FINGERPRINT = Fingerprint("sim", "sim", "off", 1, "cpu")
LEASE_LOST = "A002"
DRAIN_S = 60.0
REBUILD_S = (3.0, 40.0)
REDIAL_S = (0.05, 3.0)
REMEMBERED = 12

OfRun = Reserved | Activated | RoundReport | Checkpointed | ModelStored


class SimAgent:
    """An agent's process on one cluster, with its journal.

    Args:
        cluster: the cluster it serves.
        world: time and chance.
        mediator: whom it dials.
        agent_id: the same in all its lives.
    """

    def __init__(self, cluster: SimCluster, world: World, mediator: SimMediator, agent_id: str) -> None:
        self.cluster, self.agent_id = cluster, agent_id
        self.up, self.draining = False, False
        self.life = 0
        self.cut_off = False
        self._world, self._mediator = world, mediator
        self._journal: dict[str, Activate] = {}
        self._reservations: set[str] = set()
        self._core = AgentCore(cluster.name)
        self._connection: Connection | None = None
        self._registered = False
        self._outbox: deque[Report] = deque()
        self._said: deque[OfRun] = deque(maxlen=REMEMBERED)
        self._seen: set[PayloadHeader] = set()
        self._beating = False
        cluster.listener = self._arrived

    # ------------------------------------------------------------ life

    @property
    def incarnation(self) -> str:
        """One life of the process."""
        return f"{self.agent_id}-{self.life}"

    @property
    def registered(self) -> bool:
        """Whether the mediator has answered."""
        return self._registered

    def boot(self) -> None:
        """Start, and take over what an earlier life has left on the cluster."""
        self.life += 1
        self.up, self.draining, self._registered, self._beating = True, False, False, False
        self._core, self._connection = AgentCore(self.cluster.name), None
        self._outbox, self._seen = deque(), set()
        self.cluster.rebuild()
        for run_id in sorted(self._reservations):
            self._core.inherited(run_id)
        for _, activation in sorted(self._journal.items()):
            held = self.cluster.adopt(activation)
            if held is not None:
                self._core.adopted(activation, held)
        for arrival in self.cluster.manager.arrived():
            self._task(0.0, 0.2, lambda a=arrival: self._arrived(a))  # type: ignore[misc]
        self._redial()

    def die(self) -> None:
        """The process is killed; hosts and manager live on, and a supervisor starts it again."""
        if not self.up:
            return
        self._end()
        self.cluster.agent_died()
        self._world.soon(0.5, 45.0, ("agent of", self.cluster.name, "starts"), self.boot)

    def drain(self) -> None:
        """Leave in order, and come back later."""
        if not self.up or self.draining:
            return
        self.draining = True
        if not self._registered or not self._core.held():
            return self._stop()
        self._say(Draining(self.incarnation))
        self._task(DRAIN_S, DRAIN_S, self._stop)

    def lose_cluster(self) -> None:
        """The cluster dies under the agent, which builds it anew."""
        self.cluster.lose()
        if not self.up:
            return
        self._core.reset()
        self._task(*REBUILD_S, self._rebuilt)

    def cut(self, for_s: float) -> None:
        """Nothing gets through to the mediator for a while; work goes on."""
        self.cut_off = True
        if self._connection:
            self._connection.break_off()
        self._world.after(for_s, ("line of", self.cluster.name, "is back"), self._mend)

    def break_connection(self) -> None:
        """The control stream breaks once."""
        if self._connection:
            self._connection.break_off()

    def stall_connection(self, for_s: float) -> None:
        """What the agent says is held back."""
        if self._connection:
            self._connection.upwards.stall(for_s)

    def replay(self) -> bool:
        """What was said of runs is said again, much later; best under another generation. False if nothing was."""
        if not self._said:
            return False
        now = {run_id: order.generation for run_id, order in self._journal.items()}
        fenced = [r for r in self._said if r.generation < now.get(r.run_id, 0)]
        for report in self._world.rng.choices(fenced or self._said, k=8):
            self._task(0.0, 20.0, lambda r=report: self._say(r))  # type: ignore[misc]
        return True

    def rival(self) -> None:
        """Another agent asks for the same cluster; if it gets it, it leaves at once."""
        who = f"rival-{self.cluster.name}-{self._world.steps}"

        def deliver(instruction: Instruction) -> None:
            if isinstance(instruction, Lease):
                connection.report(Goodbye(who, "stopped"))
                self._world.after(1.0, None, connection.break_off)
            elif isinstance(instruction, Reject):
                connection.break_off()

        register = replace(self._register(), incarnation=who, agent_id=who, held=())
        connection = Connection(self._world, self._mediator, register, deliver, lambda: None)

    def _mend(self) -> None:
        self.cut_off = False

    def _rebuilt(self) -> None:
        self.cluster.rebuild()
        self._say(ClusterReset(self.incarnation, "the head died", self._capacity()))

    def _stop(self) -> None:
        if self._connection and self._connection.up and self._registered:
            self._flush()
            self._connection.report(Goodbye(self.incarnation, "stopped"))
        connection = self._connection
        self._end(connection is not None)
        self.cluster.close()
        if connection is not None:
            self._world.after(2.0, None, connection.break_off)
        self._world.soon(3.0, 40.0, ("agent of", self.cluster.name, "starts"), self.boot)

    def _end(self, in_order: bool = False) -> None:
        connection, self._connection = self._connection, None
        self.up, self._registered = False, False
        self.life += 1
        if connection and not in_order:
            connection.break_off()

    # ------------------------------------------------------------ the link

    def _redial(self) -> None:
        self._task(*REDIAL_S, self._dial)

    def _dial(self) -> None:
        if self.cut_off or not self._mediator.up:
            return self._redial()
        life = self.life
        connection: Connection | None = None

        def deliver(instruction: Instruction) -> None:
            if life == self.life and connection is self._connection:
                self._deliver(instruction)

        def ended() -> None:
            if life == self.life and connection is self._connection:
                self._connection, self._registered = None, False
                self._redial()

        connection = self._connection = Connection(self._world, self._mediator, self._register(), deliver, ended)

    def _register(self) -> Register:
        return Register(
            cluster=self.cluster.name,
            incarnation=self.incarnation,
            protocol_version=PROTOCOL_VERSION,
            software_version="sim",
            capacity=self._capacity(),
            fingerprint=FINGERPRINT,
            agent_id=self.agent_id,
            held=self._core.held(),
        )

    def _capacity(self) -> Capacity:
        return Capacity(self.cluster.num_slots, 64.0, 0.0, 1 << 40)

    def _deliver(self, instruction: Instruction) -> None:
        first = not self._registered
        if first and not isinstance(instruction, Reject):
            self._registered = True
            self._flush()
        if isinstance(instruction, Lease):
            if not self._beating:
                self._beating = True
                self._beat(instruction.heartbeat_s)
        elif isinstance(instruction, Dismiss):
            if self.draining:
                self._task(0.0, 0.0, self._stop)
        elif isinstance(instruction, Reject):
            return self._refused(error_from_json(instruction.error_json))
        self._act(self._core.instructed(instruction, self._world.now_s))

    def _refused(self, error: IcrfError) -> None:
        if error.code == LEASE_LOST:
            if self._connection:
                self._connection.break_off()
        else:
            self.die()

    def _beat(self, every_s: float) -> None:
        def beat() -> None:
            if self._registered and self._connection and self._connection.up:
                self._connection.report(Heartbeat(self.incarnation))
            self._beat(every_s)

        self._task(every_s, every_s, beat)

    def _say(self, report: Report) -> None:
        self._outbox.append(report)
        if isinstance(report, OfRun):
            self._said.append(report)
        if self._registered:
            self._flush()

    def _flush(self) -> None:
        while self._outbox and self._connection and self._connection.up:
            self._connection.report(self._outbox.popleft())

    def _reachable(self) -> bool:
        return self._mediator.up and not self.cut_off

    # ------------------------------------------------------------ actions

    def _task(self, low_s: float, high_s: float, action: Callable[[], None]) -> None:
        """Do something later, unless this life of the process is over by then."""
        life = self.life
        self._world.soon(low_s, high_s, None, lambda: action() if life == self.life else None)

    def _mine(self, action: Callable[[Any, IcrfError | None], None]) -> Callable[[Any, IcrfError | None], None]:
        """A callback that is forgotten when this life of the process is over."""
        life = self.life
        return lambda result, error: action(result, error) if life == self.life else None

    def _arrived(self, arrival: Arrival) -> None:
        if self.up and arrival.header not in self._seen:
            self._seen.add(arrival.header)
            self._act(self._core.arrived(arrival, self._world.now_s))

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Say):
                self._say(action.report)
            elif isinstance(action, Perform):
                self._perform(action.instruction)
            elif isinstance(action, Advance):
                self._advance(action)
            elif isinstance(action, Discard):
                where = (action.run_id, action.round, action.attempt)
                self._task(0.0, 0.05, lambda w=where: self.cluster.abort(*w))  # type: ignore[misc]

    def _advance(self, action: Advance) -> None:
        start, step, cluster = action.start, action.step, self.cluster
        began_s = self._world.now_s

        def done(result: Any, error: IcrfError | None) -> None:
            now_s = self._world.now_s
            if error is None:
                self._act(self._core.step_done(start, step, result, now_s - began_s, now_s))
            elif self._core.is_open(start):
                self._world.log((cluster.name, step.kind, "of round", start.round, "failed:", error))
                self._task(0.05, 5.0, lambda: heal(error))

        def heal(error: IcrfError) -> None:
            recovery = cluster.recover(start.run_id, error)
            self._act(self._core.step_failed(start, error, recovery))

        mine = self._mine(done)
        if step.kind == SEND and step.transfer is not None:
            cluster.send_payload(start.run_id, start, step.transfer, mine)
        else:
            phases: dict[str, Callable[..., None]] = {
                PUBLISH: partial(cluster.publish_model, ahead=action.ahead),
                TRAIN: partial(cluster.train, ahead=action.ahead),
                AGGREGATE: cluster.aggregate,
                EVALUATE: cluster.evaluate,
                INSTALL: cluster.install,
                ADAPT: cluster.adapt,
            }
            phases[step.kind](start.run_id, start, mine)

    def _perform(self, order: Any) -> None:
        done = self._mine(lambda result, error: self._performed(order, result, error))
        if isinstance(order, Reserve):
            self._reservations.add(order.run_id)
            self.cluster.reserve(order, done)
        elif isinstance(order, Activate):
            self._activate(order, [], done)
        elif isinstance(order, Relink):
            self.cluster.relink(order, done)
        elif isinstance(order, SaveCheckpoint):
            self.cluster.checkpoint(order.run_id, order.round, done)
        elif isinstance(order, StoreModel):
            self.cluster.final_model(order.run_id, order.round, done)
        elif isinstance(order, Release):
            self.cluster.release(order.run_id, done)

    def _activate(self, order: Activate, parts: list[bytes], done: Any) -> None:
        """Download one artifact after the other, then set up the nodes."""
        if len(parts) == len(order.checkpoints):
            self._journal[order.run_id] = order
            return self.cluster.activate(order, parts, done)

        def came(data: bytes, error: IcrfError | None) -> None:
            if error is not None:
                return done(None, error)  # type: ignore[no-any-return]
            self._activate(order, [*parts, data], done)

        self._download(order.run_id, order.checkpoints[len(parts)], came)

    def _performed(self, order: Any, result: Any, error: IcrfError | None) -> None:
        if error is not None:
            self._world.log((self.cluster.name, type(order).__name__, "failed:", error))
            return self._give_up(order, error)
        if isinstance(order, Reserve):
            self._act(self._core.reserved(order))
        elif isinstance(order, Activate):
            assert isinstance(result, Activated)
            self._core.activated(order.run_id, order.generation)
            self._say(result)
        elif isinstance(order, Relink):
            self._journal[order.run_id] = result
            self._say(Relinked(order.run_id, order.generation))
        elif isinstance(order, SaveCheckpoint):
            artifact = f"checkpoint/{order.round}.{order.generation}/{self.cluster.name}"
            report = Checkpointed(order.run_id, order.generation, order.round, artifact)
            self._upload(order, artifact, result, report)
        elif isinstance(order, StoreModel):
            assert isinstance(result, ModelFile)
            artifact = "model.safetensors"
            stored = ModelStored(order.run_id, order.generation, order.round, artifact, result.sha256)
            self._upload(order, artifact, result.safetensors, stored)
        elif isinstance(order, Release):
            self._journal.pop(order.run_id, None)
            self._reservations.discard(order.run_id)
            self._say(Released(order.run_id, order.generation))

    def _give_up(self, order: Any, error: IcrfError) -> None:
        if error.code == "L001":
            return  # the mediator is away; it asks again when it is back
        if isinstance(order, Activate | Relink):
            self.cluster.recover(order.run_id, error)
        if report := failure(order, error):
            self._say(report)

    def _upload(self, order: Any, artifact: str, data: bytes, report: Report) -> None:
        def arrive() -> None:
            if not self._reachable():
                return self._give_up(order, make_error("L001", "the mediator is away"))
            writer = self._mediator.blobs.writer(order.run_id, artifact)
            writer.write(data)
            writer.commit()
            self._task(0.0, 0.1, lambda: self._say(report))

        self._task(0.05, 2.0, arrive)

    def _download(self, run_id: str, artifact: str, done: Callable[[Any, IcrfError | None], None]) -> None:
        def arrive() -> None:
            if not self._reachable():
                return done(b"", make_error("L001", "the mediator is away"))
            try:
                done(b"".join(self._mediator.blobs.read(run_id, artifact)), None)
            except IcrfError as error:
                done(b"", error)

        self._task(0.05, 2.0, arrive)
