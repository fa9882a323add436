"""Types of the configuration's fields: what a value must be by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

from icrf.registry import did_you_mean, is_import_path
from icrf.spec.complaints import invalid
from icrf.spec.problems import describe

ROLES = ("train", "eval", "test", "aggregate")
MAX_COUNT = 1_000_000
MAX_TEXT = 4096
MAX_WIDTH = 4096
CLUSTER_NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
UNION_TAGS = frozenset({"name", "slot"})
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
_FEDERATION_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _plain_text(value: str) -> str:
    if not value.isprintable():
        raise invalid("C007", f"{value[:80]!r} has characters that cannot be printed")
    if len(value) > MAX_TEXT:
        raise invalid("C007", f"{len(value)} characters", allowed=f"up to {MAX_TEXT}")
    return value


def _federation_id(value: str) -> str:
    if not re.fullmatch(_FEDERATION_ID, value):
        raise invalid(
            "C007",
            f"'{value[:200]}' cannot name a federation",
            allowed="1 to 128 letters, digits, '.', '_' or '-', the first a letter or a digit",
        )
    return value


def _client_role(value: str) -> str:
    parts = value.split("-")
    for part in parts:
        if part not in ROLES:
            raise invalid("C010", f"role '{part}' unknown", ", ".join(ROLES), did_you_mean(part, ROLES))
        if parts.count(part) > 1:
            raise invalid("C008", f"role '{part}' twice in '{value}'")
    return value


def _template(value: str) -> str:
    if not is_import_path(value):
        raise invalid("C006", f"'{value}' is no import path", allowed="module:attr or null")
    return value


def _placement(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise invalid("C006", f"expected a mapping from node to cluster, got {describe(value)}", "{node: cluster}")
    return {_node_id(node): _target(node, target) for node, target in value.items()}


def _node_id(node: Any) -> str:
    if not isinstance(node, str) or not node or not node.isprintable():
        raise invalid("C006", f"expected a node id, got {describe(node)}", allowed="e.g. client_0")
    return node


def _target(node: str, target: Any) -> str | dict[str, str]:
    """A cluster's name, or labels that the cluster must carry."""
    target = _number_as_text(target)
    if isinstance(target, str):
        if not re.fullmatch(CLUSTER_NAME, target):
            raise invalid("C013", f"{node}: bad cluster name '{target[:80]}'", allowed=CLUSTER_NAME)
        return target
    labels = {k: _number_as_text(v) for k, v in target.items()} if isinstance(target, Mapping) else {}
    if labels and all(
        isinstance(part, str) and part and part.isprintable() for pair in labels.items() for part in pair
    ):
        return labels
    raise invalid("C006", f"{node}: expected a cluster, got {describe(target)}", "a name or {label: value}")


def _names(value: Any) -> Any:
    """A list; on the command line and in the environment its items stand between commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _deadline(value: Any) -> Any:
    return DEFAULT_ROUND_DEADLINE_S if value is None else value


DEFAULT_ROUND_DEADLINE_S = 600.0


class SlotResources(BaseModel):
    """What one slot, a bundle of a placement group, takes of its cluster."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    num_cpus: Annotated[float, Field(gt=0, le=4096)] = 1.0
    """CPU cores, as Ray counts them; a fraction lets several slots share a core."""
    num_gpus: Annotated[float, Field(ge=0, le=1024)] = 0.0
    """GPUs, as Ray counts them."""


class NodeNeeds(BaseModel):
    """What a node needs of the slot that it is placed on."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    num_cpus: Annotated[float, Field(ge=0, le=4096)] = 0.0
    """CPU cores of the slot."""
    num_gpus: Annotated[float, Field(ge=0, le=1024)] = 0.0
    """GPUs of the slot; a fraction is a part of one."""
    memory_mb: CountOrZero = 0
    """Megabytes: the slot's equal share of the cluster's memory."""


def _node_needs(value: Any) -> Any:
    allowed = "{client_3: {num_gpus: 1}}"
    if not isinstance(value, Mapping):
        raise invalid("C006", f"expected a mapping from node to needs, got {describe(value)}", allowed)
    for node, needs in value.items():
        if not isinstance(needs, Mapping | NodeNeeds):
            raise invalid("C006", f"{_node_id(node)}: expected what it needs, got {describe(needs)}", allowed)
    return {_node_id(node): needs for node, needs in value.items()}


def _resources(value: Any) -> Any:
    if value == "uniform" or isinstance(value, Mapping | SlotResources):
        return value
    raise invalid("C006", f"expected resources, got {describe(value)}", "uniform, or {num_cpus: 1, num_gpus: 0}")


def _resource_form(value: Any) -> str:
    return "name" if value == "uniform" else "slot"


def _width(value: Any) -> Any:
    if value in ("off", "auto"):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if 2 <= value <= MAX_WIDTH:
            return value
        raise invalid("C007", f"{value} not in [2, {MAX_WIDTH}]", "off, auto, or a number of nodes from 2")
    raise invalid("C006", f"expected a width, got {describe(value)}", "off, auto, or a number of nodes from 2")


Text = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_plain_text)]
Names = Annotated[list[Text], BeforeValidator(_names)]
FederationId = Annotated[Text, AfterValidator(_federation_id)]
ClientRole = Annotated[Text, AfterValidator(_client_role)]
Template = Annotated[Text, AfterValidator(_template)]
Placement = Annotated[dict[str, str | dict[str, str]], BeforeValidator(_placement)]
NeedsByNode = Annotated[dict[str, NodeNeeds], BeforeValidator(_node_needs)]
SlotShare = Annotated[
    Annotated[Literal["uniform"], Tag("name")] | Annotated[SlotResources, Tag("slot")],
    Discriminator(_resource_form),
    BeforeValidator(_resources),
]
_MAX_DEADLINE_S = 30 * 86400
_DEADLINE = {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_DEADLINE_S}
Deadline = Annotated[
    float,
    Field(gt=0, le=_MAX_DEADLINE_S),
    BeforeValidator(_deadline),
    WithJsonSchema({"anyOf": [_DEADLINE, {"type": "null"}]}),
]
Width = Annotated[Literal["off"] | Literal["auto"] | Annotated[int, Field(ge=2, le=MAX_WIDTH)], BeforeValidator(_width)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Nodes = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(gt=0, le=1)]
