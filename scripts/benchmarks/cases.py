"""The work that all systems of ``one-cluster`` do alike: data, model, local step, and how its outcome is judged.

``digitsN``: scikit-learn's digits in a fixed order, dealt out in turn to N clients; a perceptron 64-128-10, one pass
in batches of 16, SGD with step size 0.05. ``tinyN``: one batch of 16 synthetic samples a client, the same model: what
is left is orchestration. ``heavyN``: 25 million weights (100 MB), which the local step only scales: what is left is
moving weights. All clients take part in every round, and their models are averaged by samples (FedAvg).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BATCH = 16
LEARNING_RATE = 0.05
FEATURES, HIDDEN, CLASSES = 64, 128, 10
HEAVY_LAYERS, HEAVY_SIDE = 4, 2500
HEAVY_FACTOR = 0.999
# As many clients as the synthetic batches are made for in ICRF: for few, and for many.
MOST_TINY, MOST_TINY_MANY = 1000, 10_000

# Rounds that are measured, after one that is not: as many as give a steady median.
_ROUNDS = {"digits": 20, "tiny": 5, "heavy": 5}


@dataclass(frozen=True)
class Case:
    """A piece of work.

    Attributes:
        task: ``digits``, ``tiny`` or ``heavy``.
        clients: how many train.
        rounds: rounds that are measured, after a first one that is not.
    """

    task: str
    clients: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.task}{self.clients}"


def parse_case(name: str, rounds: int | None = None) -> Case:
    """The case called ``digits10`` and the like.

    Raises:
        ValueError: there is no such case.
    """
    found = re.fullmatch(r"(digits|tiny|heavy)([1-9]\d{0,3})", name)
    if not found:
        raise ValueError(f"no case '{name}': digits, tiny or heavy and a number of clients up to 9999, as in digits10")
    task, clients = found[1], int(found[2])
    return Case(task, clients, rounds or _ROUNDS[task])


@functools.cache
def digits() -> tuple[Any, Any]:
    """All 1,797 digits in a fixed random order: features (n, 64) from 0 to 1, classes (n,)."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import, and most cases do without

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.data[order] / 16).astype(np.float32), found.target[order].astype(np.int64)


def tiny_batch(client: int) -> tuple[Any, Any]:
    """The synthetic samples of one client: features (16, 64), classes (16,)."""
    random = np.random.default_rng(client)
    return random.random((BATCH, FEATURES), dtype=np.float32), random.integers(0, CLASSES, BATCH)


def client_data(case: Case, client: int) -> tuple[Any, Any] | None:
    """(features, classes) of one client as tensors; None where the task has no data."""
    import torch  # noqa: PLC0415 - seconds, and those who only describe cases do without

    if case.task == "heavy":
        return None
    if case.task == "tiny":
        features, labels = tiny_batch(client)
    else:
        features, labels = (part[client :: case.clients].copy() for part in digits())
    return torch.from_numpy(features), torch.from_numpy(labels)


def build_model(task: str) -> Any:
    """The task's model with its initial weights, the same for every system."""
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    torch.manual_seed(0)
    if task == "heavy":
        return nn.Sequential(*(nn.Linear(HEAVY_SIDE, HEAVY_SIDE, bias=False) for _ in range(HEAVY_LAYERS)))
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def scale(model: Any) -> None:
    """The local step of ``heavy``."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(HEAVY_FACTOR)


def train(model: Any, data: tuple[Any, Any] | None) -> int:
    """One client's local work, as anybody would write it; the client's weight in the average."""
    import torch  # noqa: PLC0415
    from torch.nn import functional  # noqa: PLC0415

    if data is None:
        scale(model)
        return 1
    features, labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for x, y in zip(features.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return len(labels)


@dataclass(frozen=True)
class Outcome:
    """What a system has reached, by which the others are held to have done the same work.

    Attributes:
        accuracy: of the last model, on all digits or on all clients' synthetic samples; None where there are none.
        norm: Euclidean norm of the last model's weights.
    """

    accuracy: float | None
    norm: float


def judge(case: Case, weights: Mapping[str, Any]) -> Outcome:
    """The outcome of a run whose last model has these tensors (or arrays) by the names of the state."""
    import torch  # noqa: PLC0415

    model = build_model(case.task)
    model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    norm = sum(float(p.detach().double().square().sum()) for p in model.parameters()) ** 0.5
    if case.task == "heavy":
        return Outcome(None, norm)
    if case.task == "digits":
        features, labels = (torch.from_numpy(part) for part in digits())
    else:
        batches = [client_data(case, k) or () for k in range(case.clients)]
        features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        right = (model(features).argmax(1) == labels).double().mean()
    return Outcome(round(float(right), 6), norm)
