"""What is kept of a round, as bytes: of a host, of a cluster, or of nodes that come from several clusters.

Three parts: what the flow keeps (``checkpoint.py``), states of nodes (``node_state.py``) and letters (``mail.py``). A
round of which only the flow keeps something is that part alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from icrf import values
from icrf.errors import WeightsError
from icrf.protocol import Activate
from icrf_agent.checkpoint import merge_rows, only_rows
from icrf_agent.mail import NO_MAIL, Mail

_MAGIC = b"ICRV"  # of icrf.values; a safetensors file would have a header of gigabytes


@dataclass(frozen=True)
class Kept:
    """What is kept of one round.

    Attributes:
        flow: rows of keepers as safetensors; empty where the flow keeps nothing here.
        states: encoded states by node index.
        mail: letters that nobody has read yet.
    """

    flow: bytes = b""
    states: Mapping[int, bytes] = field(default_factory=dict)
    mail: Mail = NO_MAIL

    def pack(self, round_number: int) -> bytes:
        """As bytes; the flow's alone where nothing else is kept, so nothing at all is empty."""
        if not self.states and not self.mail:
            return self.flow
        nodes = {str(index): self.states[index] for index in sorted(self.states)}
        parts = {"round": round_number, "flow": self.flow, "nodes": nodes}
        return values.encode({**parts, "mail": self.mail.plain()} if self.mail else parts)

    @classmethod
    def unpack(cls, data: bytes, round_number: int) -> Kept:
        """The inverse of :meth:`pack`.

        Raises:
            WeightsError: W010 for what was kept of another round, or is no such thing.
        """
        if data[: len(_MAGIC)] != _MAGIC:
            return cls(data)
        try:
            found: Any = values.decode(data)
            if found["round"] != round_number:
                raise WeightsError(
                    "W010",
                    "a checkpoint of another round",
                    place="checkpoint",
                    value=found["round"],
                    allowed=str(round_number),
                )
            states = {int(index): packed for index, packed in found["nodes"].items()}
            return cls(found["flow"], states, Mail.of_plain(found["mail"]) if "mail" in found else NO_MAIL)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightsError("W010", "not a checkpoint of nodes with states", place="checkpoint") from error

    def of(self, nodes: Collection[int], round_number: int) -> Kept:
        """What these nodes have kept. The letters are all there: who lives where they come to picks out its own."""
        states = {index: packed for index, packed in self.states.items() if index in nodes}
        return Kept(only_rows(self.flow, round_number, nodes), states, self.mail)


def merged(parts: Sequence[Kept], round_number: int) -> Kept:
    """What several hosts, or clusters, have kept."""
    flow = merge_rows([part.flow for part in parts], round_number)
    states = {index: packed for part in parts for index, packed in part.states.items()}
    return Kept(flow, states, sum((part.mail for part in parts), NO_MAIL))


def part_of(order: Activate, cluster: str, parts: Sequence[bytes]) -> bytes:
    """What the nodes of a cluster go on from, out of what the clusters kept that they lived on.

    Raises:
        WeightsError: W010 for what was kept of another round, or is no such thing.
    """
    if len(parts) < 2:
        return parts[0] if parts else b""
    here, number = order.clusters.index(cluster), order.restore_round
    nodes = {node for node, where in enumerate(order.assignment) if where == here}
    return merged([Kept.unpack(part, number).of(nodes, number) for part in parts], number).pack(number)
