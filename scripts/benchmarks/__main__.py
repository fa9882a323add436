"""``scripts/bench``: measurements side by side."""

from __future__ import annotations

import argparse
import sys

from benchmarks import assignment, between_clusters, nodes, one_cluster

COMMANDS = (
    ("one-cluster", one_cluster, "rounds on one machine: ICRF, a plain loop, and peers"),
    ("assignment", assignment, "graphs divided over clusters: ICRF, METIS and Louvain"),
    ("between-clusters", between_clusters, "payloads and messages from one Ray cluster to another"),
    ("nodes", nodes, "rounds of more and more nodes, and the mediator's share of them"),
)


def main() -> int:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, does in COMMANDS:
        command = commands.add_parser(name, help=does)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    arguments = parser.parse_args()
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
