"""Code of a user's own that cannot work is refused before anything starts, by the key and the name that he wrote."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from icrf.errors import IcrfError
from icrf.spec import FederationConfig
from icrf.submission import check_configuration

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
GROUPS = {"schema": "HierarchicalFederatedLearning", "federated_learning_topology": "hierarchy", "number_of_groups": 2}


def checked(shape: dict[str, Any], **keys: Any) -> str:
    """The refusal of a configuration, in words."""
    config = {
        "number_of_clients": 4,
        "federated_learning_rounds": 2,
        "federation_id": "x",
        "dataset_type": "digits",
        "model_type": "mlp",
    }
    with pytest.raises(IcrfError) as caught:
        check_configuration(FederationConfig.from_mapping({**config, **shape, **keys}))
    return str(caught.value)


def exits() -> None:
    sys.exit(0)


def asks(round_number: int, ids: list[str], count: int, random_state: Any) -> None:
    sys.exit(0)


def fails() -> None:
    raise RuntimeError("boom")


KEYS = [
    (GROUPS, "group_by"),
    (STAR, "model_type"),
    (RING, "federated_learning_topology"),
    (RING, "mixing"),
    (STAR, "data_distribution_kind"),
    (STAR, "aggregation_strategy"),
]


@pytest.mark.parametrize(("shape", "key"), KEYS)
def test_code_that_raises_or_would_end_the_command_is_named(shape: dict[str, Any], key: str) -> None:
    for name, what in (("exits", "SystemExit: 0"), ("fails", "RuntimeError: boom")):
        found = checked(shape, **{key: f"{__name__}:{name}"})
        assert found.startswith(f"C017 {key}: ") and f"'{__name__}:{name}' raised {what}" in found


def test_a_sampler_that_would_end_the_command_is_named() -> None:
    found = checked(STAR, client_sampler=f"{__name__}:asks")
    assert found == f"C017 client_sampler: sampler '{__name__}:asks' raised SystemExit: 0 for round 1"


@pytest.mark.parametrize(("shape", "key"), [*KEYS, (STAR, "client_sampler"), (STAR, "metrics"), (STAR, "dataset_type")])
def test_code_that_cannot_be_imported_is_named(shape: dict[str, Any], key: str) -> None:
    name = "no_such_module_of_mine:thing"
    assert checked(shape, **{key: [name] if key == "metrics" else name}).startswith(f"C017 {key}: cannot load '{name}'")


@pytest.mark.parametrize(
    ("shape", "key"), [(GROUPS, "group_by"), (RING, "federated_learning_topology"), (RING, "mixing")]
)
def test_what_is_no_function_is_named(shape: dict[str, Any], key: str) -> None:
    assert checked(shape, **{key: "math:pi"}).startswith(f"C017 {key}: ")
