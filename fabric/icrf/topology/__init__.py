"""Who may talk to whom: adjacency matrices, named topologies, CSV files and mixing matrices."""

from icrf.topology.builders import TOPOLOGIES, build_topology, register_topology, require_connected
from icrf.topology.csv_matrix import read_adjacency_csv
from icrf.topology.hybrid import INTER_CLUSTER, INTRA_CLUSTER, MAX_DENSE_NODES, HybridAdjacencyMatrix
from icrf.topology.mixing import (
    MIXINGS,
    metropolis_hastings,
    mixing_row,
    mixing_rows,
    rounds_to_consensus,
    spectrum,
)

__all__ = [
    "INTER_CLUSTER",
    "INTRA_CLUSTER",
    "MAX_DENSE_NODES",
    "MIXINGS",
    "TOPOLOGIES",
    "HybridAdjacencyMatrix",
    "build_topology",
    "metropolis_hastings",
    "mixing_row",
    "mixing_rows",
    "read_adjacency_csv",
    "register_topology",
    "require_connected",
    "rounds_to_consensus",
    "spectrum",
]
