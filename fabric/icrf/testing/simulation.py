"""Deterministic simulation of the whole fabric: many histories of faults, each decided by a seed.

The cores of mediator and agents, the journal, the topology managers and the versioned states are the real ones. Around
them there is no socket, no thread, no sleep and no Ray: one scheduler (:class:`~icrf.testing.sim_world.World`) decides
what happens next. The method is FoundationDB's (Zhou et al., SIGMOD 2021): inject every fault that can be thought of,
check invariants at every step, and repeat any failure from its seed.

    >>> simulate(7)            # raises SimulationFailed, with the last steps, if an invariant does not hold
    >>> simulate(7, trace=True)  # prints every step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from icrf.errors import ConfigErrors, IcrfError
from icrf.protocol import CENTRALIZED, DECENTRALIZED, HIERARCHICAL, RunEvent
from icrf.testing.sim_agent import SimAgent
from icrf.testing.sim_cluster import ANOTHER_PROGRAM, Network, SimCluster
from icrf.testing.sim_invariants import Checker
from icrf.testing.sim_mediator import Away, SimMediator
from icrf.testing.sim_tally import ADAPTATION, Tally, tally_submission
from icrf.testing.sim_world import SimulationFailed, World
from icrf_mediator.mediator import Policy

MAX_STEPS = 60_000
HEAL_S = 600.0
LIVELY_S = 1_500.0
SETTLE_S = 90.0

__all__ = ["FAULTS", "Outcome", "SimulationFailed", "simulate"]


@dataclass(frozen=True)
class Outcome:
    """How a history ended.

    Attributes:
        statuses: by request id.
        steps: how many things happened.
        ended_s: simulated seconds.
        faults: how often each kind of fault struck.
        signature: equal for equal histories.
    """

    statuses: dict[str, str]
    steps: int
    ended_s: float
    faults: dict[str, int]
    signature: int


class User:
    """Submits one federation, follows it to its end, and may cancel it.

    Args:
        fabric: whom to ask.
        tally: the federation.
        at_s: when.
        cancel_s: how long after the submission it is cancelled; negative: never.
    """

    def __init__(self, fabric: Fabric, tally: Tally, at_s: float, cancel_s: float) -> None:
        self.run_id, self.ended, self.cancelled = "", False, False
        self._fabric, self._world, self._tally, self._cancel_s = fabric, fabric.world, tally, cancel_s
        self._seen = 0
        self._world.at(at_s, ("submit", tally.submission.client_request_id), self._submit)

    @property
    def request_id(self) -> str:
        return self._tally.submission.client_request_id

    def _submit(self) -> None:
        run_id, world = self._fabric.new_run_id(), self._world
        submission = self._tally.submission
        try:
            info = self._fabric.mediator.decide(lambda core: core.submit(submission, run_id, world.now()))
        except (Away, ConfigErrors):
            # Whoever pins nodes to a cluster waits for it to be there.
            return world.soon(0.5, 3.0, ("submit again", self.request_id), self._submit)
        self._fabric.checker.require(self.run_id in ("", info.run_id), "F40: one request became two runs")
        self._fabric.checker.submitted(info.run_id)
        if self.run_id:
            return
        self.run_id = info.run_id
        world.log(("accepted", self.request_id, info.run_id))
        if world.chance(0.2):
            world.soon(0.0, 60.0, ("submit twice", self.request_id), self._submit)
        if self._cancel_s >= 0.0:
            world.after(self._cancel_s, ("cancel", self.run_id), self._cancel)
        self._watch()

    def _cancel(self) -> None:
        self.cancelled = True
        try:
            info = self._fabric.mediator.decide(lambda core: core.cancel(self.run_id, self._world.now()))
        except Away:
            return self._world.soon(0.5, 3.0, ("cancel again", self.run_id), self._cancel)
        self._fabric.checker.cancelled(self.run_id, info.status)

    def _watch(self) -> None:
        try:
            _, events = self._fabric.mediator.ask(lambda core: core.events(self.run_id))
        except Away:
            events = []
        new: Sequence[RunEvent] = (events or ())[self._seen :]
        for event in new:
            self._fabric.checker.watched(self.run_id, event)
            self._seen = event.seq
            if event.kind == "end":
                self.ended = True
                return
        self._world.soon(0.2, 4.0, None, self._watch)


class Fabric:
    """A mediator, clusters with their agents, and users, under one seed.

    Args:
        seed: decides what it is made of and what happens to it.
        trace: print every step.
        kinds: let many faults strike from outside, of these kinds only; empty: the seed decides.
        quorum: long stars over several clusters that do without those that are lost.
        adapting: long runs of peers whose graph changes.
        gap_s: mean time between faults of these kinds.
        crowded: other programs take the slots of clusters now and then.
        moving: long runs whose nodes move to clusters that come, and away from those that are lost.
    """

    def __init__(
        self,
        seed: int,
        trace: bool = False,
        kinds: Sequence[str] = (),
        quorum: bool = False,
        gap_s: float = 3.0,
        adapting: bool = False,
        crowded: bool = False,
        moving: bool = False,
    ) -> None:
        self.world = world = World(seed, len(FAULTS), trace)
        if kinds:
            options = f"kinds={tuple(kinds)!r}, quorum={quorum}, gap_s={gap_s}, adapting={adapting}, crowded={crowded}"
            options += f", moving={moving}"
            world.repeat = f"simulate({seed}, trace=True, {options})"
            world.concentrate([float(kind in kinds) for kind in FAULTS], gap_s)
        policy = Policy()
        self.checker = Checker(world, policy.lease_ttl_s)
        self.mediator = SimMediator(world, self.checker, policy)
        self.checker.blobs = self.mediator.blobs
        self._tallies: dict[str, Tally] = {}
        self._seed, self._quorum, self._adapting, self._run_ids = seed, quorum, adapting, 0
        self._moving = moving
        self.network, rng = Network(world), world.rng
        names = [f"c{k + 1}" for k in range(rng.choice((2, 3, 4) if quorum or adapting or moving else (1, 2, 2, 3, 4)))]
        self.clusters = [
            SimCluster(name, rng.choice((1, 2, 2, 3)), world, self.network, self._tallies.__getitem__, self.checker)
            for name in names
        ]
        self.agents = [SimAgent(c, world, self.mediator, f"agent-{c.name}") for c in self.clusters]
        for agent in self.agents:
            world.soon(0.0, rng.choice((1.0, 30.0)), ("agent of", agent.cluster.name, "starts"), agent.boot)
        self.users = [self._user(k) for k in range(rng.choice((1, 1, 2)))]
        self._deaths: dict[tuple[str, tuple[int, ...]], int] = {}
        world.soon(0.0, 2.0 * world.odds.gap_s, None, self._strike)
        for cluster in self.clusters if crowded else ():
            world.soon(0.0, 10.0, None, partial(self._crowd, cluster))

    def _crowd(self, cluster: SimCluster) -> None:
        """Another program comes to a cluster, for a while, and again later; in the end there is none."""
        if self.world.now_s < HEAL_S:
            stays_s = self.world.rng.choice((20.0, 100.0, 200.0))
            cluster.occupy(stays_s)
            self.world.soon(stays_s + 1.0, stays_s + 200.0, None, partial(self._crowd, cluster))

    def run(self) -> Outcome:
        """Let things happen until every run has ended and nothing is left.

        Raises:
            SimulationFailed: an invariant does not hold.
        """
        world = self.world
        try:
            self._until(lambda: all(user.ended for user in self.users))
            world.heal()
            core_ended_s = world.now_s
            self._until(lambda: world.now_s >= core_ended_s + SETTLE_S and self.mediator.up)
            statuses = self.mediator.ask(
                lambda core: self.checker.ended(core, {u.request_id for u in self.users if u.cancelled})
            )
            self._nothing_is_left()
        except (IcrfError, AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, SimulationFailed):
                raise
            world.log(("raised", repr(error)))
            try:
                world.fail(f"{type(error).__name__}: {error}")
            except SimulationFailed as failed:
                raise failed from error
        return Outcome(statuses, world.steps, world.now_s, dict(world.faults), world.rng.getrandbits(64))

    def new_run_id(self) -> str:
        """The next run's id."""
        self._run_ids += 1
        return f"run{self._run_ids:04d}"

    # ------------------------------------------------------------ faults from outside

    def strike(self, kind: str) -> bool:
        """One fault of a kind, if there is something that it can hit."""
        agent = self.world.pick(self.agents)
        return FAULTS[kind](self, agent)

    def _strike(self) -> None:
        world = self.world
        if world.now_s > HEAL_S:
            world.heal()
        if world.healed:
            return
        kind = world.rng.choices(list(FAULTS), world.odds.weights)[0]
        if self.strike(kind):
            world.fault(kind)
        world.after(world.rng.expovariate(1.0 / world.odds.gap_s), None, self._strike)

    def kill_host(self, agent: SimAgent) -> bool:
        """One host of a cluster; not so often in one round that it would be quarantined."""
        hosts = agent.cluster.hosts()
        if not hosts:
            return False
        run_id, host = self.world.pick(hosts)
        key = (run_id, host.nodes)
        self._deaths[key] = self._deaths.get(key, 0) + 1
        if self._deaths[key] > 2:
            return False
        self.world.log(("host of", run_id, host.nodes, "on", agent.cluster.name, "dies"))
        host.die()
        return True

    # ------------------------------------------------------------ inside

    def _user(self, number: int) -> User:
        rng = self.world.rng
        long = self._quorum or self._adapting or self._moving
        flow = CENTRALIZED if self._quorum else rng.choice((CENTRALIZED, DECENTRALIZED))
        flow = DECENTRALIZED if self._adapting else flow
        size = rng.randint(5, 7) if long else rng.randint(2, 7)
        rounds = rng.randint(10, 20) if long else rng.randint(1, 5)
        edges = [(0, i) for i in range(1, size)]
        if flow == DECENTRALIZED:
            edges = [(rng.randrange(i), i) for i in range(1, size)]
            edges += [(a, b) for a in range(size) for b in range(a + 1, size) if rng.random() < 0.2]
        config = {
            "federation_id": f"tally-{number}",
            "federated_learning_rounds": rounds,
            "evaluate_every": rng.choice((0, 1, 2)),
            "checkpoint_every": rng.choice((0, 1, 2)),
            "round_deadline_s": 900.0,
            "placement_group_strategy": "PACK",
            "assignment_strategy": "round_robin",
            "on_cluster_loss": "wait",
            "tally_escalations": [rng.choice((0, 0, 0, 0, 1, 2)) for _ in range(rounds)],
        }
        if self._moving:
            moves = Random(f"moves of {number} under {self._seed}")
            config |= {"on_cluster_loss": "reassign", "clustering_period": moves.randint(0, 3)}
            config["assignment_strategy"] = moves.choice(("locality", "round_robin"))
            pinned = moves.random() < 0.3
            config["placement"] = {f"node_{size - 1}": moves.choice(self.clusters).name} if pinned else {}
        schedule: list[list[int]] = []
        groups, aggregators = Random(f"groups of {number} under {self._seed}"), []
        if size > 3 and groups.random() < 0.35 and (not long or self._moving):
            flow, aggregators = HIERARCHICAL, [0, size - 1]
            above = [0, size - 1, *(groups.choice((0, size - 1)) for _ in range(size - 4))]
            edges = [(0, size - 1), *zip(above, range(1, size - 1), strict=True)]
            config["global_every"] = groups.randint(1, 4)
        clients = list(range(flow == CENTRALIZED, size))
        draw = Random(f"participation of {number} under {self._seed}")
        if draw.random() < 0.4 and not self._quorum and not aggregators:
            schedule = [sorted(draw.sample(clients, draw.randint(1, len(clients)))) for _ in range(rounds)]
        if self._quorum:
            config |= {
                "min_nodes": draw.randint(1, 3),
                "on_cluster_loss": "exclude",
                "assignment_strategy": "round_robin",
            }
        elif flow == CENTRALIZED and draw.random() < 0.4 and not self._moving:
            config |= {"min_nodes": 1, "on_cluster_loss": draw.choice(("wait", "exclude"))}
        if config.get("min_nodes") and draw.random() < 0.5:
            config |= {"late_updates": "weigh", "max_staleness": draw.randint(1, 3)}
            config |= {"min_nodes": 1, "round_deadline_s": 150.0}
        graphs, gathered = Random(f"graphs of {number} under {self._seed}"), 0
        if flow == DECENTRALIZED and (graphs.random() < 0.5 or self._adapting):
            gathered = graphs.randint(0, 2)
            config |= {ADAPTATION: "tally", "adaptation_period": graphs.randint(1, 2), "mixing": "metropolis_hastings"}
        request, edges = f"request-{number}", sorted(set(edges))
        tally = Tally(tally_submission(request, flow, edges, size, config, schedule, aggregators, gathered))
        self._tallies[tally.submission.config_json] = tally
        self.checker.know(tally)
        cancel_s = rng.uniform(0.0, 60.0) if rng.random() < 0.12 else -1.0
        return User(self, tally, rng.choice((0.0, 35.0)) + rng.uniform(0.0, 10.0), cancel_s)

    def _until(self, done: Callable[[], bool]) -> None:
        world, healed_s = self.world, self.world.now_s
        while not done():
            if not world.healed:
                healed_s = world.now_s
            if world.steps > MAX_STEPS or world.now_s > healed_s + LIVELY_S:
                world.fail(f"I12: not done {world.now_s - healed_s:.0f} s after the world healed: {self._state()}")
            world.step()

    def _state(self) -> list[Any]:
        try:
            return [(i.run_id, i.status, i.waiting_for) for i in self.mediator.ask(lambda core: core.list_runs())]
        except Away:
            return ["the mediator is away"]

    def _nothing_is_left(self) -> None:
        for cluster in self.clusters:
            left = sorted({run_id for run_id, _ in cluster.hosts()} | cluster.reserved.keys() - {ANOTHER_PROGRAM})
            self.checker.require(not left, f"I11: {cluster.name} still holds {left}")


