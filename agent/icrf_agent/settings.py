"""What an agent is told at start, after its command line was checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from icrf.wire.tls import TlsFiles


@dataclass(frozen=True)
class AgentSettings:
    """The settings of one agent.

    Attributes:
        cluster: name of the cluster it serves.
        mediator: ``HOST:PORT`` of the mediator that it dials.
        ray_address: ``HOST:PORT`` of the Ray cluster's GCS, also where the cluster is a local one.
        num_slots: how many hosts may live at once; None: as many as the cluster's CPUs allow.
        quota: how many slots one federation may hold at once; None: all.
        labels: what placement selectors see.
        advertise: ``HOST:PORT`` at which other clusters can dial the gateway; None: through the mediator's relay.
        allow: user code that may run here, ``module:attr`` each; None: whatever is submitted, for a
            fabric whose submitter owns this machine.
        state_dir: the agent's locked folder.
        tls: the cluster's certificate; None: plaintext.
        renew: starts the local cluster anew after its head has died, and returns its address; None for a foreign one.
    """

    cluster: str
    mediator: str
    ray_address: str
    num_slots: int | None
    quota: int | None
    labels: Mapping[str, str]
    advertise: str | None
    allow: tuple[str, ...] | None
    state_dir: Path
    tls: TlsFiles | None = None
    renew: Callable[[], str] | None = None
