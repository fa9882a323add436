"""Optimizers over the rows of a matrix, one model per row: the recurrences of ``torch.optim``.

Everything works tensor by tensor, on that tensor's columns of all rows. Where a product is added, the sum is either
along the rows, of which each is treated like any other, or the product was rounded before: how a compiler fuses the
two at the end of an array must not show in one row more than in another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from icrf.errors import ConfigError
from icrf.learning.training import LocalTerms
from icrf.preconditions import VECTORIZED_OPTIMIZERS

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8

Terms = Sequence[LocalTerms | None]
Part = tuple[slice, tuple[int, ...]]


class Recurrence(Protocol):
    """What one optimizer does to one tensor, and what it keeps: matrices like the models', and a number per row."""

    num_moments: int

    def scales(self, steps: float) -> tuple[float, ...]:
        """What the number of a row's steps, the next one included, decides."""

    def update(self, weights: Any, gradient: Any, moments: Sequence[Any], scales: Sequence[Any]) -> None:
        """Take one step in place.

        Args:
            weights: the tensor of the rows at work, shape (k, ...).
            gradient: of the same shape; it may share memory with another one.
            moments: what is kept, each of the same shape.
            scales: those of all rows, each of shape (k, 1, ...).
        """


class _Sgd:
    """``torch.optim.SGD`` without dampening and Nesterov momentum."""

    def __init__(self, learning_rate: float, momentum: float, weight_decay: float) -> None:
        self._learning_rate, self._momentum, self._weight_decay = learning_rate, momentum, weight_decay
        self.num_moments = 1 if momentum else 0

    def scales(self, steps: float) -> tuple[float, ...]:
        return ()

    def update(self, weights: Any, gradient: Any, moments: Sequence[Any], scales: Sequence[Any]) -> None:
        if self._weight_decay:
            gradient = gradient + weights * self._weight_decay
        if self._momentum:
            gradient = moments[0].mul_(self._momentum).add_(gradient)
        weights.add_(gradient, alpha=-self._learning_rate)


class _Adam:
    """``torch.optim.Adam``, and with `decoupled` weight decay ``AdamW``; their default betas and epsilon."""

    num_moments = 2

    def __init__(self, learning_rate: float, weight_decay: float, *, decoupled: bool) -> None:
        self._learning_rate, self._weight_decay, self._decoupled = learning_rate, weight_decay, decoupled

    def scales(self, steps: float) -> tuple[float, ...]:
        return math.sqrt(1.0 - _BETA2**steps), self._learning_rate / (1.0 - _BETA1**steps)

    def update(self, weights: Any, gradient: Any, moments: Sequence[Any], scales: Sequence[Any]) -> None:
        if self._weight_decay and self._decoupled:
            weights.mul_(1.0 - self._learning_rate * self._weight_decay)
        elif self._weight_decay:
            gradient = gradient + weights * self._weight_decay
        first, second = moments
        first.lerp_(gradient, 1.0 - _BETA1)
        second.mul_(_BETA2).add_(gradient.square().mul_(1.0 - _BETA2))
        root, size = scales
        weights.sub_((first / second.sqrt().div_(root).add_(_EPSILON)).mul_(size))


