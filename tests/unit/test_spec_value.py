"""A configuration as a value: frozen, checked however it is built, and the same after every round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from icrf.errors import ConfigError, ConfigErrors
from icrf.spec import FederationConfig, load_config
from icrf.spec.documents import dump_yaml, read_yaml

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
HEAD = "federation_id: fed\nschema: TraditionalFederatedLearning\nfederated_learning_topology: star\n"
STAR = {"federation_id": "fed", "schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"federation_id": "fed", "schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}


def load(folder: Path, text: str, *overrides: str, **environment: str) -> FederationConfig:
    path = folder / "fed.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, environment=environment)


def errors(folder: Path, text: str, *overrides: str, **environment: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load(folder, text, *overrides, **environment)
    assert all(isinstance(error, ConfigError) for error in caught.value.errors)
    return [str(error) for error in caught.value.errors]


def only_error(folder: Path, text: str, *overrides: str, **environment: str) -> str:
    (error,) = errors(folder, text, *overrides, **environment)
    return error


def test_it_is_frozen_and_checked_however_it_is_built() -> None:
    config = FederationConfig.from_mapping(STAR)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ConfigErrors, match="C007 seed: -1"):
        FederationConfig.from_mapping({**STAR, "seed": -1}, source="")
    with pytest.raises(ConfigErrors, match="C016"):
        FederationConfig(federation_id="x")  # type: ignore[call-arg]


def test_json_is_canonical_and_complete() -> None:
    config = FederationConfig.from_mapping({**RING, "resources": {"num_gpus": 1}, "placement": {"client_1": "eu"}})
    text = config.to_json()
    assert FederationConfig.from_json(text) == config
    assert FederationConfig.from_json(text).to_json() == text
    assert list(json.loads(text)) == sorted(FederationConfig.model_fields)
    for bad in ("", "{", "[" * 100_000, '{"seed": NaN}', "[]"):
        with pytest.raises(ConfigErrors) as caught:
            FederationConfig.from_json(bad, source="submission")
        assert all(error.place == "submission" for error in caught.value.errors)


def test_errors_survive_the_wire(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(tmp_path, HEAD + "seed: x\nsed: 1")
    assert caught.value.to_dict()["errors"][0]["place"].startswith("fed.yaml:")


@pytest.mark.parametrize("name", ["1e-3", "0o17", "20", "off", "null", "1.5", "010", "0x1f", "1_0", "NaN"])
def test_yaml_round_trip(tmp_path: Path, name: str) -> None:
    config = FederationConfig.from_mapping({**STAR, "federation_id": name, "learning_rate": 1e-5})
    assert load(tmp_path, config.to_yaml()) == config


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


printable = st.text().filter(str.isprintable)
printable_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | printable,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(printable, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(printable, printable_values, max_size=4))
def test_dumped_documents_read_back_unchanged(values: dict[str, Any]) -> None:
    document = read_yaml(dump_yaml(values), "x")
    assert document.value == values
    assert not document.errors


alphabet = st.sampled_from([*"abz01.:-_[]{}&*!|>'\"%@#,? \n\t", "seed", ": ", "\n- ", "\x07", "é", "<<"])


@given(st.lists(alphabet, max_size=60).map("".join) | st.binary(max_size=80))
@settings(max_examples=300)
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    try:
        read_yaml(text, "x")
    except ConfigErrors as refused:
        assert {error.code for error in refused.errors} <= {"C001", "C003"}


@given(st.dictionaries(st.sampled_from([*FederationConfig.model_fields, "schema", "x"]), plain))
@settings(max_examples=300)
def test_any_mapping_is_accepted_or_refused(values: dict[str, Any]) -> None:
    try:
        FederationConfig.from_mapping({**STAR, **values})
    except ConfigErrors as refused:
        assert all(error.code.startswith("C") and error.place for error in refused.errors)


def test_heavy_packages_are_not_imported() -> None:
    code = "import sys, icrf.spec; sys.exit(bool({'torch', 'ray', 'numpy', 'grpc'} & {*sys.modules}))"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0
