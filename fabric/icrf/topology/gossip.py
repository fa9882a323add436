"""What nodes average in each round: the rows of the mixing matrix, and push-sum where its rows do not sum to 1.

Push-sum (Kempe, Dobra and Gehrke, "Gossip-based computation of aggregate information", 2003; with gradients: Assran et
al., arXiv 1811.10792) keeps a mass w_i beside the state x_i, mixes both with the same column-stochastic W, and works
with z_i = x_i / w_i. Nothing of a state enters the masses: w(t) = W w(t-1) with w(0) = 1 is known to every host, so no
mass travels. Nodes store and exchange z; in terms of it a round is

    z_i(t) = sum_j W_ij w_j(t-1) u_j / sum_j W_ij w_j(t-1)   with   u_j = z_j(t-1) + (trained_j - z_j(t-1)) / w_j(t-1),

and sum_i w_i z_i is what no round of gossip changes and what every local step enters with the same weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from icrf.topology.mixing import mixing_row, stochastic

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

# From the round on in which no mass moves by more than this part of itself, masses stand still.
_SETTLED = 2.0**-48


class Gossip:
    """The averaging of a run, a pure function of the round's number.

    Args:
        weights: the mixing matrix W.
    """

    def __init__(self, weights: csr_matrix) -> None:
        self._weights = weights
        rows, columns = stochastic(weights)
        self.push_sum = columns and not rows
        self._rows = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
        self._start = np.ones(weights.shape[0])
        # A round asks for the masses before and after it, its next attempt again.
        self._known: dict[int, FloatArray] = {0: self._start}
        self._settled_at: int | None = None

    def row(self, node: int, round_number: int) -> tuple[np.ndarray[Any, Any], FloatArray]:
        """What `node` averages in a round: (node indices ascending, itself included; their weights, sum 1)."""
        neighbours, weights = mixing_row(self._weights, node)
        if not self.push_sum:
            return neighbours, weights
        parts = weights * self.mass(round_number - 1)[neighbours]
        # Added one after the other, like all sums that reach a hash.
        return neighbours, parts / sum(parts.tolist())

    def neighbours(self, node: int) -> np.ndarray[Any, Any]:
        """Whose updates `node` needs, itself included, ascending."""
        return mixing_row(self._weights, node)[0]

    def mass(self, round_number: int) -> FloatArray:
        """w after a round, shape (num_nodes,), sum num_nodes; all 1 where push-sum is not needed.

        Exact across restores: whoever starts at a round computes the masses from round 0, in at most as many steps as
        the graph takes to settle.
        """
        if not self.push_sum:
            return self._start
        if self._settled_at is not None:
            round_number = min(round_number, self._settled_at)
        if round_number not in self._known:
            at = max(known for known in self._known if known < round_number)
            while at < round_number:
                mass = self._known[at]
                following = self._step(mass)
                if (np.abs(following - mass) <= _SETTLED * mass).all():
                    self._settled_at = round_number = at
                    break
                at += 1
                self._known[at] = following
                if at > 2:
                    self._known.pop(at - 2, None)
        return self._known[round_number]

    def _step(self, mass: FloatArray) -> FloatArray:
        # bincount adds one after the other in index order; a matrix product may not.
        parts = self._weights.data * mass[self._weights.indices]
        return np.bincount(self._rows, weights=parts, minlength=len(mass)).astype(np.float64, copy=False)