class StackedOptimizer:
    """An optimizer for all rows, with what aggregation rules add to local training (:class:`LocalTerms`).

    Args:
        rows: the models, shape (width, padded row size); updated in place.
        parts: the columns and the shape of each tensor that is learned.
        shared: elements of a row that nodes share, the first ones; terms are about these.
    """

    def __init__(self, recurrence: Recurrence, rows: Any, parts: Sequence[Part], shared: int) -> None:
        self._recurrence, self._rows, self._parts, self._shared = recurrence, rows, parts, shared
        self._weights = self._tensors(rows)
        self._moments = [torch.zeros_like(rows) for _ in range(recurrence.num_moments)]
        self._moments_of = list(zip(*map(self._tensors, self._moments), strict=True)) or [()] * len(parts)
        self._steps = [0.0] * len(rows)
        self._anchor: Any = None
        self._mu: Any = None
        self._correction: Any = None

    def begin(self, terms: Terms, starts: Sequence[Any]) -> None:
        """Other models have been loaded: forget the old ones' state, and take what theirs come with.

        Args:
            terms: per row.
            starts: the rows' models, flat.
        """
        self._steps = [0.0] * len(self._rows)
        for moment in self._moments:
            moment.zero_()
        self._anchor = self._correction = None
        pulls = [0.0 if term is None or term.anchor is None else term.mu for term in terms]
        if any(pulls):
            anchors = [
                start if term is None or term.anchor is None else term.anchor
                for start, term in zip(starts, terms, strict=True)
            ]
            self._anchor = self._tensors(self._stacked(anchors))
            self._mu = self._per_row(pulls)
        if any(term is not None and term.correction is not None for term in terms):
            zeros = np.zeros(self._shared, self._anchor_dtype)
            corrections = [zeros if term is None or term.correction is None else term.correction for term in terms]
            self._correction = self._tensors(self._stacked(corrections))
        for row, term in enumerate(terms):
            if term is not None and term.optimizer_state is not None:
                kept = torch.tensor(term.optimizer_state)
                for k, moment in enumerate(self._moments):
                    moment[row, : self._shared] = kept[k * self._shared : (k + 1) * self._shared]
                for number in kept[len(self._moments) * self._shared :]:
                    self._steps[row] = float(number)

    def end(self, terms: Terms) -> None:
        """Give back the optimizer states that outlive the call."""
        for row, term in enumerate(terms):
            if term is not None and term.optimizer_state is not None:
                kept = [moment[row, : self._shared] for moment in self._moments]
                numbers = len(term.optimizer_state) - len(kept) * self._shared
                kept += [self._per_row([self._steps[row]])] * numbers
                np.copyto(term.optimizer_state, torch.cat(kept).cpu().numpy())

    def step(self, gradients: Sequence[Any], num_active: int) -> None:
        """One step of the first rows.

        Args:
            gradients: per tensor those of all rows, shape (width, ...); None where it had no part in the loss.
            num_active: rows at work.
        """
        active = slice(num_active)
        self._steps[active] = [steps + 1.0 for steps in self._steps[active]]
        # In Python, one by one: what vector code makes of a power depends on where in the array it stands.
        scales = [
            self._per_row(values) for values in zip(*map(self._recurrence.scales, self._steps[active]), strict=True)
        ]
        for number, (found, whole) in enumerate(zip(gradients, self._weights, strict=True)):
            if found is None:
                continue
            weights, gradient = whole[active], found[active]
            if self._parts[number][0].stop <= self._shared:
                gradient = self._with_terms(gradient, weights, active, number)
            moments = [moment[active] for moment in self._moments_of[number]]
            self._recurrence.update(weights, gradient, moments, [self._column(scale, weights) for scale in scales])

    def _with_terms(self, gradient: Any, weights: Any, active: slice, number: int) -> Any:
        if self._anchor is not None:
            pull = (weights - self._anchor[number][active]).mul_(self._column(self._mu, weights))
            gradient = gradient + pull
        if self._correction is not None:
            gradient = gradient + self._correction[number][active]
        return gradient

    def _per_row(self, values: Sequence[float]) -> Any:
        return torch.tensor(values, dtype=self._rows.dtype, device=self._rows.device)

    @staticmethod
    def _column(values: Any, like: Any) -> Any:
        """A number per row, in a shape that goes with a tensor of the first rows."""
        return values[: len(like)].view(-1, *[1] * (like.dim() - 1))

    def _tensors(self, matrix: Any) -> list[Any]:
        """The parts of a matrix like the rows, in their shapes; views."""
        return [matrix[:, part].view(len(matrix), *shape) for part, shape in self._parts]

    @property
    def _anchor_dtype(self) -> Any:
        return np.dtype(str(self._rows.dtype).removeprefix("torch."))

    def _stacked(self, arrays: Sequence[Any]) -> Any:
        """Flat arrays as the first columns of a matrix like the rows."""
        matrix = torch.zeros((len(arrays), self._rows.shape[1]), dtype=self._rows.dtype)
        for row, array in zip(matrix.numpy(), arrays, strict=True):
            row[: self._shared] = array[: self._shared]
        return matrix.to(self._rows.device)


def stacked_optimizer(
    name: str,
    *,
    rows: Any,
    parts: Sequence[Part],
    shared: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> StackedOptimizer:
    """The optimizer of this name; see :class:`StackedOptimizer`.

    Raises:
        ConfigError: C008 for one that does not train in lanes.
    """
    recurrence: Recurrence
    if name == "SGD":
        recurrence = _Sgd(learning_rate, momentum, weight_decay)
    elif name in VECTORIZED_OPTIMIZERS:
        recurrence = _Adam(learning_rate, weight_decay, decoupled=name == "AdamW")
    else:
        allowed = ", ".join(VECTORIZED_OPTIMIZERS)
        raise ConfigError("C008", f"optimizer {name} does not train in lanes", place="optimizer", allowed=allowed)
    return StackedOptimizer(recurrence, rows, parts, shared)
