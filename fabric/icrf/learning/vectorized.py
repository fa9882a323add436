"""Local training of many nodes at once: every node is a lane of one ``torch.func.vmap``.

Nodes that share a model and an optimizer make their steps together, each on its own data, so that a step's fixed costs
are paid once for all of them. The models lie as the rows of one matrix, and the descent is that of
:mod:`icrf.learning.training`, within rounding.

What a node gets must not depend on who trains beside it, in which lane, or how many do:

- A step always runs over all `width` lanes. Those without a node, or whose node has made all of its steps, compute
  something that nobody looks at; only lanes at work are changed.
- Short batches are filled up to one size with a sample of theirs that weighs nothing.
- Vector code treats the last elements of an array in another way than those before, with other last bits. So rows are
  padded, and batches are so large, that arrays end where a vector does, whatever the lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, vmap
from torch.nn import functional

from icrf.learning.flat_module import FlatModule
from icrf.learning.stacked import stacked_optimizer
from icrf.learning.training import LocalTerms, draw_model_seed

# Elements that the widest vector loops of a CPU take at a time (two registers of 16 float32).
VECTOR = 32
# Batches of all lanes are gathered in blocks of about this size.
_BLOCK_BYTES = 16 << 20

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Recipe:
    """How all nodes of a federation train; see :meth:`icrf.learning.training.LocalTrainer.train`.

    Attributes:
        batch_size: samples per step, at least 1.
    """

    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    epochs: int
    steps: int | None
    batch_size: int
    shuffle: bool

    @classmethod
    def of(cls, config: Any, most_samples: int | None = None) -> Recipe:
        """That of a configuration (:class:`icrf.spec.FederationConfig`).

        Args:
            most_samples: of any node of the federation, as larger batches would be filled up for nothing; None where
                nobody can know.
        """
        return cls(
            optimizer=config.optimizer,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            epochs=config.number_of_epochs,
            steps=config.local_steps,
            batch_size=config.batch_size if most_samples is None else max(1, min(config.batch_size, most_samples)),
            shuffle=config.shuffle,
        )


@dataclass(frozen=True)
class Job:
    """What one node trains.

    Attributes:
        start: the model to start from, with private tensors, flat, shape (row_size,).
        x: features, shape (n, ...), a tensor.
        y: int64 classes, shape (n,).
        generator: makes that of this (node, round), for the order of the samples.
        terms: what the aggregation rule adds.
    """

    start: Array
    x: Any
    y: Any
    generator: Callable[[], torch.Generator]
    terms: LocalTerms | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        row: the trained model like ``Job.start``; a view that the next group overwrites.
        loss: mean loss over all samples seen, each at the time of its step; 0 without any.
        steps: optimizer steps made.
    """

    row: Array
    loss: float
    steps: int


@dataclass(frozen=True)
class _Walk:
    """The batches of one node, all of one size: `order` says which sample stands where, `weights` what it counts.

    Attributes:
        order: sample indices, shape (steps, batch).
        weights: share of a sample in the mean of its batch, shape (steps, batch); 0 for fillers.
        counts: samples per step, shape (steps,), float64.
        steps: their number.
    """

    order: Array
    weights: Array
    counts: Array
    steps: int

    def first(self, steps: int) -> _Walk:
        """So many steps of it."""
        if steps == self.steps:
            return self
        return _Walk(self.order[:steps], self.weights[:steps], self.counts[:steps], steps)


