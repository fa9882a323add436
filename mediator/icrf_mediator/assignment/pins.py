"""Which clusters a node may live on, by what its configuration says of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from icrf.errors import ConfigError, ConfigErrors
from icrf.protocol import ClusterInfo
from icrf.registry import did_you_mean


def matching(pattern: str, node_ids: Mapping[str, int], place: str) -> list[int]:
    """The indices of the nodes that an id, or a pattern such as ``client_*``, stands for.

    Raises:
        ConfigError: C014 if there is none.
    """
    if pattern in node_ids:
        return [node_ids[pattern]]
    found = [index for node, index in node_ids.items() if fnmatch.fnmatchcase(node, pattern)]
    if not found:
        is_pattern = any(sign in pattern for sign in "*?[")
        text = f"no node matches '{pattern}'" if is_pattern else f"node '{pattern}' does not exist"
        raise ConfigError("C014", text, place=place, hint=did_you_mean(pattern, node_ids))
    return found


def resolve_pins(
    placement: Mapping[str, str | Mapping[str, str]], node_ids: Sequence[str], clusters: Sequence[ClusterInfo]
) -> dict[int, frozenset[int]]:
    """Turn the configured placement into pins.

    Args:
        placement: node id or pattern -> cluster name, or label selector whose every pair a cluster's labels must have.
            A node's own entry holds alone; of patterns all that match.

    Returns:
        node index -> indices of the allowed clusters.

    Raises:
        ConfigErrors: every C014: an unknown node, an unknown cluster, a selector that matches no cluster, patterns
            that leave none.
    """
    index = {node_id: i for i, node_id in enumerate(node_ids)}
    pins: dict[int, frozenset[int]] = {}
    errors: list[ConfigError] = []
    for pattern, where in placement.items():
        place = f"placement.{pattern}"
        try:
            allowed, nodes = _allowed(pattern, where, clusters, place), matching(pattern, index, place)
            for node in nodes:
                if node_ids[node] in placement and node_ids[node] != pattern:
                    continue
                pins[node] = pins.get(node, allowed) & allowed
                if not pins[node]:
                    text = f"node {node_ids[node]}: no cluster is left by all patterns that match it"
                    raise ConfigError("C014", text, place=place)
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise ConfigErrors(errors)
    return pins


def _allowed(
    node_id: str, where: str | Mapping[str, str], clusters: Sequence[ClusterInfo], place: str
) -> frozenset[int]:
    """The clusters of that name, or with those labels; C014 if there is none."""
    if isinstance(where, str):
        allowed = frozenset(i for i, cluster in enumerate(clusters) if cluster.name == where)
        names = sorted(cluster.name for cluster in clusters)
        problem, known, hint = f"cluster '{where}' not in fabric", ", ".join(names), did_you_mean(where, names)
    else:
        wanted = set(where.items())
        allowed = frozenset(i for i, cluster in enumerate(clusters) if wanted <= set(cluster.labels.items()))
        problem = f"no cluster has the labels {_labels(where)}"
        known, hint = "; ".join(f"{c.name}: {_labels(c.labels) or 'none'}" for c in clusters), ""
    if not allowed:
        raise ConfigError("C014", f"node {node_id}: {problem}", place=place, allowed=known, hint=hint)
    return allowed


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
