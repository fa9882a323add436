"""What rules and optimizers need: how many updates a robust aggregation rule, given how many of them may be anything at
all, and which optimizers train several nodes together."""

from __future__ import annotations

# Trimmed mean: something has to be left between the trimmed ends. Krum: Blanchard et al. 2017, proposition 1.
_FEWEST = {"TrimmedMean": (2, 1), "Krum": (2, 3), "MultiKrum": (2, 3)}

WITH_NUM_BYZANTINE = tuple(_FEWEST)

# Those whose recurrence is written for several nodes at once, see ``icrf.learning.stacked``.
VECTORIZED_OPTIMIZERS = ("SGD", "Adam", "AdamW")


def fewest_updates(rule: str, num_byzantine: int) -> int:
    """The smallest number of updates per round for which `rule` tolerates `num_byzantine` bad ones.

    2f+1 for ``TrimmedMean``, 2f+3 for ``Krum`` and ``MultiKrum``, 1 for everything else.
    """
    factor, more = _FEWEST.get(rule, (0, 1))
    return factor * num_byzantine + more


def most_byzantine(rule: str, num_updates: int) -> int:
    """The largest number of bad updates that ``TrimmedMean``, ``Krum`` or ``MultiKrum`` tolerates; -1: not even 0."""
    factor, more = _FEWEST[rule]
    return max(-1, (num_updates - more) // factor)


def most_selected(num_updates: int, num_byzantine: int) -> int:
    """The largest number of updates that ``MultiKrum`` may average: n - f - 2, those that a score looks at."""
    return num_updates - num_byzantine - 2
