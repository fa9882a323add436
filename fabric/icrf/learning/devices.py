"""Where models and data lie while a host computes, and how they get there and back.

What is sent, summed, hashed and kept is always in the memory of the host. On ``cpu`` nothing is ever copied; on
``cuda`` models travel through page-locked buffers, which the GPU reads and writes directly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from icrf.errors import ResourceError

CPU, CUDA = "cpu", "cuda"
# What cuBLAS may use beside its operands, so that it always takes the same way (NVIDIA's documentation of cuBLAS,
# "Results reproducibility"). It counts for handles that are made afterwards.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@dataclass(frozen=True)
class Device:
    """Where a host computes.

    Attributes:
        name: what torch calls it.
        apart: whether its memory is not the host's, so that everything has to be copied.
    """

    name: str = CPU
    apart: bool = False

    @classmethod
    def of(cls, name: str) -> Device:
        """The device that a configuration names: ``cpu``, or ``cuda``, the first GPU that this process sees."""
        return cls(name, name != CPU)

    @property
    def _pinned(self) -> bool:
        return self._type == CUDA

    @property
    def _type(self) -> str:
        return str(torch.device(self.name).type)

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A tensor of zeros in the memory of the host, page-locked where a GPU reads it."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self._pinned)

    def twin_of(self, host: Any) -> Any:
        """A tensor of the device for what is in `host`; the same memory where the device's is the host's."""
        return torch.empty_like(host, device=self.name, pin_memory=False).copy_(host) if self.apart else host

    def put(self, tensor: Any) -> Any:
        """A tensor on the device; the same one where it is there."""
        if tensor.device.type == self._type:
            return tensor
        return (tensor.pin_memory() if self._pinned else tensor).to(self.name, non_blocking=self._pinned)


def prepare(device: Device) -> None:
    """Have this process compute on a device, with the same bits every time. Nothing is changed for ``cpu``.

    On a GPU: torch takes deterministic kernels only, and raises where it has none; cuDNN does not choose by
    measuring; float32 is multiplied as float32, not as TF32.

    Raises:
        ResourceError: R001 without a GPU that torch can use.
    """
    if torch.device(device.name).type != CUDA:
        return
    os.environ.setdefault(*_WORKSPACE)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise ResourceError(
            "R001",
            "device cuda needs a GPU that torch can use, and this host has none",
            place="device",
            value=f"torch {torch.__version__}",
            allowed="a GPU" if built else "a torch that is built for CUDA",
            hint="start the cluster's Ray with --num-gpus" if built else "install torch with CUDA on this cluster",
        )
    require_same_bits()


def require_same_bits() -> None:
    """The switches of :func:`prepare`, for this process."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def global_generators() -> tuple[Any, ...]:
    """Torch's own generators that models may draw from: the CPU's, and those of GPUs once any is in use."""
    gpus: tuple[Any, ...] = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return (torch.random.default_generator, *gpus)


@contextmanager
def put_back() -> Iterator[tuple[Any, ...]]:
    """Torch's own generators; afterwards they go on as if nothing was."""
    generators = global_generators()
    states = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def device_of(module: Any) -> Any:
    """The torch device of a module's parameters; the CPU for one without any."""
    parameter = next(module.parameters(), None)
    return torch.device(CPU) if parameter is None else parameter.device
