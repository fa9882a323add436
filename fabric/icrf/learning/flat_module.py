"""A module whose parameters lie in one flat buffer: moving, averaging and comparing a model is one operation then."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from icrf.errors import WeightsError
from icrf.learning.devices import Device
from icrf.learning.layout import FlatArray, Layout, integers, put


class FlatModule:
    """A module whose parameters are views of one contiguous buffer, so that moving a model is one copy.

    Buffers are copied instead: modules replace them at will, and a counter is no float. Gradients stay torch's own and
    are not part of the buffer: a large model whose nodes do not train by gradient pays nothing for them, and the
    backward pass hands its result over where a bound gradient would cost an addition.

    Where the device has a memory of its own, the parameters are views of a buffer there; loading a model copies it to
    the device, and :attr:`row` and :attr:`flat` copy it back.

    The memory comes from torch, which aligns it to 64 bytes: vector code may sum in another order on another
    alignment, and equal runs must give equal bits.

    Attributes:
        module: the module itself.
        layout: its layout.
        trainable: (parameter, view of its data) for every parameter that requires a gradient, in name order.
        dtype: the torch dtype of its parameters.
        device: where it is computed.
        has_batch_norm: whether any part of it is batch norm, which cannot train on one sample.
    """

    def __init__(self, module: Any, layout: Layout | None = None, device: Device | None = None) -> None:
        self.device = device or Device()
        self.module = module
        self.layout = Layout.of_module(module, layout.private if layout is not None else ())
        if layout is not None and layout != self.layout:
            raise WeightsError("W010", "the module's tensors differ from the layout", place="model")
        if self.device.apart:
            module.to(self.device.name)
        self.dtype: Any = getattr(torch, self.layout.dtype.name)
        self._parts = tuple(module.modules())
        self.has_batch_norm = any(isinstance(p, torch.nn.modules.batchnorm._BatchNorm) for p in self._parts)
        self._staged = self.device.host_zeros((self.layout.row_size,), self.dtype)
        self._array: FlatArray = self._staged.numpy()
        self._tensor = self.device.twin_of(self._staged)
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        trainable, self._buffers, self._parameters = [], [], []
        for tensor, part in self.layout.places:
            if tensor.name in buffers:
                home = _home(module, tensor.name)
                self._buffers.append((*home, buffers.pop(tensor.name), tensor, self._array[part]))
                continue
            view = self._tensor[part].view(tensor.shape)
            parameter = parameters[tensor.name]
            view.copy_(parameter.data)
            parameter.data = view
            self._parameters.append((*_home(module, tensor.name), parameter, view, tensor.name))
            if parameter.requires_grad:
                trainable.append((parameter, view))
        self.trainable: tuple[tuple[Any, Any], ...] = tuple(trainable)
        self._children = [(parent, key, child) for parent in module.modules() for key, child in parent._modules.items()]
        # What is no state must not carry anything from one node to the next.
        self._constants = [(*_home(module, name), buffer, buffer.clone()) for name, buffer in buffers.items()]
        self._gather()
        self._private = self._array[self.layout.num_parameters :].copy()

    @property
    def flat(self) -> FlatArray:
        """The live shared tensors as a NumPy view, shape (num_parameters,); it changes with training, or with the next
        look at it where the device has a memory of its own."""
        return self.row[: self.layout.num_parameters]

    @property
    def row(self) -> FlatArray:
        """The same with the private tensors behind them, shape (row_size,).

        Raises:
            WeightsError: W010 naming a buffer that has got another shape or dtype, an integer out of range, or a
                parameter that is not in its place in the buffer any more: what it has learned would be lost.
        """
        self._gather()
        return self._array

    def load(self, flat: FlatArray) -> None:
        """Copy `flat` into the module (W010 if it does not fit); private tensors that it lacks are the initial ones.

        The module is in training mode and without gradients then: nothing of the node before is left.
        """
        self.layout.check(flat)
        for parent, key, child in self._children:
            parent._modules[key] = child
        for owner, key, parameter, view, _ in self._parameters:
            owner._parameters[key] = parameter
            if not _is_view(parameter, view):
                parameter.grad, parameter.data = None, view
        np.copyto(self._array[: len(flat)], flat)
        if len(flat) < len(self._array):
            np.copyto(self._array[len(flat) :], self._private)
        if self.device.apart:
            self._tensor.copy_(self._staged)
        for owner, key, buffer, tensor, part in self._buffers:
            values = integers(part).astype(tensor.dtype) if tensor.is_integer else part
            owner._buffers[key] = buffer
            buffer.copy_(buffer.new_tensor(values.reshape(tensor.shape)))
        for owner, key, buffer, initial in self._constants:
            owner._buffers[key] = buffer.copy_(initial)
        self.train_mode()
        self.zero_grad()

    def train_mode(self) -> None:
        """Put every part of the module into training mode."""
        if not all(part.training for part in self._parts):
            self.module.train()

    def snapshot(self) -> FlatArray:
        """A copy of the shared tensors that later training leaves alone."""
        return self.flat.copy()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter, _ in self.trainable:
            parameter.grad = None

    def _gather(self) -> None:
        """Copy the buffers' values into the flat form, where the parameters' are already."""
        if not self._is_whole():
            self._require_own_parameters()
        if self.device.apart:
            self._staged.copy_(self._tensor)
        for owner, key, _, tensor, part in self._buffers:
            found = owner._buffers[key]
            dtype, shape = str(getattr(found, "dtype", "none")).removeprefix("torch."), getattr(found, "shape", ())
            if dtype != tensor.dtype or tuple(shape) != tensor.shape:
                raise WeightsError(
                    "W010",
                    f"buffer {tensor.name!r} differs from the model's layout",
                    place=tensor.name,
                    value=f"{dtype} {tuple(shape)}",
                    allowed=f"{tensor.dtype} {tensor.shape}",
                )
            put(tensor, part, found.detach().cpu().numpy())

    def _is_whole(self) -> bool:
        """Whether all parts and parameters are where they were, which is asked for every node."""
        return all(parent._modules.get(key) is child for parent, key, child in self._children) and all(
            owner._parameters.get(key) is parameter and _is_view(parameter, view)
            for owner, key, parameter, view, _ in self._parameters
        )

    def _require_own_parameters(self) -> None:
        """Raise W010 naming the first parameter that is not in its place in the buffer any more."""
        current = dict(self.module.named_parameters())
        for _, _, parameter, view, name in self._parameters:
            found = current.get(name)
            if found is not parameter or not _is_view(found, view):
                dtype, shape = str(getattr(found, "dtype", "none")).removeprefix("torch."), getattr(found, "shape", ())
                raise WeightsError(
                    "W010",
                    f"parameter {name!r} was replaced",
                    place=name,
                    value=f"{dtype} {tuple(shape)}",
                    allowed=f"the model's own {self.layout.dtype} {tuple(view.shape)}",
                    hint="change its values in place: with torch.no_grad(): parameter.copy_(values)",
                )


def _is_view(parameter: Any, view: Any) -> bool:
    """Whether a parameter's values are those that `view` shows."""
    return bool(
        parameter.data_ptr() == view.data_ptr()
        and parameter.shape == view.shape
        and parameter.dtype == view.dtype
        and parameter.stride() == view.stride()
    )


def _home(module: Any, name: str) -> tuple[Any, str]:
    """The submodule that a buffer belongs to, and its key there."""
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key
