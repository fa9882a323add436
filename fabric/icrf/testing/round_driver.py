"""Drives the runtime of one cluster round by round, as mediator and agent would: for tests of what survives what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from icrf.errors import IcrfError
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    HIERARCHICAL,
    Activate,
    Activated,
    PeerAddress,
    Reserve,
    Resources,
    StartRound,
)
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.update import choose_grid
from icrf_agent.runtime import HostedRuntime

SCHEMAS = {
    CENTRALIZED: ("TraditionalFederatedLearning", "star"),
    DECENTRALIZED: ("DecentralizedFederatedLearning", "ring"),
    HIERARCHICAL: ("HierarchicalFederatedLearning", "hierarchy"),
}
# Of six nodes those that train.
_CLIENTS = {CENTRALIZED: 5, DECENTRALIZED: 6, HIERARCHICAL: 4}
CLUSTER, RUN = "a", "run-1"


def activation(flow: str, num_slots: int = 2, clusters: tuple[str, ...] = (CLUSTER,), **settings: Any) -> Activate:
    """Six nodes; on several clusters they alternate."""
    schema, topology = SCHEMAS[flow]
    config = FederationConfig.from_mapping(
        {
            "federation_id": "recovery",
            "federated_learning_schema": schema,
            "federated_learning_topology": topology,
            "number_of_clients": _CLIENTS[flow],
            "federated_learning_rounds": 3,
            "dataset_type": "digits",
            **settings,
        }
    )
    s = build_submission(config)
    assignment = tuple(n % len(clusters) for n in range(len(s.nodes)))
    peers = tuple(PeerAddress(name, "") for name in clusters)
    return Activate(
        run_id=RUN,
        generation=1,
        federation="recovery",
        config_json=s.config_json,
        flow=s.flow,
        nodes=s.nodes,
        graph=s.graph,
        layout=s.layout,
        clusters=clusters,
        assignment=assignment,
        peers=peers,
        num_slots=num_slots,
        rows=s.rows,
    )


@dataclass
class RoundDriver:
    """Runs rounds on one cluster.

    Attributes:
        absmax: largest value per tensor of the newest state.
        total: training samples of all nodes.
        attempt: the last attempt of the open round.
        hashes: round -> hash of its state.
    """

    runtime: HostedRuntime
    request: Activate
    absmax: tuple[float, ...] = ()
    total: int = 0
    attempt: int = 0
    hashes: dict[int, str] = field(default_factory=dict)

    async def activate(self, request: Activate | None = None, checkpoint: bytes = b"") -> Activated:
        """Reserve and activate, from the state in `checkpoint` if the request says so."""
        self.request = request or self.request
        r = self.request
        await self.runtime.reserve(
            Reserve(r.run_id, r.generation, r.federation, r.num_slots, Resources(), "PACK", deadline_s=60.0)
        )
        found = await self.runtime.activate(r, checkpoint)
        self.knows(found)
        return found

    def knows(self, found: Activated) -> None:
        """Go on from what an activation reported."""
        self.absmax, self.attempt = found.absmax, 0
        self.total = sum(n for _, n in found.num_samples) or self.total
        self.hashes[self.request.restore_round] = found.model_hash or found.state_hashes.hex()

    def next_start(self, number: int) -> StartRound:
        """The next attempt of a round; in a hierarchy every second one merges the groups."""
        self.attempt += 1
        grid = choose_grid(self.absmax, self.total)
        merge = self.request.flow == HIERARCHICAL and number % 2 == 0
        generation = self.request.generation
        return StartRound(RUN, generation, number, self.attempt, "", grid, self.total, evaluate=False, merge=merge)

    async def round(self, number: int) -> str:
        """Run a round; the hash of its state."""
        start = self.next_start(number)
        if self.request.flow != DECENTRALIZED:
            await self.runtime.publish_model(RUN, start)
        await self.runtime.train(RUN, start)
        report = await self.runtime.aggregate(RUN, start)
        assert not report.overflow
        if start.merge:
            report = await self.runtime.install(RUN, start)
        self.absmax, self.attempt = report.absmax, 0
        self.hashes[number] = report.model_hash or report.state_hashes.hex()
        return self.hashes[number]

    async def fails(self, number: int) -> IcrfError:
        """Run a round that fails; its error."""
        try:
            await self.round(number)
        except IcrfError as error:
            return error
        raise AssertionError(f"round {number} did not fail")


def restored(request: Activate, number: int) -> Activate:
    """The activation that follows a loss: the next generation, from the state of round `number`."""
    return replace(
        request, generation=request.generation + 1, restore_round=number, checkpoints=(f"checkpoint/{number}",)
    )
