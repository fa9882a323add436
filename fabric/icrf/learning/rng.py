"""Randomness of a node as a pure function of (federation seed, node index, round, purpose).

A round that is run again after a fault, on another host or another cluster, must draw the same numbers. So no
generator outlives its purpose, and none is shared between nodes.
"""

from __future__ import annotations

import numpy as np
import torch

from icrf.seeds import derive_seed, model_seed, stable_random_state

__all__ = ["derive_seed", "model_seed", "numpy_generator", "stable_random_state", "torch_generator"]


def torch_generator(federation_seed: int, node_index: int, round_number: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Torch's Mersenne Twister uses the low 32 bits of a seed only."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(federation_seed, node_index, round_number, purpose))
    return generator


def numpy_generator(federation_seed: int, node_index: int, round_number: int, purpose: str) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive_seed` (PCG64)."""
    return np.random.Generator(np.random.PCG64(derive_seed(federation_seed, node_index, round_number, purpose)))
