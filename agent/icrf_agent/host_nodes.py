"""The nodes that one host runs: their construction, their data, and calls into user code."""

from __future__ import annotations

import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import icrf_agent
from icrf import errors
from icrf.errors import AgentError, ConfigError, IcrfError, NodeError, WeightsError, make_error
from icrf.federation.node import FederatedNode, NodeContext
from icrf.learning.datasets import Dataset, configured_dataset
from icrf.learning.devices import Device, prepare
from icrf.learning.flat_module import FlatModule
from icrf.learning.layout import FlatArray, Layout
from icrf.learning.metrics import METRICS
from icrf.learning.models import MODELS, build_model
from icrf.learning.partition import configured_partition
from icrf.learning.rng import derive_seed, global_randomness, model_seed
from icrf.learning.training import LocalTrainer, to_tensor
from icrf.protocol import (
    DECENTRALIZED,
    EVALUATING,
    OTHER,
    SUMMING,
    TRAINING,
    Activate,
    NodeSpec,
    StartRound,
    nodes_that,
)
from icrf.registry import load_attr
from icrf.spec import FederationConfig
from icrf_agent.host_mailbox import HostMailbox
from icrf_agent.host_meter import HostMeter
from icrf_agent.host_notes import HostNotes
from icrf_agent.node_state import ByNode, NodeStates
from icrf_agent.residents import Admission, Residents
from icrf_agent.topology_manager import HybridTopologyManager

LOCAL_TEMPLATE = "local:"
# While nodes are set up, how many there are and what they take is noted after every so many.
_NOTED_EVERY = 64
# Where the time of a node's methods belongs; that of all others is part of whatever called them.
_PARTS = {"train": TRAINING, "evaluate": EVALUATING, "training_loss": EVALUATING, "aggregate": SUMMING}
# Where files lie that no user of this package has written.
_NOT_THE_USERS = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    *(os.path.join(os.path.dirname(module.__file__ or ""), "") for module in (errors, icrf_agent)),
    "<frozen",
)


@dataclass(frozen=True)
class _Left:
    """What is kept of a node that made room, beside its state; `entered`: the attempt that it was in."""

    entered: tuple[int, int]
    round: int
    chosen_model: int
    kept: dict[str, Any]


@dataclass(frozen=True)
class HostSetup:
    """What a host needs to set up its nodes.

    Attributes:
        nodes: node indices of this host, ascending.
        templates: node classes that live in the submitting process (one cluster only), by ``local:NAME``.
        allow: user code that may run here; None allows everything (the code is the submitter's own machine's).
        notes: where the host notes what it is about to run, see :class:`icrf_agent.host_notes.HostNotes`.
        state: this host's part of the state of ``activation.restore_round``, see ``checkpoint.py``; empty: the initial.
        node_states: the durable states of its nodes after that round, see ``node_state.py``.
        most_active: how many of its nodes may be active at once, since a host of the run died for want of memory.
    """

    activation: Activate
    cluster: str
    nodes: tuple[int, ...]
    templates: Mapping[str, type]
    allow: tuple[str, ...] | None
    notes: str = ""
    state: bytes = b""
    node_states: ByNode = field(default_factory=dict)
    most_active: int | None = None


