"""A cluster without Ray that runs tally nodes, and the network between clusters.

Topology manager and versioned states are the real ones. What is simulated is what surrounds them: hosts that take time
and die, a manager that dies, a cluster that is rebuilt, payloads that are lost, repeated and late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from icrf.errors import IcrfError, NodeError, ResourceError, RunError, make_error
from icrf.exchange import EXACT, Transfer
from icrf.ports import Arrival, PayloadHeader, PhaseReport
from icrf.protocol import Activate, HeldRun, Relink, Reserve, StartRound, nodes_of
from icrf.testing import sim_hosts
from icrf.testing.sim_hosts import Phase, References, SimHost, SimRun
from icrf.testing.sim_tally import Tally, Vector
from icrf.testing.sim_world import World
from icrf_agent.phase_reports import merge_reports
from icrf_agent.topology_manager import HybridTopologyManager

RETRY, RESTORE = "retry", "restore"
DEATHS = frozenset({"U003", "P003", "P030"})
MAX_SENDS = 12
RESERVE_POLL_S = 1.0
ANOTHER_PROGRAM = "another program"
# Beyond the deadline of a round, where late clusters are survived.
LATE_S, LATE_ODDS, MAX_LATE = (160.0, 300.0), 0.5, 2
WIRE_HEADER_BYTES = 100

Done = Callable[[Any, IcrfError | None], None]


class Observer(Protocol):
    """Told what clusters take in and make."""

    def activating(self, cluster: str, order: Activate) -> None: ...

    def relinking(self, cluster: str, order: Relink) -> None: ...

    def began(self, cluster: str, start: StartRound) -> None: ...

    def took_in(self, cluster: str, header: PayloadHeader) -> None: ...


class Network:
    """Carries payloads between clusters: late, out of order, twice, or not at all until the sender has tried enough."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.clusters: dict[str, SimCluster] = {}
        self._blocked: dict[str, float] = {}

    def block(self, cluster: str, for_s: float) -> None:
        """No payload gets to or from a cluster for a while; the line to the mediator is another one."""
        self._blocked[cluster] = self._world.now_s + for_s

    def _open(self, header: PayloadHeader) -> bool:
        return all(self._world.now_s >= self._blocked.get(name, 0.0) for name in (header.source, header.target))

    def send(self, header: PayloadHeader, array: Vector, done: Done, tries: int = 1) -> None:
        """Deliver one payload; `done` is called once it was accepted, or with the refusal."""
        world, target = self._world, self.clusters[header.target]

        def again() -> None:
            if tries >= MAX_SENDS:
                done(None, make_error("P030", f"{header.target} cannot be reached"))
            else:
                self.send(header, array, done, tries + 1)

        def arrive() -> None:
            if not target.alive or not self._open(header) or world.chance(world.odds.drop):
                return world.soon(0.5, 3.0, None, again)
            error = target.receive(header, array)
            if world.chance(world.odds.duplicate):
                world.soon(0.0, 40.0, ("replayed", header), lambda: self._replay(header, array))
            if world.chance(world.odds.drop):
                return world.soon(0.5, 3.0, None, again)
            world.soon(0.001, 0.05, None, lambda: done(None, error))

        world.soon(0.001, 0.6, ("payload", header), arrive)

    def _replay(self, header: PayloadHeader, array: Vector) -> None:
        target = self.clusters[header.target]
        if target.alive:
            target.receive(header, array)


