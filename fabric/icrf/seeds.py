"""Seeds as a pure function of (federation seed, node index, round, purpose); see ``icrf.learning.rng`` for their use.

NumPy only: commands start quickly, and the mediator draws the participants of a round with this and loads no torch.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


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


def model_seed(federation_seed: int, number: int = 0) -> int:
    """The seed of the initial weights of a federation's models, counted from 0."""
    return derive_seed(federation_seed, 0, 0, f"model-{number}" if number else "model")


def stable_random_state(seed: int, purpose: str, round_number: int = 0) -> np.random.RandomState:
    """A generator of the federation itself whose streams NumPy has frozen for good, for choices that must be agreed on.

    ``numpy.random.Generator`` may change its streams between releases (NEP 19); ``RandomState`` may not. Data splits,
    random graphs and the choice of participants use this one, so that different NumPy releases draw alike.
    """
    key: Any = np.frombuffer(derive_seed(seed, -1, round_number, purpose).to_bytes(8, "little"), dtype="<u4")
    return np.random.RandomState(key)
