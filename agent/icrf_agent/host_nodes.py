"""The nodes that one host runs: their construction, their data, and calls into user code."""

from __future__ import annotations

import math
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import icrf_agent
from icrf import errors
from icrf.errors import AgentError, ConfigError, IcrfError, NodeError, RunError, WeightsError, make_error
from icrf.federation.message import Message
from icrf.federation.node import FederatedNode, NodeContext
from icrf.learning.datasets import Dataset, configured_dataset
from icrf.learning.flat_module import FlatModule
from icrf.learning.layout import FlatArray, Layout
from icrf.learning.metrics import METRICS
from icrf.learning.models import MODELS, build_model
from icrf.learning.partition import configured_partition
from icrf.learning.rng import derive_seed, global_randomness, model_seed
from icrf.learning.training import LocalTrainer, to_tensor
from icrf.protocol import EVALUATING, SUMMING, TRAINING, Activate, NodeSpec, StartRound
from icrf.registry import load_attr
from icrf.spec import FederationConfig
from icrf_agent.host_meter import HostMeter
from icrf_agent.host_notes import HostNotes
from icrf_agent.node_state import ByNode, NodeStates
from icrf_agent.topology_manager import HybridTopologyManager

LOCAL_TEMPLATE = "local:"
# A waiting node occupies a thread of the topology manager, which others need too: it asks again and again instead.
_WAIT_SLICE_S = 0.2
# Where the time of a node's methods belongs; that of all others is part of whatever called them.
_PARTS = {"train": TRAINING, "evaluate": EVALUATING, "training_loss": EVALUATING, "aggregate": SUMMING}
# Where files lie that no user of this package has written.
_NOT_THE_USERS = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    *(os.path.join(os.path.dirname(module.__file__ or ""), "") for module in (errors, icrf_agent)),
    "<frozen",
)


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
    """

    activation: Activate
    cluster: str
    nodes: tuple[int, ...]
    templates: Mapping[str, type]
    allow: tuple[str, ...] | None
    notes: str = ""
    state: bytes = b""
    node_states: ByNode = field(default_factory=dict)


class HostMailbox:
    """A node's way to its neighbours: through the cluster's topology manager.

    Attributes:
        position: the attempt that the host works on; None between rounds.
        open: whether the nodes are set up; other clusters may not be before.
    """

    def __init__(self, manager: HybridTopologyManager, run_id: str) -> None:
        self._manager, self._run_id = manager, run_id
        self.position: tuple[int, int] | None = None
        self.open = False

    def publish(self, message: Message, to: Sequence[str] | str | None) -> int:
        if not self.open:
            raise RunError(
                "F005",
                f"{message.sender_id} cannot send before all nodes are set up",
                place=message.sender_id,
                hint="send in train, not in build",
            )
        return self._manager.publish(self._run_id, message, to, self.position)

    def sync(self, node_id: str, wait_s: float) -> list[Message]:
        deadline_s = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            found = self._manager.sync(self._run_id, node_id, min(left_s, _WAIT_SLICE_S), self.position)
            if found or left_s <= 0.0:
                return found

    def get_neighbors(self, node_id: str) -> list[str]:
        return self._manager.get_neighbors(self._run_id, node_id)


class HostNodes:
    """The nodes of one host; they share one model, one trainer and the data set.

    Attributes:
        most_samples: of any node of the federation, as dealt; 0 on a host that trains none.

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
        self.mailbox = HostMailbox(manager, activation.run_id)
        self._setup = setup
        self._specs = activation.nodes
        self._require_allowed()
        if setup.allow is None and activation.code_path and activation.code_path not in sys.path:
            # Only where the submitter's machine is this one: elsewhere the path would be somebody else's choice.
            sys.path.insert(0, activation.code_path)
        dataset = configured_dataset(self.config)
        named = [MODELS.get(self.config.model_type), *map(METRICS.get, self.config.metrics)]
        self._own_code = not all(map(is_ours, named))
        self.layout = Layout(activation.layout)
        self.model = self._fresh_model(dataset)
        self.initial = self.model.snapshot()
        self.trainer = LocalTrainer()
        self._nodes: dict[int, FederatedNode] = {}
        self.most_samples = 0
        self._build(dataset)
        self.states = NodeStates(
            self._nodes,
            setup.cluster,
            activation.restore_round,
            setup.node_states,
            all_rounds=self.config.min_nodes is None,
        )
        self._num_samples = dict(self.sample_counts())
        self._entered = (0, 0)
        self.mailbox.open = True

    def enter(self, start: StartRound) -> None:
        """Tell all nodes which attempt they are in; harmless when they are in it."""
        self.mailbox.position = (start.round, start.attempt)
        self.states.resume()
        if self._entered != self.mailbox.position:
            self._entered = self.mailbox.position
            self.states.enter(start)
            for index, node in self._nodes.items():
                node.enter_round(start.round)
                if type(node).sync is not FederatedNode.sync:
                    self.call(index, "sync")

    @contextmanager
    def in_round(self, index: int, number: int) -> Iterator[None]:
        """Inside, a node draws the random numbers of that round; late ones train an earlier one."""
        context = self._nodes[index].context
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

    def get(self, index: int) -> FederatedNode:
        return self._nodes[index]

    def call(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Call user code; whatever it raises becomes U001 with node, cluster, file and line.

        What it draws from the global generators of torch, NumPy and ``random`` depends on the federation's seed, the
        node, the round and the method alone.
        """
        part = _PARTS.get(method)
        if part is not None:
            with self.meter.doing(part):
                return self._call(index, method, *arguments, **keywords)
        return self._call(index, method, *arguments, **keywords)

    def _call(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        node = self._nodes[index]
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
            where = f"{self._nodes[index].id} on {self.cluster}"
            place = f"{where}, {error.place}" if error.place else where
            raise make_error(
                error.code, error.message, place=place, value=error.value, allowed=error.allowed, hint=error.hint
            ) from error

    def sample_counts(self) -> tuple[tuple[int, int], ...]:
        """(node index, training samples) of the nodes that train."""
        return tuple((i, n.num_samples) for i, n in self._nodes.items() if n.is_train_node)

    def weight(self, index: int) -> int:
        """The sample count of a node, its weight; W030 where it is not that of the set-up any more."""
        node = self._nodes[index]
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
                    place=f"{self._nodes[index].id} on {self.cluster}, {method}",
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
        node = self._nodes[index]
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
        return FlatModule(build_model(c.model_type, dataset.input_shape, dataset.num_classes, seed), self.layout)

    def _build(self, dataset: Dataset) -> None:
        trains = [i for i, spec in enumerate(self._specs) if "train" in spec.role.split("-")]
        position = {index: k for k, index in enumerate(trains)}
        # Every host makes the same split and takes out what is its nodes' own.
        parts = None
        if not position.keys().isdisjoint(self.indices):
            parts = configured_partition(self.config, dataset, len(trains))
            self.most_samples = int(parts.sizes.max())
        test = tuple(to_tensor(part) for part in dataset.test_part())
        for index in self.indices:
            data = None
            if parts is not None and index in position:
                features, labels = dataset.train_part(parts[position[index]])
                data = (to_tensor(features), to_tensor(labels))
            spec = self._specs[index]
            node = self._make(spec)
            node.context = NodeContext(
                index=index,
                cluster=self.cluster,
                own_actor=len(self.indices) == 1,
                train_data=data,
                test_data=test,
                model=self.model,
                trainer=self.trainer,
                mailbox=self.mailbox,
            )
            self._nodes[index] = node
            self.model.load(self.initial)
            if type(node).build is not FederatedNode.build:
                self.call(index, "build", **node.build_arguments)
            if data is not None and self.config.mixing == "sample_weighted":
                self._require_samples(node, len(data[1]))
            if type(node).setup is not FederatedNode.setup:
                self.call(index, "setup")

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
        key = "server_template" if "aggregate" in spec.role.split("-") else "client_template"
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
