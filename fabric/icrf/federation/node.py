"""What runs at a participant: subclass :class:`FederatedNode` and override what differs.

A node lives inside a ``NodeHost``. Before each phase the host binds the node's state to the shared model of the
host, so a node costs no process and no model of its own.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch.nn import functional

from icrf.errors import NodeError, NodeWouldBlock
from icrf.federation.message import Message
from icrf.learning.flat_module import FlatModule
from icrf.learning.rng import torch_generator
from icrf.learning.training import LocalTrainer, evaluate, mean_loss
from icrf.protocol import parts_of
from icrf.spec import FederationConfig

Array = np.ndarray[Any, Any]


class Mailbox(Protocol):
    """How a node talks to its neighbours; the fabric checks every edge."""

    def publish(self, message: Message, to: Sequence[str] | str | None) -> int: ...

    def sync(self, node_id: str, wait_s: float) -> list[Message]: ...

    def get_neighbors(self, node_id: str) -> list[str]: ...


@dataclass
class NodeContext:
    """What the host binds to a node.

    Attributes:
        index: the node's position in the specification, the canonical order.
        cluster: name of the cluster it lives on.
        own_actor: whether it has an actor of its own, so that it may block.
        train_data: (features float32 [n, ...], labels int64 [n]) as torch tensors on the configured device; None
            without the role ``train``.
        test_data: the same, held out.
        model: the host's shared model; it holds this node's state while the node runs.
        trainer: the standard local training.
        round: the round being run, 0 before the first.
        chosen_model: see :attr:`FederatedNode.chosen_model`.
    """

    index: int
    cluster: str
    own_actor: bool
    train_data: tuple[Any, Any] | None
    test_data: tuple[Any, Any]
    model: FlatModule
    trainer: LocalTrainer
    mailbox: Mailbox
    round: int = 0
    chosen_model: int = 0


class FederatedNode:
    """One participant of a federation.

    Override `setup`, `train`, `loss`, `evaluate`, `aggregate` or `sync`; everything else is the fabric's. Do not
    override ``__init__``. What has to survive the round goes into `state`; other attributes are lost when a host is
    replaced, and whenever a node makes room for others (``resident_nodes``): then it is made anew, `build` and `setup`
    included, as soon as something is to be done with it.

    Args:
        node_id: its name.
        role: dash-separated words out of ``train``, ``eval``, ``test``, ``aggregate``.
        config: the federation's configuration.
        log: a logger; the default is named after the node.

    Attributes:
        state: durable state of the node's own: a dict of plain values and arrays (see :mod:`icrf.values`), up to
            16 MiB. What a round has changed is committed with the round, is undone when the round is run again, is in
            the checkpoints and, between peers, in the node's state hash. What a call from outside changes, or the
            evaluation of a consensus model, does not last.
    """

    context: NodeContext
    # What a node that makes room for others keeps in memory, beside `state`; mostly there is nothing.
    _LEFT = ("_version", "_saved", "_received", "_received_before")

    def __init__(self, node_id: str, role: str, config: FederationConfig, log: Any = None, **kwargs: Any) -> None:
        self.config = config
        if log is not None:
            self.log = log
        self.build_arguments = kwargs
        self.state: dict[str, Any] = {}
        self._id, self._role = node_id, role
        self._version = 0
        self._saved: dict[str, Any] | None = None
        self._received: list[Message] = []
        self._received_before: list[Message] = []

    @cached_property
    def log(self) -> Any:
        """The node's logger; made when it is first used, because Python keeps every logger for good."""
        return logging.getLogger(f"icrf.node.{self._id}")

    def leave(self) -> dict[str, Any]:
        """The host calls this when the node makes room for others: what `come_back` needs besides `state`."""
        return {name: getattr(self, name) for name in self._LEFT} if any(map(vars(self).get, self._LEFT)) else {}

    def come_back(self, left: dict[str, Any]) -> None:
        """The host calls this on the object that takes the place of the one that left."""
        vars(self).update(left)

    def enter_round(self, number: int) -> None:
        """The host calls this when an attempt begins: a repeated round finds the messages that its first try found."""
        if number == self.context.round:
            self._received = list(self._received_before)
        else:
            self._received_before = list(self._received)
        self.context.round, self.context.chosen_model = number, 0

    # ------------------------------------------------------------ to override

    def build(self, **kwargs: Any) -> None:
        """Heavy initialisation with the template's arguments: called before `setup`, data and model are bound."""

    def setup(self) -> None:
        """Called when the node becomes active, before its first round: open files, fill `state` for the start.

        After a restart, or when the node had made room for others, `state` is what it was, whatever is put into it
        here.
        """

    def train(self, **kwargs: Any) -> dict[str, float]:
        """Train ``self.model`` in place on ``self.train_data``; returns metrics, ``loss`` among them."""
        features, labels = self.train_data
        c = self.config
        loss, _ = self.context.trainer.train(
            self.context.model,
            features,
            labels,
            optimizer=c.optimizer,
            learning_rate=c.learning_rate,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
            epochs=c.number_of_epochs,
            batch_size=c.batch_size,
            shuffle=c.shuffle,
            generator=self.generator("batches"),
            steps=c.local_steps,
            loss=self.loss,
        )
        return {"loss": loss}

    def loss(self, scores: Any, labels: Any) -> Any:
        """What `train` descends on, as a scalar tensor: the mean cross entropy.

        Args:
            scores: the model's output of a batch, shape (n, num_classes).
            labels: int64 classes, shape (n,).
        """
        return functional.cross_entropy(scores, labels)

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        """Accuracy, loss and the configured metrics of ``self.model``.

        Args:
            phase: ``test`` for the held-out data, anything else for the node's own.
        """
        features, labels = self.context.test_data if phase == "test" else self.train_data
        return evaluate(self.model, features, labels, metrics=self.config.metrics)

    def training_loss(self) -> float:
        """The mean of `loss` over the node's own data; where there are several models, it trains the one of lowest."""
        features, labels = self.train_data
        return mean_loss(self.model, features, labels, self.loss)

    def aggregate(self, state: Array) -> Array:
        """A last word on the node's new state of a round (the aggregator: on the new global model, or on one after the
        other where there are several).

        Args:
            state: flat parameters, shape (num_parameters,), in the layout's name order; may be changed in place.

        Returns:
            What becomes the committed state, of the same shape and dtype.
        """
        return state

    # ------------------------------------------------------------ what a node sees

    @property
    def id(self) -> str:
        return self._id

    @property
    def role(self) -> str:
        return self._role

    @property
    def is_train_node(self) -> bool:
        return "train" in parts_of(self._role)

    @property
    def is_eval_node(self) -> bool:
        return "eval" in parts_of(self._role)

    @property
    def is_test_node(self) -> bool:
        return "test" in parts_of(self._role)

    @property
    def model(self) -> Any:
        """The torch module, holding this node's state while the node runs."""
        return self.context.model.module

    @property
    def train_data(self) -> tuple[Any, Any]:
        """(features, labels) of this node as torch tensors, on the configured device like the model."""
        if self.context.train_data is None:
            raise NodeError("U001", f"{self._id} has no training data", value=self._role, allowed="role train")
        return self.context.train_data

    @property
    def num_samples(self) -> int:
        """How many training samples it has: its weight in a sample-weighted average."""
        # The length of a tensor takes ten times as long.
        return 0 if self.context.train_data is None else int(self.context.train_data[1].shape[0])

    @property
    def round(self) -> int:
        return self.context.round

    @property
    def chosen_model(self) -> int:
        """Which of the federation's models the node trains in this round; 0 until it has chosen, and with only one."""
        return self.context.chosen_model

    @property
    def version(self) -> int:
        """The number of the last version that was saved or trained, whichever is later; it never falls."""
        return max(self._version, self.context.round)

    @property
    def neighbors(self) -> list[str]:
        """Whom this node may send to."""
        return self.context.mailbox.get_neighbors(self._id)

    def generator(self, purpose: str) -> Any:
        """A torch generator that is a pure function of (federation seed, node, round, purpose)."""
        return torch_generator(self.config.seed, self.context.index, self.context.round, purpose)

    # ------------------------------------------------------------ messages

    def send(self, header: str, body: dict[str, Any], to: Sequence[str] | str | None = None) -> int:
        """Send to some neighbours, or to all; readable there from the next round on. P011 along a non-edge."""
        return self.context.mailbox.publish(Message(header, self._id, body, time.time()), to)

    def receive(self, block: bool = False, timeout: float | None = None) -> Message | None:
        """The next message, or None.

        Args:
            block: wait for one, up to `timeout` seconds (60 when None); only where the node has its own actor.

        Raises:
            NodeWouldBlock: U010 on a shared slot.
        """
        if block and not self.context.own_actor:
            raise NodeWouldBlock(
                "U010",
                f"{self._id} shares its slot: waiting would keep the others from running",
                place="receive(block=True)",
                hint="read with receive() in the next round, or give the cluster as many slots as nodes",
            )
        if not self._received:
            wait_s = (60.0 if timeout is None else timeout) if block else 0.0
            self._received = self.context.mailbox.sync(self._id, wait_s)
        return self._received.pop(0) if self._received else None

    def sync(self) -> list[Message]:
        """Everything that has come, in (sender index, sequence) order.

        Where a class overrides it, the host calls it at the beginning of each round, before any model is loaded.
        """
        found = self._received + self.context.mailbox.sync(self._id, 0.0)
        self._received = []
        return found

    # ------------------------------------------------------------ versions

    def update_version(self, **model: Any) -> int:
        """Save a version of named values for `pull_version`; returns its number."""
        self._saved = {k: copy.deepcopy(v) for k, v in model.items()}
        self._version = self.version + 1
        return self._version

    def pull_version(self) -> dict[str, Any]:
        """``{id, version, model, timestamp}``: what `update_version` saved, else the node's current state."""
        model = (
            self._saved
            if self._saved is not None
            else self.context.model.layout.to_state_dict(self.context.model.row.copy())
        )
        return {"id": self._id, "version": self.version, "model": model, "timestamp": time.time()}

    def test(self, phase: str = "test") -> dict[str, float]:
        """Evaluate the node's current state; see `evaluate`."""
        return self.evaluate(phase)

    def ping(self) -> dict[str, Any]:
        """Where the node lives: cluster, process, round."""
        return {"id": self._id, "cluster": self.context.cluster, "pid": os.getpid(), "round": self.context.round}
