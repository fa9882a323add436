"""A run is set up on its clusters: slots are reserved, nodes made, and moved to other clusters. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from icrf.errors import InternalError
from icrf.ports import Write
from icrf.protocol import (
    ACTIVATING,
    CENTRALIZED,
    DECENTRALIZED,
    READY,
    RECOVERING,
    RESERVING,
    PeerAddress,
    Release,
    nodes_that,
)
from icrf_mediator.effects import Effects, Now
from icrf_mediator.placement import Placement, moved
from icrf_mediator.rounds import differs
from icrf_mediator.run_base import NEVER
from icrf_mediator.run_rounds import RunRounds

GRACE_S = 2.0
"""A lost cluster is given up so long after its lease has ended."""


class RunSetup(RunRounds):
    """What a run does between the queue and its rounds, for the first time and again."""

    # The newest round after which another assignment was looked for, and whether one is being looked for now.
    _looked_after = 0
    _looking = False
    # How long a checkpoint is waited for that would spare a lost cluster's run rounds.
    _durable_until_s = NEVER
    # After a loss, the clusters on which it waits for slots that it does not have yet.
    _wants: frozenset[str] = frozenset()
    # Why nodes stayed the last time; the same is told once.
    _told_to_stay = ""

    def _reserve(self, effects: Effects, now: Now) -> None:
        """Start under a new generation."""
        assert self.placement is not None
        self.generation += 1
        self._set_up_generation = self.generation
        self._lost_state, self._attempt_floor, self._parts = False, 0, {}
        self._promised, self._in_vain = None, 0
        self._open_calls, self._called = set(), False
        effects.writes.append(self.placement.row(self.run_id, self.generation, self._instead_of))
        self._held |= set(self.placement.clusters)
        self.record.status(effects, now, RESERVING, f"reservations on {', '.join(self.placement.clusters)}")
        strategy = self.config["placement_group_strategy"]
        federation = self.info.federation
        orders = self.placement.reserve(self.run_id, self.generation, federation, strategy, self._reserve_s)
        self._ask(effects, now, orders, self._reserve_s + 30.0)

    def _activate(self, effects: Effects, now: Now) -> None:
        assert self.placement is not None
        done = self.info.rounds_done
        over = done >= self._rounds_wanted and self.submission.flow == DECENTRALIZED
        # A consensus model is no part of the state: its round has to run again to make it.
        self._restored_round = self.checkpoints.latest(done - 1 if over and done else done)
        artifacts = self.checkpoints.parts(self._restored_round, self.placement, self.submission)
        peers = [PeerAddress(name, self._addresses(name)) for name in self.clusters]
        self.record.status(effects, now, ACTIVATING, f"nodes to be set up on {', '.join(self.clusters)}")
        restore, graph = (self._restored_round, artifacts), self.graphs.after(self._restored_round)
        self.graphs.set_up(self._restored_round)
        whom = (self.run_id, self.generation, self.info.federation)
        orders = self.placement.activate(*whom, self.submission, peers, restore, graph)
        self._ask(effects, now, orders, self._activate_s)

    def _ready(self, effects: Effects, now: Now) -> None:
        ledger = self._ledger
        assert ledger is not None and self.placement is not None
        samples = {node: count for part in self._parts.values() for node, count in part.num_samples}
        trains = nodes_that("train", self.submission.nodes)
        missing = [self.submission.nodes[i].id for i in trains if samples.get(i, 0) < 1]
        if missing:
            return self.fail(effects, now, InternalError("X001", f"no sample count for {', '.join(missing[:5])}"))
        if self.submission.flow == CENTRALIZED:
            head = "".join(part.model_hash for part in self._parts.values())
        else:
            head = ledger.root(ledger.leaves({c: part.state_hashes for c, part in self._parts.items()}))
        known = ledger.recorded(self._restored_round)
        if known and known != head:
            return self.fail(effects, now, differs(self._restored_round, known, head))
        ledger.samples = samples
        total = ledger.most_weight(trains)
        if self._restored_round == 0:
            ledger.begin([part.absmax for part in self._parts.values()], head, total)
        ledger.total_weight = total
        ledger.rewind(self._restored_round)
        row = {
            "total_weight": total,
            "samples": sorted(samples.items()),
            "head_hash": head,
            "absmax": list(ledger.absmax),
            "round": ledger.round,
        }
        effects.writes.append(Write("activations", (self.run_id, self.generation), row))
        self._instead_of = None
        self.record.status(effects, now, READY)
        self._go_on(effects, now)

    # ------------------------------------------------------------ other clusters

    @property
    def reassigns(self) -> bool:
        """Whether nodes of a lost cluster go to others."""
        return bool(self.config.get("on_cluster_loss") == "reassign")

    @property
    def by_choice(self) -> bool:
        """Whether nodes may move because that is better; else because their cluster is lost."""
        return self._looking

    def looks_for_clusters(self, now: Now) -> bool:
        """Whether another assignment is wanted now."""
        if self._looking:
            return True
        away = self._away if self.info.status == RECOVERING and self.reassigns else ()
        return bool(away) and all(now.monotonic_s >= self._given_up_s.get(name, NEVER) for name in away)

    @property
    def in_line_for(self) -> frozenset[str]:
        """The clusters on which it waits for more slots, to go on there instead of on a lost one."""
        return self._wants if self.info.status == RECOVERING else frozenset()

    def wants(self, clusters: Iterable[str]) -> None:
        """After a loss it is in line for these; by choice it waits for nobody."""
        self._wants = frozenset() if self._looking else frozenset(clusters)

    def waits_for(self, cluster: str) -> bool:
        """Whether a cluster of it, that is not there just now, is expected back."""
        return cluster not in self._away

    def comes_after(self, other: RunSetup) -> bool:
        """Whether another run goes first where both need slots: by choice nobody is overtaken."""
        mine, others = ((run.info.created_at, run.run_id) for run in (self, other))
        return self._looking or others < mine

    def _gone_for(self, now: Now, clusters: Iterable[str], grace_s: float) -> None:
        """Clusters are away, and are given up unless they are back in so many seconds."""
        for cluster in clusters:
            self._away.add(cluster)
            self._given_up_s[cluster] = now.monotonic_s + grace_s

    def _begin_looking(self, now: Now) -> bool:
        """Between two rounds: whether another assignment is looked for first, once after every so many rounds.

        Not where a round runs again, and not while a cluster is missing.
        """
        assert self._ledger is not None
        if self._looking:
            return True
        done = self._ledger.round
        is_new = done >= self.info.rounds_done and done > self._looked_after
        in_between = self._gone or self.leaving or self._returning or self._stopping
        if not self._may_move_after(done) or not is_new or in_between:
            return False
        self._looking, self._looked_after = True, done
        self._deadline_s = now.monotonic_s + float(self.config["round_deadline_s"])
        return True

    def is_durable(self, effects: Effects, now: Now) -> bool:
        """Whether what nodes would go on from elsewhere is durable; it is made so where nothing of it is lost."""
        assert self._ledger is not None and self.placement is not None
        done = self._ledger.round
        asked = done in self.checkpoints.durable or self.checkpoints.open_round == done
        if self._looking and (self._open_calls or (self._called and asked)):
            self.stays(effects, now, "they were called, or sent messages, that their durable state may not have")
            return False
        lost = self._lost_state or not self._away.isdisjoint(self.placement.stateful(self.submission))
        if lost or done == 0 or done in self.checkpoints.durable:
            return True
        if self.checkpoints.open_round != done:
            self._checkpoint(effects)
            self._durable_until_s = now.monotonic_s + self._reserve_s
        elif now.monotonic_s >= self._durable_until_s and not self._looking:
            # Back to the checkpoint before: whoever is asked does not answer.
            self.checkpoints.give_up()
            self._lost_state = True
            return True
        self.record.waits(effects, now, f"the state of round {done} to be durable: nodes are to move", quiet=True)
        return False

    def stays(self, effects: Effects, now: Now, reason: str) -> None:
        """Nodes stay where they are; the reason is empty where they are well off there."""
        if self._looking:
            self._looking, self._deadline_s = False, NEVER
            if reason not in ("", self._told_to_stay):
                self.record.event(effects, now, "move", f"nodes stay where they are: {reason}")
            self._told_to_stay = reason
            self._go_on(effects, now)
        else:
            lost = ", ".join(sorted(self._away))
            self.record.waits(effects, now, f"cluster {lost} to come back; its nodes cannot move: {reason}")

    def move(self, effects: Effects, now: Now, placement: Placement) -> None:
        """Go on elsewhere, under a new generation, from the newest durable state; what is left behind is fenced."""
        assert self.placement is not None and self._ledger is not None
        gone = set(self.clusters) - set(placement.clusters)
        self._instead_of = self.placement if self._looking else None
        for cluster in sorted(gone & self._held):
            effects.send(cluster, Release(self.run_id, self.generation))
        for names in (self._away, self._excluded, self._returning, self._late, self.leaving):
            names.difference_update(gone)
        self._looking, self._looked_after = False, self._ledger.round
        text = moved(self.placement, placement, [node.id for node in self.submission.nodes])
        self._place(placement)
        self.record.change(clusters=placement.clusters)
        self.record.event(effects, now, "move", text)
        self._reserve(effects, now)