def simulate(
    seed: int,
    trace: bool = False,
    kinds: Sequence[str] = (),
    quorum: bool = False,
    gap_s: float = 3.0,
    adapting: bool = False,
    crowded: bool = False,
    moving: bool = False,
) -> Outcome:
    """One history.

    Args:
        seed: decides everything.
        trace: print every step.
        kinds: let many faults of these kinds strike (keys of :data:`FAULTS`); empty: the seed decides.
        quorum: long stars over several clusters that do without those that are lost.
        adapting: long runs of peers whose graph changes.
        gap_s: mean seconds between faults of these kinds.
        crowded: other programs take the slots of clusters now and then.
        moving: long runs whose nodes move to clusters that come, and away from those that are lost.

    Raises:
        SimulationFailed: an invariant does not hold.
    """
    return Fabric(seed, trace, kinds, quorum, gap_s, adapting, crowded, moving).run()


# ---------------------------------------------------------------- kinds of faults that strike from outside


def _if_up(action: Callable[[Fabric, SimAgent], None]) -> Callable[[Fabric, SimAgent], bool]:
    def strike(fabric: Fabric, agent: SimAgent) -> bool:
        if not agent.up or not agent.cluster.alive:
            return False
        action(fabric, agent)
        return True

    return strike


def _mediator(action: Callable[[Fabric], None]) -> Callable[[Fabric, SimAgent], bool]:
    def strike(fabric: Fabric, agent: SimAgent) -> bool:
        if not fabric.mediator.up:
            return False
        action(fabric)
        return True

    return strike


