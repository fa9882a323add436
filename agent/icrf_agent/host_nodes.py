"""The nodes that one host runs: their construction, their data, and calls into user code."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrf.errors import AgentError, ConfigError, IcrfError, NodeError, WeightsError, make_error
from icrf.federation.message import Message
from icrf.federation.node import FederatedNode, NodeContext
from icrf.learning.datasets import Dataset, load_dataset
from icrf.learning.layout import FlatModule, Layout
from icrf.learning.models import build_model
from icrf.learning.partition import partition
from icrf.learning.rng import derive_seed
from icrf.learning.training import LocalTrainer, to_tensor
from icrf.protocol import Activate
from icrf.registry import load_attr
from icrf.spec import FederationConfig
from icrf_agent.host_notes import HostNotes
from icrf_agent.topology_manager import HybridTopologyManager

LOCAL_TEMPLATE = "local:"


@dataclass(frozen=True)
class HostSetup:
    """What a host needs to set up its nodes.

    Attributes:
        nodes: node indices of this host, ascending.
        templates: node classes that live in the submitting process (one cluster only), by ``local:NAME``.
        allow: user code that may run here; None allows everything (the code is the submitter's own machine's).
        notes: where the host notes what it is about to run, see :class:`icrf_agent.host_notes.HostNotes`.
        state: this host's part of the state of ``activation.restore_round``, see ``checkpoint.py``; empty: the initial.
    """

    activation: Activate
    cluster: str
    nodes: tuple[int, ...]
    templates: Mapping[str, type]
    allow: tuple[str, ...] | None
    notes: str = ""
    state: bytes = b""


class HostMailbox:
    """A node's way to its neighbours: through the cluster's topology manager."""

    def __init__(self, manager: HybridTopologyManager, run_id: str) -> None:
        self._manager, self._run_id = manager, run_id
        self.position = (0, 0)

    def publish(self, message: Message, to: Sequence[str] | str | None) -> int:
        return self._manager.publish(self._run_id, message, to, self.position)

    def sync(self, node_id: str, wait_s: float) -> list[Message]:
        return self._manager.sync(self._run_id, node_id, wait_s)

    def get_neighbors(self, node_id: str) -> list[str]:
        return self._manager.get_neighbors(self._run_id, node_id)


class HostNodes:
    """The nodes of one host; they share one model, one trainer and the data set.

    Args:
        setup: which nodes and where.
        manager: the cluster's topology manager.
        notes: where to note whose code runs.

    Raises:
        ConfigError: code or data that cannot be loaded; WeightsError W010 for a model that is not the submitted one.
    """

    def __init__(self, setup: HostSetup, manager: HybridTopologyManager, notes: HostNotes | None = None) -> None:
        self._notes = notes or HostNotes("")
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
        dataset = load_dataset(self.config.dataset_type, self.config.data_dir or "")
        module = build_model(
            self.config.model_type,
            dataset.input_shape,
            dataset.num_classes,
            derive_seed(self.config.seed, 0, 0, "model"),
        )
        self.layout = Layout(activation.layout)
        self.model = FlatModule(module, self.layout)
        self.initial = self.model.snapshot()
        self._nodes: dict[int, FederatedNode] = {}
        self._build(dataset)

    def get(self, index: int) -> FederatedNode:
        return self._nodes[index]

    def call(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Call user code; whatever it raises becomes U001 with node, cluster, file and line."""
        node = self._nodes[index]
        self._notes.enter(index)
        try:
            return getattr(node, method)(*arguments, **keywords)
        except IcrfError:
            raise
        except (Exception, SystemExit) as error:
            raise self._node_error(node.id, method, error) from error
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

    # ------------------------------------------------------------ inside

    def _build(self, dataset: Dataset) -> None:
        trains = [i for i, spec in enumerate(self._specs) if "train" in spec.role.split("-")]
        parts: list[Any] = []
        if any(i in set(trains) for i in self.indices):
            c = self.config
            seed = derive_seed(c.seed, 0, 0, "partition")
            labels = np.asarray(dataset.train_y)
            parts = partition(c.data_distribution_kind, labels, len(trains), seed, c.dirichlet_beta)
        position = {index: k for k, index in enumerate(trains)}
        features, labels = to_tensor(dataset.train_x), to_tensor(dataset.train_y)
        test = (to_tensor(dataset.test_x), to_tensor(dataset.test_y))
        trainer = LocalTrainer()
        for index in self.indices:
            data = None
            if index in position:
                rows = parts[position[index]]
                data = (to_tensor(features[rows]), to_tensor(labels[rows]))
            spec = self._specs[index]
            node = self._template(spec.role)(node_id=spec.id, role=spec.role, config=self.config)
            if not isinstance(node, FederatedNode):
                raise ConfigError(
                    "C017",
                    f"node template {type(node).__name__} is no FederatedNode",
                    place="client_template",
                    hint="subclass icrf.FederatedNode",
                )
            node.context = NodeContext(
                index=index,
                cluster=self.cluster,
                own_actor=len(self.indices) == 1,
                train_data=data,
                test_data=test,
                model=self.model,
                trainer=trainer,
                mailbox=self.mailbox,
            )
            self._nodes[index] = node
            self.model.load(self.initial)
            if type(node).build is not FederatedNode.build:
                self.call(index, "build", **node.build_arguments)

    def _template(self, role: str) -> type[FederatedNode]:
        name = self.config.server_template if "aggregate" in role.split("-") else self.config.client_template
        if not name:
            return FederatedNode
        if name.startswith(LOCAL_TEMPLATE):
            return self._setup.templates[name]
        found: type[FederatedNode] = load_attr(name)
        return found

    def _require_allowed(self) -> None:
        if self._setup.allow is None:
            return
        c = self.config
        wanted = {
            "client_template": c.client_template,
            "server_template": c.server_template,
            "model_type": c.model_type,
            "dataset_type": c.dataset_type,
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

    def _node_error(self, node_id: str, method: str, error: BaseException) -> NodeError:
        print(traceback.format_exc(), file=sys.stderr, flush=True)  # noqa: T201 - the worker's log keeps it whole
        frames = traceback.extract_tb(error.__traceback__)
        own = inspect.getsourcefile(HostNodes)
        user = [f for f in frames if f.filename != own]
        where = f"{user[-1].filename}:{user[-1].lineno} in {user[-1].name}" if user else method
        return NodeError(
            "U001",
            f"{type(error).__name__}: {error} ({where})",
            place=f"{node_id} on {self.cluster}, {method}",
            hint="the traceback is in the log of the node's host",
        )
