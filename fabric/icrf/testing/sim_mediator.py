"""The shell around the mediator's core in a simulation: it carries out effects in the order of ``service.py``.

It dies between any two of them, and comes back with what was durable: the journal and the blobs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from icrf.protocol import Heartbeat, Instruction, Lease, Register, Reject, Report
from icrf.testing.sim_invariants import Checker
from icrf.testing.sim_world import Pipe, World
from icrf_mediator.blobs import MemoryBlobs
from icrf_mediator.effects import Effects
from icrf_mediator.mediator import FederationMediator, Policy
from icrf_mediator.store import TABLES, MemoryStore

T = TypeVar("T")

TICK_S = 1.0
RESTART_S = (0.3, 40.0)


class Away(Exception):
    """There is no mediator, or it died before it answered."""


class Connection:
    """One control stream: ordered and reliable while it is up; when it breaks, what is under way is lost.

    Args:
        world: time and chance.
        mediator: the mediator it was dialled to.
        cluster, incarnation: who dialled.
        deliver: called with every instruction that arrives.
        ended: called when the agent notices that it is over.
    """

    def __init__(
        self,
        world: World,
        mediator: SimMediator,
        register: Register,
        deliver: Callable[[Instruction], None],
        ended: Callable[[], None],
    ) -> None:
        self.cluster, self.incarnation = register.cluster, register.incarnation
        self.up = True
        self.upwards, self.downwards = Pipe(world), Pipe(world)
        self._world, self._mediator, self._life = world, mediator, mediator.life
        self._deliver, self._ended = deliver, ended
        self._lingers = False
        self._inbox: deque[Callable[[], None]] = deque()
        mediator.dialled.append(self)
        what = ("register", self.cluster, self.incarnation, register.held)
        self.upwards.carry(what, lambda: self._arrive(lambda: mediator.connected(self, register)))

    def report(self, report: Report) -> None:
        """The agent says something."""
        what = None if isinstance(report, Heartbeat) else (self.cluster, "->", report)
        self.upwards.carry(what, lambda: self._arrive(lambda: self._mediator.reported(self, report)))

    def send(self, instruction: Instruction) -> None:
        """The mediator says something."""
        what = None if isinstance(instruction, Lease) else ("->", self.cluster, instruction)
        self.downwards.carry(what, lambda: self._deliver(instruction) if self.up else None)

    def disconnect(self) -> None:
        """The mediator ends the stream after what it has sent."""
        self.downwards.carry(("-> end", self.cluster), self.break_off)

    def break_off(self) -> None:
        """The connection is gone; both sides notice in their own time."""
        if not self.up:
            return
        self.up = False
        world = self._world
        if self in self._mediator.dialled:
            self._mediator.dialled.remove(self)
        self._lingers = world.chance(world.odds.linger)
        if self._lingers:
            self.upwards.stall(world.rng.uniform(0.0, 30.0))
        world.soon(0.01, 1.0, None, self._ended)
        what = ("stream of", self.cluster, "ended")
        self.upwards.carry(what, lambda: self._hand_in(lambda: self._mediator.disconnected(self)))

    def _arrive(self, action: Callable[[], None]) -> None:
        if self.up or self._lingers:
            self._hand_in(action)

    def _hand_in(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        if len(self._inbox) == 1:
            self._serve()

    def _serve(self) -> None:
        """The mediator reads this stream, once it is awake; streams have no order among each other."""
        pause_s = self._mediator.paused_until_s - self._world.now_s
        if pause_s > 0.0:
            return self._world.soon(pause_s, pause_s + 0.05, None, self._serve)
        while self._inbox and self._mediator.life == self._life:
            self._inbox.popleft()()


class SimMediator:
    """A mediator process with its disk.

    Args:
        world: time and chance.
        checker: told what becomes durable and what is said.
        policy: times of leases.
    """

    def __init__(self, world: World, checker: Checker, policy: Policy) -> None:
        self.store, self.blobs = MemoryStore(), MemoryBlobs()
        self.life = 0
        self.dialled: list[Connection] = []
        self._world, self._checker, self._policy = world, checker, policy
        self._core: FederationMediator | None = None
        self._sessions: list[Connection] = []
        self._by_cluster: dict[str, Connection] = {}
        self.paused_until_s = 0.0
        self.boot()

    @property
    def up(self) -> bool:
        """Whether there is a process."""
        return self._core is not None

    def boot(self) -> None:
        """Start, from the journal."""
        self.life += 1
        core = self._core = FederationMediator(self._policy)
        tables = {name: self.store.rows(name) for name in TABLES}
        try:
            self._carry_out(core.restore(tables, self._world.now()))
        except Away:
            return
        self._checker.restarted(core)
        life = self.life
        self._world.after(TICK_S, None, lambda: self._tick(life))

    def die(self) -> None:
        """The process is killed; only journal and blobs are left."""
        if self._core is None:
            return
        self._core, self.paused_until_s = None, 0.0
        self._world.log("the mediator dies")
        for connection in list(self.dialled):
            connection.break_off()
        self._sessions, self._by_cluster = [], {}
        self._world.soon(*RESTART_S, "the mediator starts", self.boot)

    def pause(self, for_s: float) -> None:
        """Nothing is processed for a while."""
        self.paused_until_s = max(self.paused_until_s, self._world.now_s + for_s)

    def ask(self, question: Callable[[FederationMediator], T]) -> T:
        """Read something.

        Raises:
            Away: there is no mediator.
        """
        if self._core is None or self._world.now_s < self.paused_until_s:
            raise Away
        return question(self._core)

    def decide(self, decision: Callable[[FederationMediator], tuple[T, Effects]]) -> T:
        """A call of the SDK: its outcome, once it is durable.

        Raises:
            Away: there is no mediator, it died meanwhile, or the answer was lost.
        """
        answer, effects = self.ask(decision)
        self._carry_out(effects)
        if self._world.chance(self._world.odds.answer_lost):
            raise Away
        return answer

    # ------------------------------------------------------------ agents

    def connected(self, connection: Connection, register: Register) -> None:
        """An agent's stream opens with its registration."""
        if self._core is None:
            return
        refusal, effects = self._core.register(register, "sim", self._world.now())
        self._sessions.append(connection)
        self._checker.registered(register, refusal, self._world.now_s)
        if refusal:
            self._attempt(effects)
            return connection.send(Reject(refusal.to_json()))
        older = self._by_cluster.get(register.cluster)
        self._by_cluster[register.cluster] = connection
        if older is not None:
            older.disconnect()
        self._attempt(effects)

    def reported(self, connection: Connection, report: Report) -> None:
        """An agent says something."""
        if self._core is None or connection not in self._sessions:
            return
        effects = self._core.report(connection.cluster, connection.incarnation, report, self._world.now())
        self._checker.reported(connection.cluster, connection.incarnation, report, effects)
        self._attempt(effects, connection)

    def disconnected(self, connection: Connection) -> None:
        """The stream of an agent ended."""
        if self._core is None or connection not in self._sessions:
            return
        self._sessions.remove(connection)
        if self._by_cluster.get(connection.cluster) is connection:
            del self._by_cluster[connection.cluster]
            self._core.disconnected(connection.cluster, connection.incarnation)

    # ------------------------------------------------------------ inside

    def _tick(self, life: int) -> None:
        if life != self.life or self._core is None:
            return
        if self._world.now_s >= self.paused_until_s:
            now = self._world.now()
            self._checker.ticked(now.monotonic_s)
            self._attempt(self._core.tick(now))
        self._world.after(TICK_S, None, lambda: self._tick(life))

    def _attempt(self, effects: Effects, reporter: Connection | None = None) -> None:
        try:
            self._carry_out(effects, reporter)
        except Away:
            return

    def _carry_out(self, effects: Effects, reporter: Connection | None = None) -> None:
        self._may_die("before its writes", bool(effects.writes))
        if effects.writes:
            self.store.apply(effects.writes)
            self._checker.durable(effects)
        self._may_die("durable, untold", bool(effects.writes and effects.sends))
        for cluster, instruction in effects.sends:
            connection = self._by_cluster.get(cluster)
            if isinstance(instruction, Reject) and reporter is not None:
                reporter.send(instruction)
            elif connection is not None:
                connection.send(instruction)
            self._may_die("between sends", bool(effects.writes))
        self._checker.answered(effects)
        for run_id, artifact in effects.deletes:
            self.blobs.delete_run(run_id, artifact)
            self._may_die("between deletes", True)
        for cluster in effects.dropped:
            if (connection := self._by_cluster.get(cluster)) is not None:
                connection.disconnect()

    def _may_die(self, where: str, matters: bool) -> None:
        if matters and self._world.odds.at_effect and self._world.fault("mediator dies", self._world.odds.at_effect):
            self._world.log(f"the mediator dies {where}")
            self.die()
            raise Away
