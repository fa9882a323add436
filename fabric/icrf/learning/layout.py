"""The flat form of a model: all tensors in name order in one contiguous buffer.

Everything that moves or averages parameters works on this buffer; names and shapes live once, in the layout. Torch
is needed only where a module is touched, so that gateways and commands can read layouts without loading it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from icrf.errors import WeightsError
from icrf.protocol import TensorSpec

FlatArray = np.ndarray[Any, np.dtype[Any]]

_DTYPES = ("float32", "float64")
_PLACE = "model"


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of a model's tensors within its flat buffer.

    Args:
        tensors: the tensors in strictly ascending name order, all float32 or all float64.

    Attributes:
        dtype: the common NumPy dtype.
        names: tensor names.
        sizes: elements per tensor.
        offsets: first element per tensor.
        slices: the tensor's part of the flat buffer.
        num_parameters: elements in total.

    Raises:
        WeightsError: W010 for names out of order, W011 for a dtype without an aggregation rule.
    """

    tensors: tuple[TensorSpec, ...]
    dtype: np.dtype[Any] = field(init=False, compare=False)
    names: tuple[str, ...] = field(init=False, compare=False)
    sizes: tuple[int, ...] = field(init=False, compare=False)
    offsets: tuple[int, ...] = field(init=False, compare=False)
    slices: tuple[slice, ...] = field(init=False, compare=False)
    num_parameters: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise WeightsError("W010", "the model has no parameters", place=_PLACE)
        names = tuple(t.name for t in self.tensors)
        for before, after in itertools.pairwise(names):
            if before >= after:
                raise WeightsError("W010", f"tensors are not in name order: {before!r} before {after!r}", place=_PLACE)
        for tensor in self.tensors:
            if tensor.dtype != self.tensors[0].dtype or tensor.dtype not in _DTYPES:
                raise _no_rule(tensor.name, tensor.dtype, self.tensors[0].dtype)
        sizes = tuple(math.prod(t.shape) for t in self.tensors)
        ends = tuple(itertools.accumulate(sizes))
        offsets = (0, *ends[:-1])
        values = {
            "dtype": np.dtype(self.tensors[0].dtype),
            "names": names,
            "sizes": sizes,
            "offsets": offsets,
            "slices": tuple(slice(a, b) for a, b in zip(offsets, ends, strict=True)),
            "num_parameters": ends[-1],
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of_module(cls, module: Any) -> Layout:
        """The layout of a ``torch.nn.Module``.

        Raises:
            WeightsError: W011 for a buffer, a tied parameter or a dtype that has no aggregation rule, by name; W010
                for a module without parameters or with one that is not materialised.
        """
        parameters: Mapping[str, Any] = dict(module.named_parameters(remove_duplicate=False))
        others = [*dict(module.named_buffers(remove_duplicate=False)), *module.state_dict()]
        for name in others:
            if name not in parameters:
                raise WeightsError(
                    "W011",
                    f"buffer {name!r}: integer buffers and running statistics have no aggregation rule yet",
                    place=name,
                    allowed="trainable float32 or float64 parameters",
                    hint="Use GroupNorm or LayerNorm in place of BatchNorm",
                )
        owners: dict[int, str] = {}
        tensors = []
        for name, parameter in sorted(parameters.items()):
            twin = owners.setdefault(id(parameter), name)
            if twin != name:
                raise WeightsError(
                    "W011",
                    f"parameters {twin!r} and {name!r} are tied, which has no aggregation rule yet",
                    place=name,
                    hint="Give each layer a parameter of its own",
                )
            dtype = str(parameter.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise _no_rule(name, dtype, _DTYPES[0])
            if str(parameter.device) == "meta" or not hasattr(parameter, "shape"):
                raise WeightsError("W010", f"parameter {name!r} is not materialised", place=name)
            tensors.append(TensorSpec(name, tuple(int(n) for n in parameter.shape), dtype))
        return cls(tuple(tensors))

    def check(self, array: FlatArray) -> None:
        """Raise W010 unless `array` is a flat buffer of this layout: one-dimensional, same length and dtype."""
        if array.shape != (self.num_parameters,) or array.dtype != self.dtype:
            raise WeightsError(
                "W010",
                "array differs from the model's layout",
                value=f"{array.dtype} {array.shape}",
                allowed=f"{self.dtype} ({self.num_parameters},)",
            )

    def repeated(self, count: int) -> Layout:
        """The layout of so many models one after the other, whose tensors carry the names of :func:`model_names`."""
        if count == 1:
            return self
        tensors = (replace(t, name=f"{name}.{t.name}") for name in model_names(count) for t in self.tensors)
        return Layout(tuple(tensors))

    def to_state_dict(self, flat: FlatArray) -> dict[str, FlatArray]:
        """Views of the tensors within `flat`, by name."""
        self.check(flat)
        return {t.name: flat[s].reshape(t.shape) for t, s in zip(self.tensors, self.slices, strict=True)}

    def from_state_dict(self, state: Mapping[str, FlatArray], *, place: str = _PLACE) -> FlatArray:
        """Copy named tensors into a new flat buffer.

        Raises:
            WeightsError: W010 naming the first tensor that is missing, unexpected or of another shape or dtype.
        """
        for name in sorted(set(state) ^ set(self.names)):
            problem = "is missing" if name not in state else "is not part of the model"
            raise WeightsError("W010", f"tensor {name!r} {problem}", place=place)
        flat = np.empty(self.num_parameters, self.dtype)
        for tensor, part in zip(self.tensors, self.slices, strict=True):
            found = state[tensor.name]
            if found.shape != tensor.shape or found.dtype != self.dtype:
                raise WeightsError(
                    "W010",
                    f"tensor {tensor.name!r} differs from the model's layout",
                    place=place,
                    value=f"{found.dtype} {found.shape}",
                    allowed=f"{self.dtype} {tensor.shape}",
                )
            flat[part] = found.reshape(-1)
        return flat

    def to_safetensors(self, flat: FlatArray, metadata: Mapping[str, str] | None = None) -> bytes:
        """A safetensors file of the model; `metadata` goes into its header."""
        packed: bytes = safetensors.numpy.save(self.to_state_dict(flat), dict(metadata) if metadata else None)
        return packed

    def from_safetensors(self, data: bytes) -> FlatArray:
        """The flat buffer of a safetensors file.

        Raises:
            WeightsError: W010 if it is no such file, or its names, shapes or dtypes are not the model's.
        """
        place = "model.safetensors"
        try:
            state = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that NumPy does not have
            raise WeightsError("W010", f"not a readable safetensors file: {error}", place=place) from error
        return self.from_state_dict(state, place=place)

    def model_sha256(self, flat: FlatArray) -> str:
        """Hex sha256 over the tensors' bytes in name order, which are the buffer's bytes, little endian."""
        self.check(flat)
        ordered = np.ascontiguousarray(flat)
        if sys.byteorder == "big":
            ordered = ordered.byteswap()
        return hashlib.sha256(ordered.view(np.uint8).data).hexdigest()

    def first_nonfinite(self, flat: FlatArray) -> str | None:
        """Name of the first tensor with a NaN or an infinity, or None."""
        for name, largest in zip(self.names, self.absmax(flat), strict=True):
            if not math.isfinite(largest):
                return name
        return None

    def absmax(self, flat: FlatArray) -> tuple[float, ...]:
        """Largest absolute value per tensor; 0 for an empty one, NaN or infinity where there is any."""
        self.check(flat)
        # min and max read the data without a temporary, unlike abs; both pass a NaN on, and np.maximum too.
        return tuple(
            float(np.maximum(-flat[s].min(), flat[s].max())) + 0.0 if s.stop > s.start else 0.0 for s in self.slices
        )


def model_names(count: int) -> tuple[str, ...]:
    """``model_0``, ``model_1``, ...: the models of a federation that learns several, in an order that sorting keeps."""
    width = len(str(count - 1))
    return tuple(f"model_{number:0{width}d}" for number in range(count))


def _no_rule(name: str, dtype: str, wanted: str) -> WeightsError:
    return WeightsError(
        "W011",
        f"tensor {name!r} of type {dtype} has no aggregation rule yet",
        place=name,
        value=dtype,
        allowed=f"{wanted if wanted in _DTYPES else 'float32 or float64'} throughout the model",
    )


class FlatModule:
    """A module whose parameters are views of one contiguous buffer, so that moving a model is one copy.

    Gradients stay torch's own and are not part of the buffer: a large model whose nodes do not train by gradient
    pays nothing for them, and the backward pass hands its result over where a bound gradient would cost an addition.
    CPU only.

    The buffer comes from torch, which aligns it to 64 bytes: vector code may sum in another order on another
    alignment, and equal runs must give equal bits.

    Attributes:
        module: the module itself.
        layout: its layout.
        trainable: (parameter, view of its data) for every parameter that requires a gradient, in name order.
    """

    def __init__(self, module: Any, layout: Layout | None = None) -> None:
        import torch  # noqa: PLC0415 - layouts must be usable without loading torch

        self.module = module
        self.layout = Layout.of_module(module)
        if layout is not None and layout != self.layout:
            raise WeightsError("W010", "the module's parameters differ from the layout", place=_PLACE)
        self._tensor = torch.empty(self.layout.num_parameters, dtype=getattr(torch, self.layout.dtype.name))
        named = dict(module.named_parameters())
        trainable = []
        for tensor, part in zip(self.layout.tensors, self.layout.slices, strict=True):
            parameter = named[tensor.name]
            view = self._tensor[part].view(tensor.shape)
            view.copy_(parameter.data)
            parameter.data = view
            if parameter.requires_grad:
                trainable.append((parameter, view))
        self.trainable: tuple[tuple[Any, Any], ...] = tuple(trainable)
        self._array: FlatArray = self._tensor.numpy()

    @property
    def flat(self) -> FlatArray:
        """The live parameters as a NumPy view, shape (num_parameters,); it changes with training."""
        return self._array

    def load(self, flat: FlatArray) -> None:
        """Copy `flat` into the parameters (W010 if it does not fit)."""
        self.layout.check(flat)
        np.copyto(self._array, flat)

    def snapshot(self) -> FlatArray:
        """A copy of the parameters that later training leaves alone."""
        return self._array.copy()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter, _ in self.trainable:
            parameter.grad = None
