"""Federations by shape: star, ring, mesh, and the factory that finds one by the names of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from icrf.errors import ConfigError
from icrf.federation.base import FederatedBase, changed
from icrf.federation.node import FederatedNode
from icrf.federation.virtual_node import VirtualNode
from icrf.registry import Registry
from icrf.spec import FederationConfig
from icrf.spec.choices import CLUSTERED, DECENTRALIZED, HIERARCHICAL, TRADITIONAL, WITH_SERVER
from icrf.submission import SERVER_ID, SERVER_ROLE

Executor = Callable[..., FederatedBase]


def _clients(template: Any, roles: Sequence[str], config: FederationConfig, log: Any) -> list[VirtualNode]:
    return [VirtualNode(template, f"client_{i}", role, config, log) for i, role in enumerate(roles)]


def _shaped(config: FederationConfig, schema: str, topology: str, clients: int) -> FederationConfig:
    if not clients:
        raise ConfigError("C008", "no roles, hence no clients", place="roles", allowed="one role per client")
    plain = config.model_dump(mode="json")
    wanted = {
        "federated_learning_schema": schema,
        "federated_learning_topology": topology,
        "number_of_clients": clients,
        "min_nodes": None if config.min_nodes is None else min(config.min_nodes, clients),
    }
    return config if all(plain.get(k) == v for k, v in wanted.items()) else changed(config, **wanted)


class StarFederatedLearningSchema(FederatedBase):
    """One server and clients: sample-weighted federated averaging (McMahan et al. 2017), also of several models.

    Args:
        server_template: class of the server; the default is the fabric's own.
        client_template: class of the clients.
        roles: one per client; their number decides.
        config: everything else.
    """

    def __init__(
        self,
        server_template: Any = None,
        client_template: Any = None,
        roles: Sequence[str] = (),
        config: FederationConfig | None = None,
        *,
        server_id: str = SERVER_ID,
        log: Any = None,
        **kw: Any,
    ) -> None:
        schema = _required(config).federated_learning_schema
        config = _shaped(_required(config), schema if schema in WITH_SERVER else TRADITIONAL, "star", len(roles))
        server = VirtualNode(server_template or FederatedNode, server_id, SERVER_ROLE, config, log)
        clients = _clients(client_template or FederatedNode, roles, config, log)
        super().__init__(config, nodes=[server, *clients], topology="star", **kw)


class _PeerSchema(FederatedBase):
    topology_name = ""

    def __init__(
        self,
        client_template: Any = None,
        roles: Sequence[str] = (),
        config: FederationConfig | None = None,
        *,
        log: Any = None,
        **kw: Any,
    ) -> None:
        config = _shaped(_required(config), DECENTRALIZED, self.topology_name, len(roles))
        clients = _clients(client_template or FederatedNode, roles, config, log)
        super().__init__(config, nodes=clients, topology=self.topology_name, **kw)


class RingFederatedLearningSchema(_PeerSchema):
    """Every client mixes with its two neighbours on a ring. Arguments as for the star, without a server."""

    topology_name = "ring"


class MeshFederatedLearningSchema(_PeerSchema):
    """Every client mixes with every other. Arguments as for the star, without a server."""

    topology_name = "mesh"


def _required(config: FederationConfig | None) -> FederationConfig:
    if config is None:
        raise ConfigError("C016", "a schema needs a configuration", place="config", hint="FederationConfig.from_yaml")
    return config


SCHEMAS: Registry[Executor] = Registry("schema")


class SchemaFactory:
    """Finds the executor of a schema: ``schema_factory(schema_type, topology_type, log)(config)``."""

    def __call__(self, schema_type: str, topology_type: str, log: Any = None) -> Executor:
        """The executor for a schema and a topology; it takes a configuration and returns the federation.

        Raises:
            ConfigError: C010 for an unknown schema.
        """
        name = TRADITIONAL if schema_type == "StarFederatedLearning" else schema_type
        executor = SCHEMAS.get(name)
        (log or logging.getLogger("icrf")).info("schema %s on %s", name, topology_type)

        def execute(config: FederationConfig, **keywords: Any) -> FederatedBase:
            wanted = {"federated_learning_schema": name, "federated_learning_topology": topology_type}
            return executor(changed(config, **wanted), **keywords)

        return execute

    def register(self, name: str, executor: Executor) -> None:
        """Add a schema of one's own: `executor(config, **keywords)` returns the federation."""
        SCHEMAS.add(name, executor)


def _built_in(config: FederationConfig, **keywords: Any) -> FederatedBase:
    return FederatedBase(config, **keywords)


schema_factory = SchemaFactory()
schema_factory.register(TRADITIONAL, _built_in)
schema_factory.register(CLUSTERED, _built_in)
schema_factory.register(DECENTRALIZED, _built_in)
schema_factory.register(HIERARCHICAL, _built_in)
