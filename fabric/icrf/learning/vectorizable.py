"""Whether, and how many at a time, the nodes of a federation may train together; see :mod:`icrf.learning.vectorized`.

Everything here follows from the specification alone, is settled before a run starts, and stands in its configuration
as a number or ``off`` from then on: machines that measured what suits them would give results of their own.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icrf.errors import ConfigError
from icrf.learning.datasets import Dataset
from icrf.learning.flat_module import FlatModule
from icrf.learning.rng import global_randomness
from icrf.learning.vectorized import Job, Recipe, VectorTrainer
from icrf.preconditions import VECTORIZED_OPTIMIZERS

# With `auto`: most nodes at a time; fewest for which it pays; and how large all their models may be together, so that
# weights and gradients stay in a core's cache from one use to the next.
_WIDEST = 64
_NARROWEST = 16
_MOST_ELEMENTS = 1 << 20
# Where nodes are spread over hosts, each has a part of them; of fewer, most of a wide group would be empty.
_NODES_PER_LANE = 4
# Layers whose own kernels are busy enough with one node.
_SLOWER_TOGETHER = (torch.nn.modules.conv._ConvNd,)
_SAMPLES = 3


def resolved_width(
    config: Any, module: Any, dataset: Dataset, *, participants: int, most_samples: int, num_elements: int
) -> int | str:
    """What ``vectorize`` of a configuration (:class:`icrf.spec.FederationConfig`) comes to: a width, or ``off``.

    Args:
        module: a fresh model of the federation; training it is tried out on it.
        participants: nodes that train in a round.
        most_samples: of any node.
        num_elements: of the model's flat form.

    Raises:
        ConfigError: C008 for a width with a model that cannot train so, saying why.
    """
    width: int | str = config.vectorize
    if width == "off":
        return "off"
    recipe = Recipe.of(config, None if config.client_template else most_samples)
    if isinstance(width, int):
        require_vectorizable(module, config.model_type, dataset, width, recipe)
        return width
    found = suitable_width(num_elements, participants)
    slower = any(isinstance(part, _SLOWER_TOGETHER) for part in module.modules())
    if not found or slower or config.client_template or config.optimizer not in VECTORIZED_OPTIMIZERS:
        return "off"
    try:
        require_vectorizable(module, config.model_type, dataset, found, recipe)
    except ConfigError:
        return "off"
    return found


def suitable_width(num_elements: int, participants: int) -> int:
    """The width of ``auto`` for a model of that size, a power of two; 0 where nodes had better train one by one."""
    most = min(_WIDEST, participants // _NODES_PER_LANE, _MOST_ELEMENTS // num_elements)
    return 1 << (most.bit_length() - 1) if most >= _NARROWEST else 0


def require_vectorizable(module: Any, model_type: str, dataset: Dataset, width: int, recipe: Recipe) -> None:
    """Raise C008, naming the model and saying why, unless nodes can train together.

    Args:
        module: trained for two steps.
        recipe: how nodes train.
    """
    features, labels = dataset.train_part(slice(_SAMPLES))
    flat_module = FlatModule(module)
    x = torch.tensor(features, dtype=getattr(torch, flat_module.layout.dtype.name))
    module.train()
    try:
        why = _draws_in(module, x) or _changed_by(module, x) or _mixes(module, x)
        if not why:
            job = Job(flat_module.row.copy(), x, torch.tensor(labels), torch.Generator)
            why = _differs_by_lane(VectorTrainer(flat_module, width, replace(recipe, steps=2)), job)
    except Exception as error:
        reason = f"cannot do so: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise _refusal(model_type, width, reason) from error
    if why:
        raise _refusal(model_type, width, why)


def require_equal_lanes(trainer: VectorTrainer, model_type: str, job: Job) -> None:
    """Raise C008 unless a trainer comes to the same bits in each of its lanes, where it computes."""
    if why := _differs_by_lane(trainer, job):
        raise _refusal(model_type, trainer.width, f"{why} on this device")


def _refusal(model_type: str, width: int, why: str) -> ConfigError:
    return ConfigError(
        "C008",
        f"model_type '{model_type}' contradicts vectorize {width}: the model {why}",
        place="vectorize",
        value=width,
        allowed="off",
        hint="nodes of such a model train one after the other",
    )


class _Draws(TorchDispatchMode):  # type: ignore[misc]
    """Notes which operations draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _draws_in(module: Any, x: Any) -> str:
    """Whether a forward pass in training draws random numbers: nodes would draw from each other's."""
    with global_randomness(0), torch.no_grad(), _Draws() as draws:
        before = _generators()
        module(x)
        after = _generators()
    names = [*dict.fromkeys(draws.names), *(name for name in before if before[name] != after[name])]
    return f"draws random numbers ({', '.join(names)})" if names else ""


def _generators() -> dict[str, Any]:
    """The states of the global generators that are not torch's."""
    numpy: Any = np.random.get_state(legacy=False)
    return {"random": random.getstate(), "numpy.random": (numpy["state"]["key"].tobytes(), numpy["state"]["pos"])}


def _changed_by(module: Any, x: Any) -> str:
    """Whether a forward pass in training changes buffers: lanes have none of their own to change."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        module(x)
    after = dict(module.named_buffers())
    changed = [name for name in after if name not in before or not torch.equal(after[name], before[name])]
    return f"changes buffer {', '.join(changed[:5])} in training" if changed else ""


def _mixes(module: Any, x: Any) -> str:
    """Whether what a sample comes to depends on the others of its batch: fillers would show."""
    with torch.no_grad():
        all_of_them, some = module(x), module(x[:-1])
    if len(x) > 1 and not torch.allclose(all_of_them[:-1], some, rtol=1e-3, atol=1e-4):
        return "looks at other samples of the batch too, as batch norm does"
    return ""


def _differs_by_lane(trainer: VectorTrainer, job: Job) -> str:
    """Whether equal jobs end in different bits."""
    first, *others = (outcome.row.tobytes() for outcome in trainer.train([job] * trainer.width))
    return "" if all(row == first for row in others) else "comes to other bits in one lane than in another"
