"""What a host does in each phase of a round with a server.

Every host trains its nodes from what the server sent and publishes their contributions: as one exact partial sum, or
one by one where the aggregation rule has to see each of them. The host of the aggregator makes the next server state
out of them. The rule itself is an :class:`icrf.learning.Aggregator`; FedAvg is one like the others. Where a federation
learns several models, all are sent, and each node trains the one that suits its data best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from icrf.errors import ConfigError, IcrfError, InternalError, NodeError, WeightsError
from icrf.exchange import MODEL, PARTIAL, UPDATE
from icrf.learning.aggregation import (
    AGGREGATORS,
    ClientUpdate,
    RoundFacts,
    UpdateAggregator,
    build_aggregator,
)
from icrf.learning.layout import model_names
from icrf.learning.rng import derive_seed, global_randomness, stable_random_state
from icrf.learning.training import LocalTerms
from icrf.learning.vectorized import Job, Outcome
from icrf.ports import PhaseReport
from icrf.protocol import AGGREGATED, MEAN, ROUNDED, Activated, StartRound, nodes_that
from icrf.staleness import WEIGH, late_nodes, scaled
from icrf.update import ExactSum
from icrf_agent.checkpoint import SERVER, model_of, pack_rows, unpack_models, unpack_rows
from icrf_agent.host_late import EarlierModels, FinishedWork
from icrf_agent.host_nodes import is_ours
from icrf_agent.host_state import VersionedState
from icrf_agent.host_tools import HostTools, MetricSums
from icrf_agent.postings import Posting
from icrf_agent.row_file import Table, like, make_table

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Turn:
    """One participant's part of a round, up to its training.

    Attributes:
        round: whose update it owes; an earlier one where it is late.
        received: the rows that the server sent; of several models the chosen one.
        kept, next_kept: what the node keeps, and what it will have kept.
        terms: what the rule adds to its training.
        chosen: which model it trains.
        job: what it trains together with others, if it does.
    """

    index: int
    round: int
    received: Array
    kept: Array
    next_kept: Array
    terms: LocalTerms | None
    chosen: int
    job: Job | None


class CentralizedFlow:
    """One aggregator and its participants; see the module's docstring.

    Args:
        restored: this host's part of the state of the round to start from, see ``checkpoint.py``; empty: the initial.

    Raises:
        ConfigError: C008 if the aggregation rule is not the one that was submitted, or does not work with so many
            participants; see also :func:`icrf.learning.build_aggregator`.
        WeightsError: W010, W020 for a state that does not fit.
    """

    def __init__(self, tools: HostTools, restored: bytes = b"") -> None:
        self._t = t = tools
        self._aggregator = nodes_that("aggregate", t.activation.nodes)[0]
        self._all_participants = nodes_that("train", t.activation.nodes)
        training = frozenset(self._all_participants)
        self._participants = tuple(i for i in t.nodes.indices if i in training)
        # Where a participant's rows are among those that this host keeps.
        self._row_of = {index: k for k, index in enumerate(self._participants)}
        config = t.nodes.config
        self._rule = build_aggregator(config.aggregation_strategy, config.model_dump(), config.num_models)
        self._rule_is_ours = is_ours(AGGREGATORS.get(config.aggregation_strategy))
        self._private = t.layout.row_size - t.layout.num_parameters
        if self._rule.rows.with_private(t.layout.tensors) != replace(t.activation.rows, nodes_keep=False):
            raise ConfigError(
                "C008",
                "the aggregation rule here is not the one that was submitted",
                place="aggregation_strategy",
                value=str(self._rule.rows),
                allowed=str(t.activation.rows),
                hint="install the same version of its code on every cluster",
            )
        self._size = t.layout.num_parameters
        self._layout = t.layout.repeated(config.num_models)
        self._names = model_names(config.num_models)
        # What a model counts or averages by itself, such as batch norm: always the plain mean of the nodes'. The rule
        # of several models takes nothing but means.
        averaged = (MEAN, ROUNDED) if config.num_models == 1 else ()
        self._buffers = [part for tensor, part in t.layout.places if tensor.rule in averaged]
        self._learned = [part for tensor, part in t.layout.places if tensor.rule == AGGREGATED]
        # The newest models that this host has seen.
        self._seen: Array = t.nodes.initial
        self._earlier = EarlierModels()
        row_bytes = t.layout.num_parameters * t.layout.dtype.itemsize
        weighs = t.nodes.config.late_updates == WEIGH
        self._finished = FinishedWork(len(self._participants), row_bytes) if weighs else None
        # The sum of the participants beside the aggregator, by attempt: it goes nowhere, so it is not posted.
        self._own_sum: tuple[tuple[int, int], ExactSum] | None = None
        # What each participant here has chosen last, to be shown between rounds.
        self._chosen: dict[int, int] = {}
        self._server, self._clients = self._states(restored)

    def _states(self, restored: bytes) -> tuple[VersionedState[Array] | None, VersionedState[Table] | None]:
        """What this host keeps between rounds: the server's rows, its participants' rows."""
        t, rows, number = self._t, self._rule.rows, self._t.activation.restore_round
        server = clients = None
        if self._aggregator in t.nodes.indices:
            state = self._rule.first_state(t.nodes.initial_models(self._rule.num_models))
            if number:
                state = unpack_rows(t.layout, restored, number, [SERVER], rows.server * self._size)[0]
                self._seen = self._models(state)
                self._earlier = EarlierModels(unpack_models(t.layout, restored, number))
            server = VersionedState(state, number, recycle=not t.has_last_word)
        own = rows.client * self._size + rows.client_scalars
        kept = own + self._private
        if kept and self._participants:
            t.nodes.model.load(t.nodes.initial)
            row = np.zeros(kept, t.layout.dtype)
            row[own:] = t.nodes.model.row[self._size :]
            rows_of_all = [row] * len(self._participants)
            if number:
                names = [str(i) for i in self._participants]
                rows_of_all = list(unpack_rows(t.layout, restored, number, names, kept))
            table: Table = make_table(rows_of_all, kept, t.layout.dtype, not t.nodes.all_resident)
            clients = VersionedState(table, number, recycle=True, like=like)
        return server, clients

    def initial(self) -> Activated:
        """The state to start from, as far as this host holds it."""
        t = self._t
        if self._server is None:
            return Activated(t.activation.run_id, t.activation.generation)
        models = self._models(self._server.committed)
        return Activated(
            t.activation.run_id,
            t.activation.generation,
            absmax=self._rule.expected(self._layout.absmax(models)),
            model_hash=self._layout.model_sha256(models),
        )

    def _models(self, state: Array) -> Array:
        """The models of the server's state, or of what it sends: its first rows, mostly one."""
        return state[: self._rule.num_models * self._size]

    def _row(self, rows: Array, number: int) -> Array:
        return rows[number * self._size : (number + 1) * self._size]

    def publish_model(self, start: StartRound) -> None:
        """Aggregator: publish the committed global model, and what its rule sends with it, to all participants."""
        assert self._server is not None
        state = self._server.rebase(start)
        self._earlier.enter(start, self._server, self._size)
        self._post_models(start, state)

    def _post_models(self, start: StartRound, state: Array) -> None:
        rows = self._rule.sent(state[: self._rule.rows.down * self._size], self._learned)
        sent = self._earlier.sent(start, rows)
        recipients = tuple(i for i in self._t.taking_part(start, self._all_participants) if i != self._aggregator)
        self._t.post(start, MODEL, (self._aggregator,), sent, recipients=recipients)

    # ------------------------------------------------------------ participants

    def train(self, start: StartRound) -> PhaseReport:
        """Train this host's participants from the global model and publish what they contribute."""
        t = self._t
        participants = t.taking_part(start, self._participants)
        kept, next_kept = self._client_states(start)
        if not participants:
            return PhaseReport()
        postings = t.collect(start, MODEL)
        if len(postings) != 1:
            raise InternalError("X001", f"round {start.round} has {len(postings)} global models")
        # The aggregator's own cluster, which is never late, also has what goes to those that are.
        received = t.references.get(postings[0].reference).reshape(-1)[: self._rule.rows.down * self._size]
        self._seen = self._models(received)
        sums: MetricSums = {}
        overflow: set[int] = set()
        every_update = self._rule.rows.every_update
        updates = t.buffer("updates", (len(self._participants), self._size)) if every_update else None
        total = None if every_update else t.exact_sum(start)
        late = late_nodes(start.late)
        places = {index: k for k, index in enumerate(participants)}
        for turn, ahead in self._turns(start, participants, received, (kept, next_kept), sums):
            index = turn.index
            with t.nodes.in_round(index, turn.round):
                flat = self._contribution(start, turn, sums, ahead)
                # Where rows lie on disk, the turn has had copies.
                next_kept[self._row_of[index]] = turn.next_kept
            if total is not None:
                overflow.update(t.add_to(total, index, flat, scaled(t.weight(index), index, late)))
            elif updates is not None:
                t.require_finite(index, flat)
                updates[places[index]] = flat
        if total is None and updates is not None:
            self._publish(start, UPDATE, participants, updates[: len(participants)], 0)
        elif total is not None and not overflow:
            if self._server is not None:
                self._own_sum = (start.round, start.attempt), total
            else:
                self._publish(start, PARTIAL, participants, total.sums, total.weight)
        return PhaseReport(
            nodes=participants,
            overflow=tuple(sorted(overflow)),
            metric_sums=sums,
            node_metrics=t.by_node.take(start),
            bytes_intra_cluster=t.foreign_bytes(postings, received.nbytes),
        )

    def _client_states(self, start: StartRound) -> tuple[Table, Table]:
        """What this host's nodes keep, and what they will have kept after the attempt, a copy so far; empty rows where
        the rule keeps nothing.

        The copy is staged at once: whoever does not take part keeps what it has. A later attempt replaces it.
        """
        if self._clients is None:
            nothing = np.empty((len(self._participants), 0), self._t.layout.dtype)
            return nothing, nothing
        kept = self._clients.rebase(start)
        next_kept = self._clients.spare()
        for k in range(len(kept)):
            next_kept[k] = kept[k]
        self._clients.stage(start, next_kept)
        return kept, next_kept

    def _turns(
        self,
        start: StartRound,
        participants: Sequence[int],
        received: Array,
        states: tuple[Table, Table],
        sums: MetricSums,
    ) -> Iterator[tuple[_Turn, Outcome | None]]:
        """The participants one after the other, with what they were trained to where they train together.

        Args:
            states: what the nodes keep, and what they will have kept.
        """
        t, late = self._t, late_nodes(start.late)
        for group in t.together.groups(participants):
            t.require_wanted(start)
            turns = []
            for index in group:
                own = self._row_of[index]
                number = late[index].round if index in late else start.round
                with t.nodes.in_round(index, number):
                    turns.append(self._begin(start, index, number, received, states[0][own], states[1][own], sums))
            ahead = t.together.train({turn.index: turn.job for turn in turns})
            for turn in turns:
                yield turn, ahead.get(turn.index)

    def _begin(
        self,
        start: StartRound,
        index: int,
        number: int,
        received: Array,
        kept: Array,
        next_kept: Array,
        sums: MetricSums,
    ) -> _Turn:
        """What comes before a participant's training."""
        t, rule = self._t, self._rule
        chosen = 0
        if rule.num_models > 1:
            chosen = self._choose(start, index, sums)
            received = self._row(received, chosen)
        own = len(kept) - self._private
        model, job = received[: self._size], None
        if start.evaluate or not t.together.on:
            self._load(model, kept[own:])
            if number == start.round:
                t.evaluate_node(start, index, sums)
        with self._calling_the_rule(start, index, "terms"):
            terms = rule.terms(received, next_kept[:own])
        if not (self._finished and self._finished.find(t.nodes.get(index))):
            job = t.together.job(index, np.concatenate([model, kept[own:]]) if self._private else model, terms)
        return _Turn(index, number, received, kept, next_kept, terms, chosen, job)

    def _contribution(self, start: StartRound, turn: _Turn, sums: MetricSums, ahead: Outcome | None) -> Array:
        """Train one participant unless it was trained ahead; what it contributes, valid until the next turn."""
        t, rule, index = self._t, self._rule, turn.index
        own = len(turn.kept) - self._private
        t.nodes.trainer.begin(turn.terms)
        trained = t.train_node(start, index, sums, self._finished, ahead)
        steps = ahead.steps if ahead else t.nodes.trainer.steps
        t.nodes.trainer.begin()
        if self._private:
            turn.next_kept[own:] = t.nodes.model.row[self._size :]
            t.evaluate_own(start, index, sums)
        t.clip(index, turn.received[: self._size], trained, self._learned)
        out = t.buffer("contribution", (rule.rows.up * self._size + rule.rows.scalars,))
        with self._calling_the_rule(start, index, "contribution"):
            before, after = turn.kept[:own], turn.next_kept[:own]
            sent = rule.contribution(
                ClientUpdate(turn.received, trained, steps, before, after, out, turn.chosen, self._learned)
            )
        return self._with_buffers(sent, trained)

    @cached_property
    def _drawn(self) -> dict[int, int]:
        """Participant -> model by chance: as many participants for each model as for any other, or one more."""
        order = stable_random_state(self._t.nodes.config.seed, "first-choice").permutation(len(self._all_participants))
        return {index: int(order[k]) % self._rule.num_models for k, index in enumerate(self._all_participants)}

    def _choose(self, start: StartRound, index: int, sums: MetricSums) -> int:
        """Which of the models a participant trains, counted."""
        t = self._t
        drawn = start.round == 1 and t.nodes.config.first_choice == "drawn"
        chosen = self._drawn[index] if drawn else t.best_of(index, self._seen)
        self._chosen[index] = t.nodes.get(index).context.chosen_model = chosen
        t.add_up(index, {f"{name}_share": float(k == chosen) for k, name in enumerate(self._names)}, 1, sums)
        t.by_node.add(start, index, {"model": float(chosen)})
        return chosen

    def _load(self, model: Array, private: Array) -> None:
        """A global model, with what is a node's own."""
        if not self._private:
            self._t.nodes.model.load(model)
            return
        row = self._t.buffer("row", (self._size + self._private,))
        row[: self._size], row[self._size :] = model, private
        self._t.nodes.model.load(row)

    def _with_buffers(self, sent: Array, trained: Array) -> Array:
        """A contribution whose first row has the node's own buffers, and whose other rows have none."""
        if sent is not trained:
            for part in self._buffers:
                sent[part] = trained[part]
                for k in range(1, self._rule.rows.up):
                    sent[k * self._size + part.start : k * self._size + part.stop] = 0.0
        return sent

    def _publish(self, start: StartRound, kind: str, senders: Sequence[int], array: Array, weight: int) -> None:
        self._t.post(start, kind, senders, array, recipients=(self._aggregator,), weight=weight)

    # ------------------------------------------------------------ the aggregator

    def aggregate(self, start: StartRound) -> PhaseReport:
        """Aggregator: make the next server state out of all contributions, and evaluate its model when due."""
        if self._server is None:
            return PhaseReport()
        t = self._t
        previous = self._server.rebase(start)
        state = self._server.spare()
        postings = self._combine(start, previous, state)
        models = self._models(state)
        for number in range(self._rule.num_models):
            t.last_word(self._aggregator, self._row(models, number))
        self._require_finite_rows(state)
        self._server.stage(start, state)
        self._seen = models
        if (following := start.expected()) is not None:
            self._post_models(following, state)
        return PhaseReport(
            absmax=self._rule.expected(self._layout.absmax(models)),
            metrics=self._measure(models) if start.evaluate and not self._private else {},
            model_hash=self._layout.model_sha256(models),
            bytes_intra_cluster=t.foreign_bytes(postings, self._contribution_bytes),
        )

    def _require_finite_rows(self, state: Array) -> None:
        """W020 for what the rule keeps beside the models; those are looked at with their maxima."""
        for number in range(self._rule.num_models, self._rule.rows.server):
            bad = self._t.layout.first_nonfinite(self._row(state, number))
            if bad:
                name = self._t.nodes.config.aggregation_strategy
                place = f"aggregation_strategy {name} on {self._t.nodes.cluster}"
                raise WeightsError(
                    "W020", f"what {name} keeps for {bad} left the range of numbers", place=place, hint="smaller steps"
                )

    def _measure(self, models: Array) -> dict[str, float]:
        """What the aggregator measures; of several models each metric with the model's name."""
        t = self._t
        found: dict[str, float] = {}
        for number, name in enumerate(self._names):
            t.nodes.model.load(self._row(models, number))
            prefix = f"{name}_" if len(self._names) > 1 else ""
            metrics = t.nodes.measure(self._aggregator, "evaluate", "test")
            found.update({prefix + metric: value for metric, value in metrics.items()})
        return found

    @property
    def _contribution_bytes(self) -> int:
        rows = self._rule.rows
        if rows.every_update:
            return self._size * self._t.layout.dtype.itemsize
        return 8 * (rows.up * self._size + rows.scalars)

    def _combine(self, start: StartRound, previous: Array, state: Array) -> Sequence[Posting]:
        """Write the next server state; the postings that it was made of."""
        t, rule = self._t, self._rule
        participants = t.taking_part(start, self._all_participants)
        facts = RoundFacts(start.round, participants=len(participants), clients=len(self._all_participants))
        if isinstance(rule, UpdateAggregator):
            postings = t.collect(start, UPDATE)
            rows = t.rows_of(postings, participants)
            updates = [rows[i] for i in participants]
            with self._calling_the_rule(start, self._aggregator, "combine"):
                rule.combine(updates, previous, state, facts)
            t.layout.take_medians(updates, state[: self._size])
            return postings
        postings = t.collect(start, PARTIAL)
        total = t.merge(start, postings, start.total_weight, self._take_own_sum(start))
        with self._calling_the_rule(start, self._aggregator, "advance"):
            rule.finish(total, previous, state, facts)
        for part in self._buffers:
            state[part] = total.mean_part(part.start, part.stop, np.empty(part.stop - part.start))
        return postings

    def _take_own_sum(self, start: StartRound) -> ExactSum | None:
        """What this host's own participants have contributed in this attempt; merged once, so handed out once."""
        kept, self._own_sum = self._own_sum, None
        return kept[1] if kept is not None and kept[0] == (start.round, start.attempt) else None

    @contextmanager
    def _calling_the_rule(self, start: StartRound, index: int, method: str) -> Iterator[None]:
        """Rules may be the user's own code: what they raise becomes U001, naming the rule, and what they draw from the
        global generators depends on the federation's seed, the node, the round and the method alone."""
        try:
            with nullcontext() if self._rule_is_ours else self._rule_randomness(start, index, method):
                yield
        except IcrfError:
            raise
        except (Exception, SystemExit) as error:
            name = self._t.nodes.config.aggregation_strategy
            place = f"aggregation_strategy {name} on {self._t.nodes.cluster}"
            raise NodeError("U001", f"{type(error).__name__}: {error}", place=place) from error

    def _rule_randomness(self, start: StartRound, index: int, method: str) -> AbstractContextManager[None]:
        seed = self._t.nodes.config.seed
        return global_randomness(derive_seed(seed, index, start.round, f"global rule {method}"))

    def evaluate(self, start: StartRound) -> PhaseReport:
        """Nothing: the aggregator has evaluated already."""
        return PhaseReport()

    def install(self, start: StartRound) -> PhaseReport:
        """Nothing: the aggregator has its model already."""
        return PhaseReport()

    # ------------------------------------------------------------ between rounds

    def model_at(self, round_number: int) -> Array | None:
        """The committed global model of a round, or all of several, where this host holds it."""
        state = self._server.at(round_number) if self._server else None
        return None if state is None else self._models(state)

    def checkpoint(self, round_number: int) -> bytes | None:
        """What this host keeps after a committed round, while it is still here."""
        rows: dict[str, Array] = {}
        if self._server is not None:
            state = self._server.at(round_number)
            if state is None:
                return None
            rows[SERVER] = state
            rows.update((model_of(number), model) for number, model in self._earlier.by_round.items())
        if self._clients is not None:
            kept = self._clients.at(round_number)
            if kept is None:
                return None
            rows.update((str(i), kept[k]) for k, i in enumerate(self._participants))
        return pack_rows(rows, round_number) if rows else None

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds that can be started from here; empty if this host keeps no state."""
        found = [set(state.rounds) for state in (self._server, self._clients) if state is not None]
        return tuple(sorted(set.intersection(*found))) if found else ()

    def state_of(self, index: int) -> Array:
        """What a node sees between rounds: the newest global model this host has (of several its choice), with what is
        the node's own."""
        if self._server and index == self._aggregator:
            return self._row(self._server.latest, 0)
        model = self._row(self._seen, self._chosen.get(index, 0))
        if not self._private or self._clients is None or index not in self._row_of:
            return model
        return np.concatenate([model, self._clients.latest[self._row_of[index]][-self._private :]])
