"""``scripts/bench``: measurements side by side."""

from __future__ import annotations

import argparse
import sys

from benchmarks import assignment, between_clusters, nodes, one_cluster


def main() -> int:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("one-cluster", help="rounds on one machine: ICRF, a plain loop, and peers")
    one_cluster.add_arguments(command)
    command.set_defaults(run=one_cluster.main)
    command = commands.add_parser("assignment", help="graphs divided over clusters: ICRF, METIS and Louvain")
    assignment.add_arguments(command)
    command.set_defaults(run=assignment.main)
    command = commands.add_parser("between-clusters", help="payloads and messages from one Ray cluster to another")
    between_clusters.add_arguments(command)
    command.set_defaults(run=between_clusters.main)
    command = commands.add_parser("nodes", help="rounds of more and more nodes, and the mediator's share of them")
    nodes.add_arguments(command)
    command.set_defaults(run=nodes.main)
    arguments = parser.parse_args()
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
