"""Models by name, and the check that a model fits its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from icrf.errors import ConfigError, WeightsError
from icrf.learning.architectures import BUILT_IN
from icrf.learning.datasets import Dataset
from icrf.learning.injection import accepted_arguments
from icrf.learning.rng import global_randomness
from icrf.registry import Registry

MODELS: Registry[Callable[..., Any]] = Registry("model")
for _name, _factory in BUILT_IN.items():
    MODELS.add(_name, _factory)


def register_model(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a factory known as a ``model_type``.

    The factory returns a ``torch.nn.Module``; where it has parameters named ``input_shape`` or ``num_classes``, they
    are passed by name.
    """
    return MODELS.register(name)


def build_model(model_type: str, input_shape: Sequence[int], num_classes: int, seed: int) -> Any:
    """Build a model with initial weights that depend on `seed` alone; the global generators are left as they were.

    Args:
        model_type: a registered name or ``module:attr`` of a factory.
        input_shape: shape of one sample, without the batch.
        num_classes: number of classes.
        seed: 63-bit seed.

    Raises:
        ConfigError: C010 unknown name, C017 code that cannot be loaded or that raises, C018 no module came back,
            or one whose tensors get their shapes from the first batch.
        WeightsError: W020 for initial weights that are not finite.
    """
    factory = MODELS.get(model_type)
    arguments = accepted_arguments(factory, {"input_shape": tuple(input_shape), "num_classes": num_classes})
    with MODELS.calling(model_type), global_randomness(seed):
        module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            "C018",
            f"model factory '{model_type}' returned {type(module).__name__}",
            place="model_type",
            allowed="a torch.nn.Module",
        )
    _require_initial_values(module, model_type)
    return module


def _require_initial_values(module: Any, model_type: str) -> None:
    for name, tensor in module.state_dict().items():
        if is_lazy(tensor):
            raise ConfigError(
                "C018",
                f"model '{model_type}' has a lazy tensor {name}: it gets its shape from the first batch",
                place="model_type",
                allowed="modules whose shapes are known when they are built",
                hint="Write, for instance, Linear for LazyLinear; the factory's parameter input_shape tells the sizes.",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                "W020", f"model '{model_type}' starts with values that are not finite in {name}", place="model_type"
            )


def check_fit(module: Any, dataset: Dataset) -> None:
    """Pass two samples through the model; its output must be float of shape (2, num_classes).

    Neither the model's mode nor torch's global generator is changed.

    Raises:
        ConfigError: C018 naming the shapes.
    """
    batch = torch.from_numpy(dataset.train_part(slice(2))[0])
    parameter = next(module.parameters(), None)
    if parameter is not None:
        batch = batch.to(parameter.dtype)
    wanted = (len(batch), dataset.num_classes)
    place = f"model_type with dataset_type {dataset.name}"
    was_training = module.training
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            output = module(batch)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            "C018",
            f"the model cannot take input of shape {tuple(batch.shape)}: {type(error).__name__}: {error}",
            place=place,
            hint="Flatten or reshape the input in the model, or choose another model_type",
        ) from error
    finally:
        module.train(was_training)
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != wanted or not output.is_floating_point():
        raise ConfigError(
            "C018",
            f"the model's output for input of shape {tuple(batch.shape)} has the wrong shape",
            place=place,
            value=found,
            allowed=f"float {wanted}, one score per class",
        )


def check_starts(modules: Sequence[Any], model_type: str) -> None:
    """Refuse, with C018, modules of which two start with equal weights: models of one federation would stay equal."""
    starts = {b"".join(p.detach().numpy().tobytes() for p in module.parameters()) for module in modules}
    if len(starts) < len(modules):
        raise ConfigError(
            "C018",
            f"model factory '{model_type}' starts every model with the same weights",
            place="model_type",
            allowed="initial weights that are drawn at random where number_of_models is set",
        )
