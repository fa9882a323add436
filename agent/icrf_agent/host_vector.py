"""Which nodes of a host train together, and their training; the rest of a node's turn is the flows' matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from icrf.errors import ConfigError, IcrfError
from icrf.federation.node import FederatedNode
from icrf.learning.rng import torch_generator
from icrf.learning.training import LocalTerms, to_tensor
from icrf.learning.vectorizable import require_equal_lanes
from icrf.learning.vectorized import Job, Outcome, Recipe, VectorTrainer
from icrf.protocol import TRAINING
from icrf_agent.host_nodes import HostNodes

Array = np.ndarray[Any, Any]

# What a class of nodes may not have of its own where nodes train together.
_BUILT_IN = ("train", "loss")
# On so many samples of a node it is tried whether all lanes of a device come to the same bits.
_SAMPLES = 3


class Together:
    """Training of a host's nodes in groups, where ``vectorize`` of the configuration has a width.

    Raises:
        ConfigError: C008 for nodes whose class has its own `train` or `loss`, or for a device on which it
            shows in the bits which lane a node trains in.
    """

    def __init__(self, nodes: HostNodes) -> None:
        self._nodes, config = nodes, nodes.config
        self._trainer: VectorTrainer | None = None
        if isinstance(config.vectorize, int) and nodes.sample_counts():
            for index, _ in nodes.sample_counts():
                self._require_built_in(nodes.kind(index))
            # A class of the user's may give its nodes other data than they were dealt.
            most = None if config.client_template else nodes.most_samples
            self._trainer = VectorTrainer(nodes.model, config.vectorize, Recipe.of(config, most))
            if nodes.device.apart:
                # Whoever submitted has tried it on a CPU.
                self._require_equal_lanes(self._trainer)

    def _require_built_in(self, kind: type[FederatedNode]) -> None:
        for method in _BUILT_IN:
            if getattr(kind, method) is not getattr(FederatedNode, method):
                width, name = self._nodes.config.vectorize, kind.__name__
                raise ConfigError(
                    "C008",
                    f"vectorize {width} contradicts client_template {name}, which has its own {method}",
                    place="vectorize",
                    value=width,
                    allowed="off",
                    hint="nodes train together only as the built-in class does",
                )

    def _require_equal_lanes(self, trainer: VectorTrainer) -> None:
        index = self._nodes.sample_counts()[0][0]
        x, y = (to_tensor(part[:_SAMPLES]) for part in self._nodes.get(index).train_data)
        start = self._nodes.model.row.copy()
        job = Job(start, x.to(self._nodes.model.dtype), y, torch.Generator)
        require_equal_lanes(trainer, self._nodes.config.model_type, job)

    @property
    def on(self) -> bool:
        """Whether nodes train together here."""
        return self._trainer is not None

    def groups(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """The nodes in groups that train together: those with as many steps as each other; else one by one."""
        if self._trainer is None:
            yield from ((index,) for index in indices)
            return
        steps = {index: self._trainer.num_steps(self._nodes.num_samples(index)) for index in indices}
        ordered = sorted(indices, key=lambda index: -steps[index])
        for first in range(0, len(ordered), self._trainer.width):
            yield ordered[first : first + self._trainer.width]

    def job(self, index: int, start: Array, terms: LocalTerms | None = None) -> Job | None:
        """What a node has to train in the round that it is in; None where nodes train one by one.

        Args:
            start: the model, with what is private, shape (row_size,).
        """
        if self._trainer is None:
            return None
        node, dtype = self._nodes.get(index), getattr(torch, self._nodes.layout.dtype.name)
        features, labels = node.train_data
        generator = partial(torch_generator, node.config.seed, index, node.round, "batches")
        return Job(start, to_tensor(features, dtype), to_tensor(labels), generator, terms)

    def train(self, jobs: Mapping[int, Job | None]) -> dict[int, Outcome]:
        """Train the nodes of one group; their results by node, valid until the next group trains.

        Raises:
            NodeError: U001 for what the model raises.
        """
        wanted = {index: job for index, job in jobs.items() if job is not None}
        if self._trainer is None or not wanted:
            return {}
        try:
            with self._nodes.meter.doing(TRAINING):
                outcomes = self._trainer.train(list(wanted.values()))
        except IcrfError:
            raise
        except Exception as error:
            first, others = self._nodes.get(next(iter(wanted))).id, len(wanted) - 1
            raise self._nodes.node_error(f"{first} and {others} more" if others else first, "train", error) from error
        return dict(zip(wanted, outcomes, strict=True))