class VectorTrainer:
    """Trains up to `width` nodes at a time. Not thread-safe.

    Args:
        flat_module: the host's module, whose device nodes train on. Its values are not changed, but for integer
            buffers.
        width: lanes; decides the last bits of all results, like the batch size of the recipe.
        recipe: how nodes train.

    Raises:
        ConfigError: C008 for an optimizer that does not train in lanes.
    """

    def __init__(self, flat_module: FlatModule, width: int, recipe: Recipe) -> None:
        self._module, self._width, self._recipe = flat_module, width, recipe
        layout = flat_module.layout
        self._dtype = getattr(torch, layout.dtype.name)
        self._size = layout.row_size
        self._batch = _filled(recipe.batch_size, VECTOR // math.gcd(width, VECTOR))
        # On a CPU both are the same memory.
        self._staged = flat_module.device.host_zeros((width, _filled(layout.row_size, VECTOR)), self._dtype)
        self._rows = flat_module.device.twin_of(self._staged)
        trainable = {name for name, found in flat_module.module.named_parameters() if found.requires_grad}
        floats = [(t.name, t.shape, part) for t, part in layout.places if not t.is_integer]
        self._tensors = {name: self._rows[:, part].view(width, *shape).detach() for name, shape, part in floats}
        learned = [(name, part, shape) for name, shape, part in floats if name in trainable]
        self._leaves = [self._tensors[name].requires_grad_() for name, _, _ in learned]
        self._optimizer = stacked_optimizer(
            recipe.optimizer,
            rows=self._rows,
            parts=[(part, shape) for _, part, shape in learned],
            shared=layout.num_parameters,
            learning_rate=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self._lanes = vmap(self._scores, randomness="error")

    @property
    def width(self) -> int:
        """Lanes: the most jobs that :meth:`train` takes."""
        return self._width

    def num_steps(self, num_samples: int) -> int:
        """Steps that a node with so many samples makes."""
        if not num_samples or (self._recipe.epochs <= 0 and self._recipe.steps is None):
            return 0
        per_pass = -(-num_samples // self._recipe.batch_size)
        return self._recipe.epochs * per_pass if self._recipe.steps is None else self._recipe.steps

    def train(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Train these nodes, at most `width`; what each gets is the same in any company.

        Optimizer states in their terms are written in place.
        """
        walks = [self._walk(job) for job in jobs]
        # Lanes at work are the first ones at every step. No lane is better than another.
        order = sorted(range(len(jobs)), key=lambda k: -walks[k].steps)
        jobs, walks = [jobs[k] for k in order], [walks[k] for k in order]
        terms = [job.terms for job in jobs]
        self._load(jobs)
        self._optimizer.begin(terms, [job.start for job in jobs])
        losses = self._descend(jobs, walks)
        self._optimizer.end(terms)
        self._staged.copy_(self._rows)
        trained = self._staged.numpy()[:, : self._size]
        found: list[Any] = [None] * len(jobs)
        for lane, k in enumerate(order):
            found[k] = Outcome(trained[lane], losses[lane], walks[lane].steps)
        return found

    # ------------------------------------------------------------ inside

    def _load(self, jobs: Sequence[Job]) -> None:
        staged = self._staged.numpy()
        for lane, job in enumerate(jobs):
            staged[lane, : self._size] = job.start
        self._rows.copy_(self._staged)
        # Integers and what is no state, which no lane has for itself, and the training mode.
        self._module.load(jobs[0].start)

    def _scores(self, tensors: dict[str, Any], x: Any) -> Any:
        """One lane's output."""
        return functional_call(self._module.module, tensors, (x,))

    def _descend(self, jobs: Sequence[Job], walks: Sequence[_Walk]) -> list[float]:
        """Make all steps; the mean loss of all samples seen per lane."""
        total = torch.zeros(self._width, dtype=torch.float64, device=self._rows.device)
        seen = torch.zeros_like(total)
        for x, y, weights, counts, active in self._batches(jobs, walks):
            scores = self._lanes(self._tensors, x)
            each = functional.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="none")
            losses = (each.view_as(weights) * weights).sum(1)
            # Lanes have nothing in common, so the gradient of the sum holds the gradient of each.
            gradients = torch.autograd.grad(losses.sum(), self._leaves, allow_unused=True)
            with torch.no_grad():
                self._optimizer.step(gradients, active)
                total[:active] += losses[:active] * counts[:active]
                seen += counts
        return [a / b if b else 0.0 for a, b in zip(total.tolist(), seen.tolist(), strict=True)]

    def _batches(self, jobs: Sequence[Job], walks: Sequence[_Walk]) -> Iterator[tuple[Any, Any, Any, Any, int]]:
        """(features, labels, weights, counts, lanes at work) of one step after the other, each for all lanes."""
        most = max(walk.steps for walk in walks)
        if not most:
            return
        # Lanes without a node look at somebody's samples, which count nothing.
        put = self._module.device.put
        all_x, all_y = torch.cat([put(job.x) for job in jobs]), torch.cat([put(job.y) for job in jobs])
        firsts = np.cumsum([0, *(job.y.shape[0] for job in jobs)])
        shape = (self._width, self._batch)
        sample_bytes = max(1, math.prod(all_x.shape[1:]) * all_x.element_size())
        block = max(1, min(most, _BLOCK_BYTES // (self._width * self._batch * sample_bytes)))
        for start in range(0, most, block):
            steps = min(block, most - start)
            order = np.zeros((steps, *shape), np.int64)
            weights, counts = np.zeros((steps, *shape)), np.zeros((steps, self._width))
            for lane, walk in enumerate(walks):
                here = walk.steps - start
                if here <= 0:
                    break
                part = slice(start, start + min(steps, here))
                np.add(walk.order[part], firsts[lane], out=order[:here, lane])
                weights[:here, lane] = walk.weights[part]
                counts[:here, lane] = walk.counts[part]
            where = put(torch.from_numpy(order).view(-1))
            parts = (
                all_x.index_select(0, where).view(*order.shape, *all_x.shape[1:]),
                all_y.index_select(0, where).view(order.shape),
                put(torch.from_numpy(weights).to(self._dtype, copy=True)),
                put(torch.from_numpy(counts)),
            )
            for k, active in enumerate((counts > 0).sum(1).tolist()):
                yield *(part[k] for part in parts), active

    def _walk(self, job: Job) -> _Walk:
        """The batches that the plain loop would make with the same generator, filled up."""
        num_samples, size = job.y.shape[0], self._recipe.batch_size
        steps = self.num_steps(num_samples)
        if not steps:
            return _NOWHERE
        one = _one_pass(num_samples, size, self._batch)
        passes = -(-steps // one.steps)
        orders = [one.order] * passes
        # The order within the only batch of a pass is of no matter.
        if self._recipe.shuffle and one.steps > 1:
            generator = job.generator()
            draw_model_seed(generator)
            orders = [torch.randperm(num_samples, generator=generator).numpy()[one.order] for _ in range(passes)]
        if passes == 1:
            return _Walk(orders[0], one.weights, one.counts, one.steps).first(steps)
        weights, counts = np.tile(one.weights, (passes, 1)), np.tile(one.counts, passes)
        return _Walk(np.concatenate(orders), weights, counts, passes * one.steps).first(steps)


@lru_cache(maxsize=1024)
def _one_pass(num_samples: int, batch_size: int, filled_size: int) -> _Walk:
    """One pass over samples in their order."""
    firsts = np.arange(0, num_samples, batch_size)[:, None]
    places = np.arange(filled_size)
    order = firsts + places
    real = (places < batch_size) & (order < num_samples)
    counts = real.sum(1, dtype=np.float64)
    # A filler is a sample of the same batch: what the model can take it can take twice.
    return _Walk(np.where(real, order, firsts), np.where(real, 1.0 / counts[:, None], 0.0), counts, len(firsts))


_NOWHERE = _Walk(np.zeros((0, 0), np.int64), np.zeros((0, 0)), np.zeros(0), 0)


def _filled(number: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-number // unit) * unit