FAULTS: dict[str, Callable[[Fabric, SimAgent], bool]] = {
    "host dies": Fabric.kill_host,
    "manager dies": _if_up(lambda fabric, agent: agent.cluster.lose_manager()),
    "cluster dies": _if_up(lambda fabric, agent: agent.lose_cluster()),
    "agent dies": _if_up(lambda fabric, agent: agent.die()),
    "agent drains": _if_up(lambda fabric, agent: agent.drain()),
    "line is cut": _if_up(lambda fabric, agent: agent.cut(fabric.world.rng.choice((2.0, 12.0, 60.0)))),
    "payloads are cut": _if_up(
        lambda fabric, agent: fabric.network.block(agent.cluster.name, fabric.world.rng.choice((3.0, 15.0, 50.0)))
    ),
    "rival registers": _if_up(lambda fabric, agent: agent.rival()),
    "report is replayed": lambda fabric, agent: agent.up and agent.replay(),
    "stream breaks": _if_up(lambda fabric, agent: agent.break_connection()),
    "reports stall": _if_up(lambda fabric, agent: agent.stall_connection(fabric.world.rng.uniform(1.0, 40.0))),
    "mediator is killed": _mediator(lambda fabric: fabric.mediator.die()),
    "mediator is paused": _mediator(lambda fabric: fabric.mediator.pause(fabric.world.rng.uniform(2.0, 45.0))),
    "clock jumps": _mediator(lambda fabric: fabric.world.shift_wall_clock(fabric.world.rng.choice((-3600.0, 86400.0)))),
}