class HostNodes:
    """The nodes of one host; they share one model, one trainer and the data set.

    Attributes:
        most_samples: of any node of the federation, as dealt; 0 on a host that trains none.
        device: where models and data lie while nodes compute.

    Args:
        setup: which nodes and where.
        manager: the cluster's topology manager.
        notes: where to note whose code runs.
        meter: what measures where the time goes.

    Raises:
        ConfigError: code or data that cannot be loaded; WeightsError W010 for a model that is not the submitted one.
    """

    def __init__(
        self,
        setup: HostSetup,
        manager: HybridTopologyManager,
        notes: HostNotes | None = None,
        meter: HostMeter | None = None,
    ) -> None:
        self._notes = notes or HostNotes("")
        self.meter = meter or HostMeter()
        activation = setup.activation
        self.config = FederationConfig.from_json(activation.config_json)
        self.indices = setup.nodes
        self.cluster = setup.cluster
        self.mailbox = HostMailbox(manager, activation)
        # What nodes start from is theirs from here on: this copy would be in memory twice.
        self._setup = replace(setup, state=b"", node_states={})
        self._specs = activation.nodes
        self._require_allowed()
        if setup.allow is None and activation.code_path and activation.code_path not in sys.path:
            # Only where the submitter's machine is this one: elsewhere the path would be somebody else's choice.
            sys.path.insert(0, activation.code_path)
        dataset = configured_dataset(self.config)
        named = [MODELS.get(self.config.model_type), *map(METRICS.get, self.config.metrics)]
        self._own_code = not all(map(is_ours, named))
        self.layout = Layout(activation.layout)
        self.device = Device.of(self.config.device)
        prepare(self.device)
        self.model = self._fresh_model(dataset)
        self.initial = self.model.snapshot()
        self.trainer = LocalTrainer()
        self.most_samples = 0
        self._entered = (activation.restore_round, 0)
        self._residents = Residents(self._bring_in, self._passivate)
        self._left: dict[int, _Left] = {}
        self._kinds: dict[int, type[FederatedNode]] = {}
        self._num_samples: dict[int, int] = {}
        self.states = NodeStates(
            self._residents.active, self.indices, setup.cluster, all_rounds=self.config.min_nodes is None
        )
        self._set_up(dataset)
        self.states.begin(activation.restore_round, setup.node_states)
        # Before its next round a node is what it was after the last one.
        for node in self._residents.active.values():
            node.context.round = activation.restore_round
        self.mailbox.open = True

    def enter(self, start: StartRound) -> None:
        """Tell all nodes which attempt they are in; harmless when they are in it."""
        position = (start.round, start.attempt)
        self.mailbox.enter(position)
        self.states.resume()
        if self._entered != position:
            self._entered = position
            self.states.enter(start)
            self._admission.note(len(self._residents.active))
            for node in self._residents.active.values():
                node.enter_round(start.round)
            for index in self.indices:
                if self.kind(index).sync is not FederatedNode.sync:
                    self.call(index, "sync")

    @contextmanager
    def in_round(self, index: int, number: int) -> Iterator[None]:
        """Inside, a node draws the random numbers of that round; late ones train an earlier one."""
        context = self.get(index).context
        entered, context.round = context.round, number
        try:
            yield
        finally:
            context.round = entered

    def initial_models(self, count: int) -> FlatArray:
        """So many models as they start, `initial` the first, shape (count * num_parameters,)."""
        if count == 1:
            return self.initial
        dataset = configured_dataset(self.config)
        return np.concatenate([self.initial, *(self._fresh_model(dataset, k).snapshot() for k in range(1, count))])

    @property
    def all_resident(self) -> bool:
        """Whether all nodes are active at once; else what is kept of them goes to disk."""
        return self._residents.limit is None

    def get(self, index: int) -> FederatedNode:
        """A node, made active if it is not; the model that is loaded stays."""
        return self._residents.get(index)

    def kind(self, index: int) -> type[FederatedNode]:
        """The class of a node, which need not be active for that."""
        return self._kinds[index]

    def trains(self, index: int) -> bool:
        """Whether a node has the role ``train``."""
        return index in self._num_samples

    def num_samples(self, index: int) -> int:
        """How many training samples a node had when it was set up."""
        return self._num_samples.get(index, 0)

    def call(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Call user code; whatever it raises becomes U001 with node, cluster, file and line.

        What it draws from the global generators of torch, NumPy and ``random`` depends on the federation's seed, the
        node, the round and the method alone.
        """
        node, part = self.get(index), _PARTS.get(method)
        if part is None:
            return self._call(node, method, *arguments, **keywords)
        with self.meter.doing(part):
            return self._call(node, method, *arguments, **keywords)

    def _call(self, node: FederatedNode, method: str, *arguments: Any, **keywords: Any) -> Any:
        index = node.context.index
        self._notes.enter(index)
        try:
            if self._own_code or type(node) is not FederatedNode:
                seed = derive_seed(self.config.seed, index, node.context.round, f"global {method}")
                with global_randomness(seed):
                    return getattr(node, method)(*arguments, **keywords)
            return getattr(node, method)(*arguments, **keywords)
        except IcrfError:
            raise
        except (Exception, SystemExit) as error:
            raise self.node_error(node.id, method, error) from error
        finally:
            self._notes.leave()

    @contextmanager
    def blamed(self, index: int) -> Iterator[None]:
        """An error about weights inside gets the node and the cluster as its place."""
        try:
            yield
        except WeightsError as error:
            where = f"{self._specs[index].id} on {self.cluster}"
            place = f"{where}, {error.place}" if error.place else where
            raise make_error(
                error.code, error.message, place=place, value=error.value, allowed=error.allowed, hint=error.hint
            ) from error

    def sample_counts(self) -> tuple[tuple[int, int], ...]:
        """(node index, training samples) of the nodes that train."""
        return tuple(self._num_samples.items())

    def weight(self, index: int) -> int:
        """The sample count of a node, its weight; W030 where it is not that of the set-up any more."""
        node = self.get(index)
        if node.num_samples != self._num_samples[index]:
            raise WeightsError(
                "W030",
                f"the sample count of {node.id} has changed",
                place=f"{node.id} on {self.cluster}",
                value=node.num_samples,
                allowed=str(self._num_samples[index]),
                hint="change the data of a node in build only",
            )
        return node.num_samples

    def measure(self, index: int, method: str, *arguments: Any) -> dict[str, float]:
        """Call `train` or `evaluate`, whose result must be metrics; U002 where it is not, W020 for one not finite."""
        return self.metrics(index, method, self.call(index, method, *arguments))

    def metrics(self, index: int, method: str, found: Any) -> dict[str, float]:
        """What `train` or `evaluate` of a node has returned, checked as :meth:`measure` does."""
        try:
            metrics = {str(name): float(value) for name, value in ({} if found is None else found).items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise self._no_numbers(index, method, found, "a dict of numbers by name, or None") from error
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise WeightsError(
                    "W020",
                    f"metric '{name}' is not finite",
                    place=f"{self._specs[index].id} on {self.cluster}, {method}",
                    value=value,
                    hint="leave it out where it has no value; a loss like that calls for a lower learning rate",
                )
        return metrics

    def loss_of(self, index: int) -> float:
        """A node's training loss with the model that is loaded, infinite in place of NaN; U002 for no number."""
        found = self.call(index, "training_loss")
        try:
            loss = float(found)
        except (TypeError, ValueError) as error:
            raise self._no_numbers(index, "training_loss", found, "a number") from error
        return math.inf if math.isnan(loss) else loss

    # ------------------------------------------------------------ inside

    def _no_numbers(self, index: int, method: str, found: object, allowed: str) -> NodeError:
        node = self._specs[index]
        return NodeError(
            "U002",
            f"{node.id}.{method} returned {type(found).__name__}",
            place=f"{node.id} on {self.cluster}, {method}",
            value=repr(found)[:80],
            allowed=allowed,
        )

    def _fresh_model(self, dataset: Dataset, number: int = 0) -> FlatModule:
        """The federation's model of this number as it starts."""
        c = self.config
        seed = model_seed(c.seed, number)
        return FlatModule(
            build_model(c.model_type, dataset.input_shape, dataset.num_classes, seed), self.layout, self.device
        )

    def _set_up(self, dataset: Dataset) -> None:
        """Make every node once, in index order, and find out how many can be active at once."""
        self._part_of = {index: k for k, index in enumerate(nodes_that("train", self._specs))}
        self._dataset, self._parts = dataset, None
        # Every host makes the same split and takes out what is its nodes' own.
        if not self._part_of.keys().isdisjoint(self.indices):
            self._parts = configured_partition(self.config, dataset, len(self._part_of))
            self.most_samples = int(self._parts.sizes.max())
        self._test = tuple(self.device.put(to_tensor(part)) for part in dataset.test_part())
        here = self._setup.activation.assignment
        num_hosts = min(self._setup.activation.num_slots, here.count(here[self.indices[0]]))
        self._admission = Admission(
            self.config, len(self.indices), num_hosts, self._kept_bytes(), self._notes, self._setup.most_active
        )
        for number, index in enumerate(self.indices, start=1):
            node = self.get(index)
            if node.is_train_node:
                self._num_samples[index] = node.num_samples
            # Few nodes may be large ones.
            if number < _NOTED_EVERY or number % _NOTED_EVERY == 0:
                self._admission.note(len(self._residents.active))
            if self._residents.limit is None and (limit := self._admission.limit(number)) is not None:
                self._residents.limit = limit
                self.states.keep_on_disk()
        self._admission.note(len(self._residents.active))

    def _kept_bytes(self) -> int:
        """What a node keeps in memory from round to round where all are active: rows of it in two versions."""
        size, rows = self.layout.num_parameters, self._setup.activation.rows
        kept = rows.client * size + rows.client_scalars
        if self._setup.activation.flow == DECENTRALIZED:
            kept += self.layout.row_size
        return 2 * kept * self.layout.dtype.itemsize

    def _bring_in(self, index: int) -> FederatedNode:
        # It may happen within training, evaluation or mixing, and is no part of them.
        with self.meter.doing(OTHER):
            return self._activate(index)

    def _activate(self, index: int) -> FederatedNode:
        """Make a node; one that was active before gets back what it held."""
        node = self._make(self._specs[index])
        self._kinds[index] = type(node)
        node.context = NodeContext(
            index=index,
            cluster=self.cluster,
            own_actor=len(self.indices) == 1,
            train_data=self._data_of(index),
            test_data=self._test,
            model=self.model,
            trainer=self.trainer,
            mailbox=self.mailbox,
        )
        self._build(node)
        if self.mailbox.open:
            self._bring_back(node)
        return node

    def _data_of(self, index: int) -> tuple[Any, Any] | None:
        if self._parts is None or index not in self._part_of:
            return None
        features, labels = self._dataset.train_part(self._parts[self._part_of[index]])
        return self.device.put(to_tensor(features)), self.device.put(to_tensor(labels))

    def _build(self, node: FederatedNode) -> None:
        """Run `build` and `setup` where its class has any: on the initial model, and without sending anything."""
        steps = [name for name in ("build", "setup") if getattr(type(node), name) is not getattr(FederatedNode, name)]
        dealt = 0 if node.context.train_data is None else len(node.context.train_data[1])
        if steps:
            loaded, is_open = self.model.row.copy(), self.mailbox.open
            self.mailbox.open = False
            self.model.load(self.initial)
            try:
                for name in steps:
                    self._call(node, name, **(node.build_arguments if name == "build" else {}))
            finally:
                self.mailbox.open = is_open
            self.model.load(loaded)
        if dealt and self.config.mixing == "sample_weighted":
            self._require_samples(node, dealt)

    def _passivate(self, node: FederatedNode) -> None:
        index, context = node.context.index, node.context
        with self.meter.doing(OTHER):
            self.states.put_away(index, node)
            left = node.leave()
        if left or context.chosen_model:
            self._left[index] = _Left(self._entered, context.round, context.chosen_model, left)

    def _bring_back(self, node: FederatedNode) -> None:
        context = node.context
        self.states.bring_back(context.index, node)
        left = self._left.pop(context.index, None)
        if left is None:
            context.round = self._entered[0]
            return
        node.come_back(left.kept)
        context.round, context.chosen_model = left.round, left.chosen_model
        if left.entered != self._entered:
            node.enter_round(self._entered[0])

    def _require_samples(self, node: FederatedNode, dealt: int) -> None:
        """The weights that all nodes mix by were made, before the run, from what the partition deals."""
        if node.num_samples != dealt:
            raise WeightsError(
                "W030",
                f"{node.id} has other samples than it was dealt",
                place=f"{node.id} on {self.cluster}, build",
                value=node.num_samples,
                allowed=f"{dealt} with mixing sample_weighted",
            )

    def _make(self, spec: NodeSpec) -> FederatedNode:
        """A node of the class that the configuration names for its role."""
        key = "server_template" if "aggregate" in spec.role_parts else "client_template"
        name: str | None = getattr(self.config, key)
        template: Callable[..., Any] = FederatedNode
        if name:
            template = self._setup.templates[name] if name.startswith(LOCAL_TEMPLATE) else load_attr(name, key)
        try:
            node = template(node_id=spec.id, role=spec.role, config=self.config)
        except IcrfError:
            raise
        except (Exception, SystemExit) as error:
            raise self.node_error(spec.id, f"{key} '{name}'", error) from error
        if not isinstance(node, FederatedNode):
            what = f"node template {type(node).__name__} is no FederatedNode"
            raise ConfigError("C017", what, place=key, value=name, hint="subclass icrf.FederatedNode")
        return node

    def _require_allowed(self) -> None:
        if self._setup.allow is None:
            return
        c = self.config
        wanted = {
            "client_template": c.client_template,
            "server_template": c.server_template,
            "model_type": c.model_type,
            "dataset_type": c.dataset_type,
            "data_distribution_kind": c.data_distribution_kind,
            "aggregation_strategy": c.aggregation_strategy,
            "topology_adaptation_strategy": c.topology_adaptation_strategy,
            **{f"metrics[{k}]": name for k, name in enumerate(c.metrics)},
        }
        for key, name in wanted.items():
            if name and ":" in name and name not in self._setup.allow:
                raise AgentError(
                    "A004",
                    f"cluster {self.cluster} does not run '{name}'",
                    place=key,
                    value=name,
                    allowed=", ".join(self._setup.allow) or "registered names only",
                    hint=f"its operator can start the agent with --allow {name}",
                )

    def node_error(self, node_id: str, method: str, error: BaseException) -> NodeError:
        """U001 for what user code has raised, with its file and line."""
        print(traceback.format_exc(), file=sys.stderr, flush=True)  # noqa: T201 - the worker's log keeps it whole
        frames = traceback.extract_tb(error.__traceback__)
        # The innermost line of the user's own: what torch or this package did with it says less.
        user = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS)] or frames
        where = f"{user[-1].filename}:{user[-1].lineno} in {user[-1].name}"
        return NodeError(
            "U001",
            f"{type(error).__name__}: {error} ({where})",
            place=f"{node_id} on {self.cluster}, {method}",
            hint="the traceback is in the log of the node's host",
        )


def is_ours(code: Any) -> bool:
    """Whether a function or class comes with this package."""
    return str(getattr(code, "__module__", "")).startswith("icrf.")
