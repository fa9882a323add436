"""The mediator's core under a clock that only a test moves, with agents that answer when a test lets them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from icrf.errors import IcrfError, error_from_json
from icrf.ports import Write
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    AbortAttempt,
    Activate,
    Activated,
    CallDone,
    Capacity,
    Checkpointed,
    Dismiss,
    Fingerprint,
    Instruction,
    Lease,
    MetricSum,
    ModelStored,
    NodeSpec,
    Register,
    Reject,
    Release,
    Released,
    Report,
    Reserve,
    Reserved,
    RoundReport,
    RunEvent,
    RunInfo,
    SaveCheckpoint,
    StartRound,
    StoreModel,
    Submission,
    TensorSpec,
    nodes_of,
    nodes_that,
)
from icrf.topology import build_topology
from icrf_mediator.effects import Effects, Now
from icrf_mediator.mediator import FederationMediator, Policy
from icrf_mediator.store import TABLES, MemoryStore

AVX2 = Fingerprint("2.13", "AVX2", "on", 1, "cpu")
LAYOUT = (TensorSpec("b", (10,), "float32"), TensorSpec("w", (9, 10), "float32"))
CONFIG = {
    "federation_id": "fed",
    "federated_learning_rounds": 3,
    "evaluate_every": 1,
    "round_deadline_s": 100.0,
    "placement_group_strategy": "PACK",
    "determinism": "strict",
}


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def bitmap(nodes: list[int]) -> bytes:
    packed = bytearray(max(nodes, default=-1) // 8 + 1)
    for node in nodes:
        packed[node // 8] |= 1 << node % 8
    return bytes(packed)


def coordinator_of(order: Activate) -> str:
    """The cluster that makes the global or consensus model: that of the server, or of the first peer."""
    servers = () if order.flow == DECENTRALIZED else nodes_that("aggregate", order.nodes)
    return order.clusters[order.assignment[servers[0] if servers else 0]]


@dataclass
class Core:
    """A mediator's core with a journal; what it sends is queued per cluster until a test plays or takes it."""

    policy: Policy = field(default_factory=Policy)
    store: MemoryStore = field(default_factory=MemoryStore)
    time_s: float = 1000.0
    accuracy: float = 0.5

    def __post_init__(self) -> None:
        self.mediator = FederationMediator(self.policy)
        self.queue: list[tuple[str, Instruction]] = []
        self.sent: list[tuple[str, Instruction]] = []
        self.answers: list[CallDone] = []
        self.dropped: list[str] = []
        self.deletes: list[tuple[str, str]] = []
        self.live: list[RunEvent] = []
        self.orders: dict[tuple[str, str], Activate] = {}
        self._submitted = 0

    @property
    def now(self) -> Now:
        return Now(self.time_s, 1e9 + self.time_s)

    def carry_out(self, effects: Effects) -> Effects:
        self.store.apply(effects.writes)
        self.queue += effects.sends
        self.sent += effects.sends
        self.answers += effects.answers
        self.dropped += effects.dropped
        self.deletes += effects.deletes
        self.live += effects.events
        return effects

    # ------------------------------------------------------------ the SDK's side

    def submission(self, num_nodes: int = 4, flow: str = DECENTRALIZED, **parts: Any) -> Submission:
        """A ring, or a star with the server at index 0; what is no field of a submission goes to the configuration."""
        own = {k: parts.pop(k) for k in ("keep", "stage", "client_request_id", "schedule") if k in parts}
        ids, roles = [f"client_{i}" for i in range(num_nodes)], ["train-eval"] * num_nodes
        if flow == CENTRALIZED:
            ids, roles = ["server", *ids[:-1]], ["aggregate-test", *roles[1:]]
        self._submitted += 1
        return Submission(
            client_request_id=own.pop("client_request_id", f"request-{self._submitted}"),
            config_json=json.dumps({**CONFIG, **parts}),
            flow=flow,
            nodes=tuple(NodeSpec(i, role) for i, role in zip(ids, roles, strict=True)),
            graph=build_topology("star" if flow == CENTRALIZED else "ring", num_nodes, {}).to_graph(),
            layout=LAYOUT,
            **own,
        )

    def submit(self, submission: Submission | None = None, **parts: Any) -> RunInfo:
        chosen = submission or self.submission(**parts)
        info, effects = self.mediator.submit(chosen, digest(self._submitted, chosen).hex()[:32], self.now)
        self.carry_out(effects)
        return info

    def get(self, run: RunInfo) -> RunInfo:
        return self.mediator.get(run.run_id)

    def events(self, run: RunInfo) -> list[RunEvent]:
        _, events = self.mediator.events(run.run_id)
        assert events is not None
        assert [e.seq for e in events] == list(range(1, len(events) + 1))
        return list(events)

    def error(self, run: RunInfo) -> IcrfError:
        return error_from_json(self.get(run).error_json)

    def cancel(self, run: RunInfo) -> RunInfo:
        info, effects = self.mediator.cancel(run.run_id, self.now)
        self.carry_out(effects)
        return info

    def advance(self, run: RunInfo, stage: str, rounds: int = 0) -> RunInfo:
        info, effects = self.mediator.advance(run.run_id, stage, rounds, self.now)
        self.carry_out(effects)
        return info

    def finish(self, run: RunInfo) -> RunInfo:
        info, effects = self.mediator.finish(run.run_id, self.now)
        self.carry_out(effects)
        return info

    # ------------------------------------------------------------ the agents' side

    def register(self, *names: str, slots: int = 2, **parts: Any) -> IcrfError | None:
        """Register agents; the refusal of the last one."""
        refusal = None
        for name in names:
            request = Register(
                name,
                parts.get("incarnation", f"i-{name}"),
                parts.get("protocol", 1),
                "0.1",
                parts.get("capacity", Capacity(slots, float(slots), 0.0, 1 << 33)),
                parts.get("fingerprint", AVX2),
                parts.get("labels", {}),
                agent_id=parts.get("agent_id", ""),
                held=parts.get("held", ()),
            )
            refusal, effects = self.mediator.register(request, "127.0.0.1:9", self.now)
            self.carry_out(effects)
        return refusal

    def report(self, cluster: str, report: Report, incarnation: str = "") -> Effects:
        return self.carry_out(self.mediator.report(cluster, incarnation or f"i-{cluster}", report, self.now))

    def pass_time(self, seconds: float, beating: tuple[str, ...] = ()) -> Effects:
        """Let time pass in steps of a heartbeat; the agents in `beating` renew their leases."""
        effects = Effects()
        while seconds > 0:
            self.time_s += min(seconds, self.policy.heartbeat_s)
            seconds -= self.policy.heartbeat_s
            for cluster in beating:
                self.mediator._members.heartbeat(cluster, f"i-{cluster}", self.time_s)
            effects = self.carry_out(self.mediator.tick(self.now))
        return effects

    def take(self, *kinds: type) -> list[tuple[str, Instruction]]:
        """Instructions of these kinds out of the queue, unanswered."""
        taken = [one for one in self.queue if isinstance(one[1], kinds)]
        self.queue = [one for one in self.queue if not isinstance(one[1], kinds)]
        return taken

    def play(self, hold: tuple[type, ...] = (), late: tuple[str, ...] = ()) -> list[tuple[str, Instruction]]:
        """Let the agents answer all there is, but leave instructions of `hold` and those to `late` clusters in the
        queue; returns what is left."""
        left: list[tuple[str, Instruction]] = []
        while self.queue:
            cluster, instruction = self.queue.pop(0)
            if isinstance(instruction, hold) or cluster in late:
                left.append((cluster, instruction))
            elif (answer := self.answer(cluster, instruction)) is not None:
                self.report(cluster, answer)
        self.queue = left
        return left

    def play_round(self) -> None:
        """Let the agents answer the open round only."""
        for cluster, order in self.take(StartRound):
            self.report(cluster, self.round_report(cluster, order))

    def answer(self, cluster: str, order: Instruction) -> Report | None:
        """What an agent in good health says to an instruction."""
        if isinstance(order, Reserve):
            return Reserved(order.run_id, order.generation)
        if isinstance(order, Activate):
            self.orders[order.run_id, cluster] = order
            return self.activated(cluster, order)
        if isinstance(order, StartRound):
            return self.round_report(cluster, order)
        if isinstance(order, StoreModel):
            return ModelStored(order.run_id, order.generation, order.round, "model.safetensors", "ab" * 32)
        if isinstance(order, SaveCheckpoint):
            artifact = f"checkpoint/{order.round}.{order.generation}/{cluster}"
            return Checkpointed(order.run_id, order.generation, order.round, artifact)
        if isinstance(order, Release):
            return Released(order.run_id, order.generation)
        assert isinstance(order, AbortAttempt | Dismiss | Lease | Reject)
        return None

    def nodes_on(self, run_id: str, cluster: str) -> list[int]:
        order = self.orders[run_id, cluster]
        return [n for n, c in enumerate(order.assignment) if order.clusters[c] == cluster]

    def activated(self, cluster: str, order: Activate) -> Activated:
        nodes = self.nodes_on(order.run_id, cluster)
        trains = [n for n in nodes if "train" in order.nodes[n].role]
        is_coordinator = cluster == coordinator_of(order)
        decentralized = order.flow == DECENTRALIZED
        return Activated(
            order.run_id,
            order.generation,
            num_samples=tuple((n, 10 + n) for n in trains),
            absmax=(1.0, 2.0) if decentralized or is_coordinator else (),
            state_hashes=b"".join(digest(order.restore_round, n) for n in nodes) if decentralized else b"",
            model_hash=digest("model", order.restore_round).hex() if is_coordinator and not decentralized else "",
        )

    def round_report(self, cluster: str, start: StartRound, **parts: Any) -> RoundReport:
        order = self.orders[start.run_id, cluster]
        nodes = self.nodes_on(start.run_id, cluster)
        trains = [n for n in nodes if "train" in order.nodes[n].role]
        chosen: tuple[object, ...] = ()
        if start.participants:
            trains = [n for n in trains if n in nodes_of(start.participants)]
            chosen = (start.participants,)
        is_coordinator = cluster == coordinator_of(order)
        decentralized = order.flow == DECENTRALIZED
        usual: dict[str, Any] = {
            "participants": bitmap(trains),
            "absmax": (1.0, 2.0) if decentralized or is_coordinator else (),
            "metric_sums": {"train_loss": MetricSum(str(len(trains) << 40), len(trains))} if trains else {},
            "metrics": {"accuracy": self.accuracy} if is_coordinator and start.evaluate else {},
            "model_hash": digest("model", start.round, *chosen).hex() if is_coordinator else "",
            "state_hashes": b"".join(digest(start.round, n) for n in nodes) if decentralized else b"",
            "bytes_inter_cluster": 100,
        }
        return RoundReport(start.run_id, start.generation, start.round, start.attempt, **{**usual, **parts})

    def commits(self, run: RunInfo) -> list[Write]:
        return self.store.rows("commits", (run.run_id,))

    # ------------------------------------------------------------ runs whose nodes move

    def ring(self, num_nodes: int = 6, **parts: Any) -> RunInfo:
        """A run of peers on what is registered, all six rounds of it still to come."""
        return self.submit(self.submission(num_nodes, federated_learning_rounds=6, **parts))

    def before_a_move(self) -> RunInfo:
        """A run on two clusters in the round after which another placement is looked for."""
        self.register("eu", "us")
        run = self.ring(clustering_period=2)
        self.up_to(run, 2)
        return run

    def before_a_loss(self) -> RunInfo:
        """A run on three clusters in its fourth round, with a checkpoint of the second."""
        self.register("eu", "us", "za")
        run = self.ring(on_cluster_loss="reassign", checkpoint_every=2)
        self.up_to(run, 4)
        return run

    def up_to(self, run: RunInfo, number: int) -> None:
        """Play until the start of a round is in the queue."""
        while self.get(run).rounds_done < number - 1:
            self.play(hold=(StartRound,))
            self.play_round()
        self.play(hold=(StartRound,))

    def completed(self, run: RunInfo) -> None:
        """Play on to the end of a run of six rounds."""
        self.play()
        assert (self.get(run).status, self.get(run).error_json) == ("COMPLETED", "")
        assert [row.key[1] for row in self.commits(run)] == list(range(1, 7))

    def homes(self, run: RunInfo) -> list[str]:
        """The cluster of every node."""
        machine = self.mediator._runs[run.run_id]
        return [machine.cluster_of(node) for node in range(len(machine.submission.nodes))]

    def last_homes(self, run: RunInfo) -> list[str]:
        """Where nodes lived last, out of the journal."""
        row = self.store.rows("assignments", (run.run_id,))[-1].row
        return [row["clusters"][k] for k in row["assignment"]]

    def texts(self, run: RunInfo) -> list[str]:
        """What users have been told of a run."""
        return [event.text for event in self.events(run) if event.text]

    def restarted(self) -> Core:
        """A new core over the same journal, as after a restart of the mediator."""
        core = Core(self.policy, self.store, self.time_s)
        names = [name for name in TABLES if name not in ("attempts", "meta")]
        tables = {name: self.store.rows(name) for name in names}
        core.carry_out(core.mediator.restore(tables, self.now))
        return core


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture(scope="session")
def new_core() -> Callable[..., Core]:
    return Core
