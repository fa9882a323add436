"""The checker: what a mixing matrix can do, and the refusal of one that never brings its nodes together."""

from __future__ import annotations

from scipy.sparse import csr_matrix

from icrf.errors import TopologyError
from icrf.protocol import MixingReport
from icrf.topology.mixing import stochastic
from icrf.topology.spectrum import rounds_to_consensus, spectrum
from icrf.topology.structure import Structure, structure_of

MEAN, WEIGHTED_MEAN, NO_LIMIT = "mean", "weighted mean", "none"


def check_mixing(weights: csr_matrix) -> MixingReport:
    """All that is known about a mixing matrix; dense eigenvalues of 2,000 nodes take seconds.

    Raises:
        TopologyError: T007 if neither its rows nor its columns sum to 1.
    """
    rows, columns = stochastic(weights)
    structure = structure_of(weights)
    slem, kind = spectrum(weights, structure)
    push_sum = columns and not rows
    problem = _problem(structure, push_sum)
    return MixingReport(
        connected=structure.connected,
        strongly_connected=structure.strongly_connected,
        symmetric=structure.symmetric,
        row_stochastic=rows,
        column_stochastic=columns,
        doubly_stochastic=rows and columns,
        aperiodic=structure.aperiodic,
        push_sum=push_sum,
        limit=NO_LIMIT if problem else MEAN if columns else WEIGHTED_MEAN,
        slem=slem,
        slem_kind=kind,
        spectral_gap=1.0 - slem,
        rounds_to_consensus=-1 if problem else rounds_to_consensus(slem),
        problem=problem,
    )


def require_consensus(weights: csr_matrix, *, allow_no_consensus: bool = False, place: str = "mixing") -> None:
    """Refuse a matrix with which nodes never agree; no eigenvalue is computed.

    Args:
        allow_no_consensus: refuse only what cannot be run at all.

    Raises:
        TopologyError: T007 if neither its rows nor its columns sum to 1, T012 if agreement is impossible.
    """
    rows, columns = stochastic(weights)
    if not (rows or columns):
        sums = (weights.sum(axis=1).ravel().tolist()[0], weights.sum(axis=0).ravel().tolist()[0])
        worst = max(range(len(sums[0])), key=lambda node: abs(sums[0][node] - 1.0))
        raise TopologyError(
            "T007",
            f"row {worst} sums to {sums[0][worst]:.9g}, and the columns do not all sum to 1 either",
            place=place,
            allowed="rows that sum to 1 (gossip), or columns (push-sum), within 1e-9",
            hint="indices count from 0",
        )
    structure, push_sum = structure_of(weights), columns and not rows
    vanishing = push_sum and structure.transient > 0
    problem = _problem(structure, push_sum)
    if problem and (vanishing or not allow_no_consensus):
        way_out = "" if vanishing else ", or set allow_no_consensus: true if that is what you want"
        raise TopologyError("T012", problem, place=place, hint=f"{_remedy(structure)}{way_out}")


def _problem(structure: Structure, push_sum: bool) -> str:
    """Why nodes never agree, or lose their mass; empty if all is well."""
    if push_sum and structure.transient:
        return f"push-sum needs a strongly connected graph: {structure.transient} nodes send their mass away for good"
    if structure.closed_classes > 1:
        return f"{structure.closed_classes} groups of nodes never hear from each other"
    if not structure.aperiodic:
        return "the mixing matrix is periodic: nodes swap their states in a cycle for ever"
    return ""


def _remedy(structure: Structure) -> str:
    if structure.closed_classes > 1 or structure.transient:
        return "add edges so that every node can reach every other"
    return "keep a part of each node's own state: a diagonal above 0"
