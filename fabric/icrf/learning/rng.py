"""Randomness of a node as a pure function of (federation seed, node index, round, purpose).

A round that is run again after a fault, on another host or another cluster, must draw the same numbers. So no
generator outlives its purpose, and none is shared between nodes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(federation_seed: int, node_index: int, round_number: int, purpose: str) -> int:
    """A 63-bit seed from all four values; changing any of them gives an unrelated one.

    Args:
        federation_seed: the ``seed`` of the configuration.
        node_index: position of the node in the specification, or -1 for the federation itself.
        round_number: round, counted from 1; 0 for what happens before the first.
        purpose: what it is for, for instance ``train``.
    """
    packed = b"".join(n.to_bytes(16, "little", signed=True) for n in (federation_seed, node_index, round_number))
    digest = hashlib.blake2b(packed + purpose.encode(), digest_size=8, person=b"icrf-seed").digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(federation_seed: int, node_index: int, round_number: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Torch's Mersenne Twister uses the low 32 bits of a seed only."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(federation_seed, node_index, round_number, purpose))
    return generator


def numpy_generator(federation_seed: int, node_index: int, round_number: int, purpose: str) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive_seed` (PCG64)."""
    return np.random.Generator(np.random.PCG64(derive_seed(federation_seed, node_index, round_number, purpose)))


@contextmanager
def global_randomness(seed: int) -> Iterator[None]:
    """The global generators of torch (CPU), NumPy and ``random`` seeded; afterwards they go on as if nothing was.

    For code that is not ours: what it draws becomes a function of `seed`. It takes a tenth of a millisecond.

    Args:
        seed: 63-bit seed; NumPy's generator takes its low 32 bits.
    """
    torch_global = torch.random.default_generator
    before = torch_global.get_state(), np.random.get_state(legacy=False), random.getstate()
    torch_global.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    try:
        yield
    finally:
        torch_global.set_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def stable_random_state(seed: int, purpose: str) -> np.random.RandomState:
    """A generator whose streams NumPy has frozen for good, for choices on which clusters must agree.

    ``numpy.random.Generator`` may change its streams between releases (NEP 19); ``RandomState`` may not. Data splits
    use this one, so that two clusters with different NumPy releases still partition alike.
    """
    key: Any = np.frombuffer(derive_seed(seed, -1, 0, purpose).to_bytes(8, "little"), dtype="<u4")
    return np.random.RandomState(key)
