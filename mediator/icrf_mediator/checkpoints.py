"""Which rounds of a run can be gone back to: checkpoints as they become durable, cluster by cluster. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from icrf.protocol import Submission
from icrf_mediator.placement import Placement

KEPT = 2
CHECKPOINTS = "checkpoint/"
"""What the names of all artifacts of checkpoints begin with."""


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        durable: round -> cluster -> artifact, complete ones only.
        open_round: the round whose checkpoint is being written; 0 for none.
    """

    durable: dict[int, dict[str, str]] = field(default_factory=dict)
    open_round: int = 0
    # Where nodes lived when a durable checkpoint was made, and the generation of that.
    _made_under: dict[int, tuple[int, Placement]] = field(default_factory=dict)
    _open_under: tuple[int, Placement] | None = None
    _missing: set[str] = field(default_factory=set)
    _arrived: dict[str, str] = field(default_factory=dict)
    # Artifacts of checkpoints that were given up.
    _useless: set[str] = field(default_factory=set)

    def begin(self, round_number: int, clusters: Iterable[str], generation: int, placement: Placement) -> None:
        """A checkpoint of `round_number` is asked of `clusters`; an unfinished older one is given up.

        Args:
            generation: of the assignment that nodes live under.
            placement: that assignment.
        """
        self.give_up()
        self.open_round, self._missing = round_number, set(clusters)
        self._open_under = generation, placement

    def arrived(self, cluster: str, round_number: int, artifact: str) -> bool:
        """One cluster's part is durable; True when it was the last."""
        if round_number != self.open_round or cluster not in self._missing:
            self.came_too_late(artifact)
            return False
        self._missing.discard(cluster)
        self._arrived[cluster] = artifact
        if self._missing:
            return False
        assert self._open_under is not None
        self.durable[round_number] = self._arrived
        self._made_under[round_number] = self._open_under
        self.open_round, self._arrived = 0, {}
        return True

    def came_too_late(self, artifact: str) -> None:
        """A part that nobody waits for any more is durable."""
        if artifact.startswith(CHECKPOINTS):
            self._useless.add(artifact)

    def give_up(self) -> None:
        """The open checkpoint will not be completed."""
        self._useless.update(self._arrived.values())
        self.open_round, self._missing, self._arrived = 0, set(), {}

    def due(self, round_number: int, every: int) -> bool:
        """Whether the newest one, being written or durable, lies `every` rounds back; 0: never.

        One that was given up counts for nothing: it is made up for at the next commit.
        """
        return every > 0 and round_number - max(self.open_round, *self.durable, 0) >= every

    def latest(self, not_after: int) -> int:
        """The newest durable round up to `not_after`; 0, the initial state, is always there."""
        return max((r for r in self.durable if r <= not_after), default=0)

    def generation(self, round_number: int) -> int:
        """The generation of the assignment that a durable one was made under."""
        return self._made_under[round_number][0]

    def parts(self, round_number: int, placement: Placement, submission: Submission) -> dict[str, tuple[str, ...]]:
        """The artifacts with what the nodes of each cluster have kept, wherever these lived then.

        Args:
            placement: where nodes are to live.
        """
        if round_number not in self.durable:
            return {}
        artifacts, before = self.durable[round_number], self._made_under[round_number][1]
        keepers = placement.members() if submission.rows.anybody_keeps else placement.keepers(submission)
        sources = {cluster: {before.cluster_of(node) for node in nodes} for cluster, nodes in keepers.items()}
        return {
            cluster: tuple(artifacts[source] for source in sorted(names) if source in artifacts)
            for cluster, names in sources.items()
        }

    def outdated(self) -> list[str]:
        """Forget all but the newest ones; the artifacts that may be deleted.

        Those of one that was given up may until now have been asked for again, under the same names.
        """
        doomed = sorted(self.durable)[:-KEPT]
        for number in doomed:
            del self._made_under[number]
        old = {artifact for r in doomed for artifact in self.durable.pop(r).values()} | self._useless
        self._useless = set()
        return sorted(old.difference(*(artifacts.values() for artifacts in self.durable.values())))

    def load(self, round_number: int, artifacts: Mapping[str, str], generation: int, placement: Placement) -> None:
        """Take over a journal row."""
        self.durable[round_number] = dict(artifacts)
        self._made_under[round_number] = generation, placement
