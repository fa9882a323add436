"""Randomness of a node as a pure function of (federation seed, node index, round, purpose).

A round that is run again after a fault, on another host or another cluster, must draw the same numbers. So no
generator outlives its purpose, and none is shared between nodes.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from icrf.learning.devices import global_generators, put_back
from icrf.seeds import derive_seed, model_seed, stable_random_state

__all__ = [
    "derive_seed",
    "global_randomness",
    "model_seed",
    "numpy_generator",
    "restored_randomness",
    "stable_random_state",
    "torch_generator",
]


def torch_generator(federation_seed: int, node_index: int, round_number: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Torch's Mersenne Twister uses the low 32 bits of a seed only."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(federation_seed, node_index, round_number, purpose))
    return generator


def numpy_generator(federation_seed: int, node_index: int, round_number: int, purpose: str) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive_seed` (PCG64)."""
    return np.random.Generator(np.random.PCG64(derive_seed(federation_seed, node_index, round_number, purpose)))


_kept = threading.local()


@contextmanager
def restored_randomness() -> Iterator[None]:
    """Afterwards the global generators of torch (of CPU and GPUs), NumPy and ``random`` go on as if nothing was.

    Around many calls of :func:`global_randomness`: those only seed then, which takes a tenth of the time.
    """
    before = np.random.get_state(legacy=False), random.getstate()
    outside, _kept.by_caller = getattr(_kept, "by_caller", False), True
    try:
        with put_back():
            yield
    finally:
        _kept.by_caller = outside
        np.random.set_state(before[0])
        random.setstate(before[1])


@contextmanager
def global_randomness(seed: int) -> Iterator[None]:
    """The global generators of torch, NumPy and ``random`` seeded; afterwards they go on as if nothing was.

    For code that is not ours: what it draws becomes a function of `seed`.

    Args:
        seed: 63-bit seed; NumPy's generator takes its low 32 bits.
    """
    by_caller = getattr(_kept, "by_caller", False)
    with nullcontext() if by_caller else restored_randomness():
        # Whoever seeds inside has to put back what is drawn from here.
        _kept.by_caller = False
        for generator in global_generators():
            generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        try:
            yield
        finally:
            _kept.by_caller = by_caller