class SimCluster:
    """What :class:`icrf.ports.ClusterRuntime` promises, with callbacks in place of coroutines.

    Args:
        name: of the cluster.
        num_slots: how many hosts it takes.
        world: time and chance.
        network: the way to other clusters.
        tallies: the arithmetic of a run by its configuration.
        observer: told what happens here.
    """

    def __init__(
        self,
        name: str,
        num_slots: int,
        world: World,
        network: Network,
        tallies: Callable[[str], Tally],
        observer: Observer,
    ) -> None:
        self.name, self.num_slots, self.alive = name, num_slots, True
        self.runs: dict[str, SimRun] = {}
        self.reserved: dict[str, int] = {}
        self._released, self._closed = Counter[str](), 0  # how often each run was, and all of them
        self.listener: Callable[[Arrival], None] = lambda arrival: None
        self._world, self._network, self._tallies, self._observer = world, network, tallies, observer
        self._hosts: dict[str, list[SimHost]] = {}
        self._lateness: Counter[str] = Counter()
        self._newest: Counter[str] = Counter()
        self.manager = HybridTopologyManager(name, References())
        network.clusters[name] = self

    # ------------------------------------------------------------ life and death

    def hosts(self) -> list[tuple[str, SimHost]]:
        """All live hosts with their runs."""
        return [(run_id, host) for run_id, hosts in self._hosts.items() for host in hosts]

    def lose_manager(self) -> None:
        """The topology manager dies and comes back empty."""
        self.manager = HybridTopologyManager(self.name, References())

    def lose(self) -> None:
        """The cluster itself dies; what it held is gone."""
        self.alive = False
        for _, host in self.hosts():
            host.die()
        self.runs, self.reserved, self._hosts = {}, {}, {}
        self.lose_manager()

    def rebuild(self) -> None:
        """A new one takes its place."""
        self.alive = True

    def agent_died(self) -> None:
        """What only the agent's process knew is forgotten; hosts and manager live on."""
        self.runs = {}

    def occupy(self, seconds: float) -> None:
        """Another program takes what is free, and what becomes free, for so long."""
        self.reserved[ANOTHER_PROGRAM] = self.num_slots

        def leave() -> None:
            self.reserved.pop(ANOTHER_PROGRAM, None)

        self._world.after(seconds, ("leaves", ANOTHER_PROGRAM, self.name), leave)

    # ------------------------------------------------------------ setting up

    def reserve(self, request: Reserve, done: Done) -> None:
        """All slots or none; R003 if they are not free within the deadline, F005 if the run is released meanwhile."""
        until_s = self._world.now_s + request.deadline_s
        released = self._released[request.run_id], self._closed

        def look() -> None:
            if released != (self._released[request.run_id], self._closed):
                return done(None, RunError("F005", f"run {request.run_id} was released while it was reserving"))
            others = sum(n for run_id, n in self.reserved.items() if run_id != request.run_id)
            if self.alive and others + request.num_slots <= self.num_slots:
                self.reserved[request.run_id] = request.num_slots
                return done(None, None)
            if self._world.now_s >= until_s:
                return done(None, ResourceError("R003", f"slots of {self.name} are held by {sorted(self.reserved)}"))
            self._world.after(RESERVE_POLL_S, None, look)

        self._world.soon(0.01, 1.0, None, look)

    def activate(self, request: Activate, checkpoints: Sequence[bytes], done: Done) -> None:
        """Set up this cluster's nodes from the initial state or a checkpoint; live hosts are kept."""
        if not self.alive or request.run_id not in self.reserved:
            return done(None, NodeError("U003", "no reservation is left", place=self.name))
        tally = self._tallies(request.config_json)
        here = request.clusters.index(self.name)
        local = [n for n, c in enumerate(request.assignment) if c == here]
        groups = sim_hosts.split(local, min(request.num_slots, len(local)))
        known = self._hosts.get(request.run_id, [])
        if [h.nodes for h in known] != groups:
            known = self._hosts[request.run_id] = [SimHost(group) for group in groups]
        run = SimRun(request, tally, known)
        try:
            states = sim_hosts.unpack_states(checkpoints, request.restore_round)
        except IcrfError as error:
            return done(None, error)
        self._relink()
        self.manager.link(request)
        self._observer.activating(self.name, request)
        self.runs[request.run_id] = run

        def all_set_up(parts: list[Any], error: IcrfError | None) -> None:
            if error is None:
                run.lives, run.active = [h.life for h in run.hosts], True
            done(None if error else sim_hosts.activated(run, parts), error)

        self._on_hosts(run.hosts, (0.1, 3.0), lambda host: sim_hosts.set_up(run, host, states), all_set_up)

    def adopt(self, request: Activate) -> HeldRun | None:
        """After a restart of the agent: what is left of a run, if it is whole."""
        generation, *position = self.manager.linked().get(request.run_id, (0, 0, 0))
        hosts = self._hosts.get(request.run_id, [])
        if not self.alive or generation != request.generation or not hosts:
            return None
        if any(host.generation != generation for host in hosts):
            return None
        run = SimRun(request, self._tallies(request.config_json), hosts, [h.life for h in hosts], active=True)
        run.position = (position[0], position[1])
        self.runs[request.run_id] = run
        return HeldRun(request.run_id, generation, *run.position)

    def recover(self, run_id: str, error: IcrfError) -> str:
        """What a failed step takes; brings back what died as far as it can be."""
        if self.alive and error.code not in DEATHS:
            return ""
        run = self.runs.get(run_id)
        if run is None or not self.alive:
            return RESTORE
        self._relink()
        if not run.lives:
            return RESTORE
        empty = [host for host in run.hosts if host.generation != run.activation.generation]
        if not run.active or any(run.keeps_state(host) for host in empty):
            return RESTORE
        for host in empty:
            sim_hosts.set_up(run, host, {})
        run.lives = [host.life for host in run.hosts]
        parent = run.position[0] - 1
        keepers = [host.state for host in run.hosts if run.keeps_state(host)]
        return RETRY if parent < 0 or all(s is not None and parent in s.rounds for s in keepers) else RESTORE

    def release(self, run_id: str, done: Done) -> None:
        """Free what the run holds here."""
        self._released[run_id] += 1

        def free() -> None:
            self.runs.pop(run_id, None)
            self.manager.unlink(run_id)
            for host in self._hosts.pop(run_id, []):
                host.die()
            self.reserved.pop(run_id, None)
            done(None, None)

        self._world.soon(0.01, 1.0, None, free)

    def close(self) -> None:
        """The agent ends in order: nothing is left."""
        for run_id in list(self._hosts):
            self.manager.unlink(run_id)
        for _, host in self.hosts():
            host.die()
        self.runs, self._hosts, self.reserved = {}, {}, {}
        self._closed += 1

    # ------------------------------------------------------------ rounds

    def publish_model(self, run_id: str, start: StartRound, done: Done, ahead: bool = False) -> None:
        """Publish the models of the round before to the participants; what is sent ahead was published with them."""
        if ahead:
            if run_id in self.runs:
                self.runs[run_id].ahead = (start.round, start.attempt)
            self._world.soon(0.0, 0.01, None, lambda: done(None, None))
        elif self._begin(run_id, start, done):
            self._phase(run_id, start, (0.01, 0.3), sim_hosts.publish_model, done, _makers)

    def train(self, run_id: str, start: StartRound, done: Done, ahead: bool = False) -> None:
        """Every host trains its nodes and publishes what they send."""
        if ahead or self._begin(run_id, start, done):

            def train() -> None:
                self._phase(run_id, start, (0.2, 3.0), sim_hosts.train, done)

            if not self._dawdles(run_id, start):
                return train()
            self._world.soon(*LATE_S, ("late in round", start.round, self.name), train)

    def aggregate(self, run_id: str, start: StartRound, done: Done) -> None:
        """Merge the partials, or mix every node's neighbours."""
        where = _model_host if start.merge else _makers
        if self._begin(run_id, start, done):
            self._phase(run_id, start, (0.05, 0.5), sim_hosts.aggregate, done, where)

    def install(self, run_id: str, start: StartRound, done: Done) -> None:
        """Take over the model of all groups."""
        self._phase(run_id, start, (0.05, 0.5), sim_hosts.install, done, _makers)

    def evaluate(self, run_id: str, start: StartRound, done: Done) -> None:
        """Make the consensus model."""
        self._phase(run_id, start, (0.05, 0.5), sim_hosts.evaluate, done, _model_host)

    def adapt(self, run_id: str, start: StartRound, done: Done) -> None:
        """Decide on the graph of the rounds to come."""
        self._phase(run_id, start, (0.05, 0.5), sim_hosts.adapt, done, _model_host)

    def relink(self, order: Relink, done: Done) -> None:
        """Link the nodes of a run anew; the result is the activation in force."""
        try:
            run = self._run(order.run_id)
            if order.generation < run.activation.generation:
                raise make_error("P003", f"generation {order.generation} is over", value=run.activation.generation)
            run.activation = order.applied_to(run.activation)
            self._relink()
            self.manager.relink(order)
        except IcrfError as error:
            return done(None, error)
        self._observer.relinking(self.name, order)

        def all_linked(_: list[Any], error: IcrfError | None) -> None:
            done(None if error else run.activation, error)

        self._on_hosts(run.hosts, (0.01, 0.5), lambda host: sim_hosts.relink(host, order), all_linked)

    def send_payload(self, run_id: str, start: StartRound, transfer: Transfer, done: Done) -> None:
        """Send what was posted to the cluster it is for."""
        try:
            run = self._run(run_id)
            posting, array = sim_hosts.posted(self.manager, start, transfer)
        except IcrfError as error:
            return done(None, error)
        exact = transfer.kind in EXACT
        header = PayloadHeader(
            run_id=run_id,
            generation=start.generation,
            round=start.round,
            attempt=start.attempt,
            kind=transfer.kind,
            sender=transfer.sender,
            source=self.name,
            target=run.activation.clusters[transfer.target],
            dtype="float64" if exact else "int64",
            num_elements=len(array),
            weight=posting.weight,
            recipients=transfer.recipients if exact else (),
        )
        self._network.send(header, array.copy(), done)

    def receive(self, header: PayloadHeader, array: Vector) -> IcrfError | None:
        """A payload at the gateway; the error goes back to its sender."""
        try:
            self.manager.deliver(header, [array], 8 * len(array) + WIRE_HEADER_BYTES)
        except IcrfError as error:
            return error
        self._observer.took_in(self.name, header)
        arrival = Arrival(header, 8 * len(array) + WIRE_HEADER_BYTES)
        self._world.soon(0.0, 0.2, None, lambda: self.listener(arrival))
        return None

    def abort(self, run_id: str, round_number: int, attempt: int) -> None:
        """Void an attempt. A manager that came back empty shows here at the latest."""
        if self.alive:
            self._relink()
        self.manager.abort(run_id, round_number, attempt)

    # ------------------------------------------------------------ states as bytes

    def checkpoint(self, run_id: str, round_number: int, done: Done) -> None:
        """This cluster's part of a committed state as bytes."""
        try:
            run = self._run(run_id)
        except IcrfError as error:
            return done(None, error)
        keepers = [h for h in run.hosts if run.keeps_state(h)]

        def pack(parts: list[Any], error: IcrfError | None) -> None:
            done(None if error else sim_hosts.pack_states(parts, round_number), error)

        self._on_hosts(keepers, (0.05, 1.0), lambda host: sim_hosts.state_rows(run, host, round_number), pack)

    def final_model(self, run_id: str, round_number: int, done: Done) -> None:
        """The global or consensus model of a round."""
        try:
            run = self._run(run_id)
        except IcrfError as error:
            return done(None, error)

        def found(models: list[Any], error: IcrfError | None) -> None:
            done(None if error else models[0], error)

        self._on_hosts([run.model_host], (0.05, 1.0), lambda h: sim_hosts.model_file(run, h, round_number), found)

    # ------------------------------------------------------------ inside

    def _run(self, run_id: str) -> SimRun:
        if not self.alive:
            raise NodeError("U003", "the cluster is gone", place=self.name)
        if run_id not in self.runs:
            raise RunError("F005", f"run {run_id[:8]} is not active on cluster {self.name}")
        return self.runs[run_id]

    def _dawdles(self, run_id: str, start: StartRound) -> bool:
        """Whether training misses the deadline: not where the round could not go on with the aggregator's cluster only,
        nor where it may be committed already, so that it has to have whom it had."""
        run = self.runs[run_id]
        newest, self._newest[run_id] = self._newest[run_id], max(start.round, self._newest[run_id])
        order, tally = run.activation, run.tally
        if start.round <= newest or not tally.weighs or any(tally.aggregator in host.nodes for host in run.hosts):
            return False
        chosen = nodes_of(start.participants) or tally.participants
        left = [n for n in chosen if order.assignment[n] == order.assignment[tally.aggregator]]
        # Also when nothing else goes wrong any more, but not for ever.
        if len(left) < tally.config["min_nodes"] or self._lateness[run_id] >= MAX_LATE:
            return False
        late = self._world.rng.random() < LATE_ODDS
        self._lateness[run_id] += late
        return late

    def _relink(self) -> None:
        linked = self.manager.linked()
        for run in self.runs.values():
            order = run.activation
            if linked.get(order.run_id, (0,))[0] != order.generation:
                self.manager.link(order)
                if run.position[0]:
                    self.manager.begin_round(order.run_id, order.generation, *run.position)
                    for position in sorted({run.position, max(run.position, run.ahead)}):
                        self.manager.abort(order.run_id, *position)

    def _begin(self, run_id: str, start: StartRound, done: Done) -> bool:
        """Open an attempt here; False if it could not be, and `done` has been told."""
        try:
            run = self._run(run_id)
            run.position = max(run.position, (start.round, start.attempt))
            self.manager.begin_round(run_id, start.generation, start.round, start.attempt)
            self._observer.began(self.name, start)
        except IcrfError as error:
            done(None, error)
            return False
        return True

    def _phase(
        self,
        run_id: str,
        start: StartRound,
        takes_s: tuple[float, float],
        phase: Phase,
        done: Done,
        where: Callable[[SimRun], Sequence[SimHost]] = lambda run: run.hosts,
    ) -> None:
        try:
            run = self._run(run_id)
        except IcrfError as error:
            return done(None, error)

        def call(host: SimHost) -> PhaseReport | None:
            sim_hosts.require_nodes(host)
            return phase(self.manager, run, host, start)

        def merge(parts: list[Any], error: IcrfError | None) -> None:
            reports = [p for p in parts if p is not None]
            done(merge_reports(reports) if reports else None, error)

        self._on_hosts(where(run), takes_s, call, merge)

    def _on_hosts(
        self,
        hosts: Sequence[SimHost],
        takes_s: tuple[float, float],
        work: Callable[[SimHost], Any],
        done: Callable[[list[Any], IcrfError | None], None],
    ) -> None:
        """Call all hosts at once; `done` is told the results in their order, or the first error."""
        results: dict[int, Any] = {}
        over: list[bool] = []

        def finish(slot: int, host: SimHost, life: int) -> None:
            try:
                if host.life != life or not self.alive:
                    raise NodeError("U003", "its process died", place=f"host-{slot} on {self.name}")
                results[slot] = work(host)
            except IcrfError as error:
                if not over:
                    over.append(True)
                    done([], error)
                return
            if len(results) == len(hosts) and not over:
                over.append(True)
                done([results[k] for k in range(len(hosts))], None)

        if not hosts:
            return done([], None)
        for slot, host in enumerate(hosts):
            host.clear_s = max(host.clear_s, self._world.now_s) + self._world.work_s(*takes_s)
            self._world.at(host.clear_s, None, lambda s=slot, h=host, n=host.life: finish(s, h, n))  # type: ignore[misc]


def _makers(run: SimRun) -> Sequence[SimHost]:
    return run.makers


def _model_host(run: SimRun) -> Sequence[SimHost]:
    return [run.model_host]
