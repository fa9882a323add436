"""Who may talk to whom: adjacency matrices, named topologies, CSV files and mixing matrices."""

from icrf.topology import families, random_graphs, rewiring  # noqa: F401 - they register what they define
from icrf.topology.adaptation import (
    ADAPTERS,
    STATIC,
    Adapter,
    Situation,
    Sketcher,
    TopologyAdaptationStrategy,
    changed_edges,
    require_usable,
)
from icrf.topology.builders import (
    TOPOLOGIES,
    build_topology,
    from_network,
    register_network_builder,
    register_topology,
    require_connected,
)
from icrf.topology.check import check_mixing, require_consensus
from icrf.topology.communities import label_communities
from icrf.topology.csv_matrix import read_adjacency_csv, read_weights_csv
from icrf.topology.gossip import Gossip
from icrf.topology.grouping import GROUPINGS, group_clients, register_grouping, wants_labels
from icrf.topology.hierarchy import Hierarchy, hierarchy_of_groups
from icrf.topology.hybrid import INTER_CLUSTER, INTRA_CLUSTER, MAX_DENSE_NODES, HybridAdjacencyMatrix
from icrf.topology.mixing import (
    MIXINGS,
    metropolis_hastings,
    mixing_matrix,
    mixing_row,
    register_mixing,
    wants_samples,
    weigh,
)
from icrf.topology.spectrum import rounds_to_consensus, spectrum

__all__ = [
    "ADAPTERS",
    "GROUPINGS",
    "INTER_CLUSTER",
    "INTRA_CLUSTER",
    "MAX_DENSE_NODES",
    "MIXINGS",
    "STATIC",
    "TOPOLOGIES",
    "Adapter",
    "Gossip",
    "Hierarchy",
    "HybridAdjacencyMatrix",
    "Situation",
    "Sketcher",
    "TopologyAdaptationStrategy",
    "build_topology",
    "changed_edges",
    "check_mixing",
    "from_network",
    "group_clients",
    "hierarchy_of_groups",
    "label_communities",
    "metropolis_hastings",
    "mixing_matrix",
    "mixing_row",
    "read_adjacency_csv",
    "read_weights_csv",
    "register_grouping",
    "register_mixing",
    "register_network_builder",
    "register_topology",
    "require_connected",
    "require_consensus",
    "require_usable",
    "rounds_to_consensus",
    "spectrum",
    "wants_labels",
    "wants_samples",
    "weigh",
]
