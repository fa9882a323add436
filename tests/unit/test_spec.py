"""Configurations are read strictly; whatever is wrong is named with its place, all of it at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from icrf.errors import ConfigError, ConfigErrors
from icrf.registry import Registry
from icrf.spec import FederationConfig, SlotResources, explain_sources, load_config
from icrf.spec.choices import CHOICES

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


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("name", ["star", "ring", "mesh", "custom"])
def test_examples_are_valid(name: str) -> None:
    config = load_config(EXAMPLES / f"digits-{name}.yaml", environment={})
    assert config.federated_learning_topology == name


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, HEAD)
    assert (config.number_of_clients, config.client_fraction, config.federated_learning_rounds) == (10, 1.0, 10)
    assert (config.number_of_epochs, config.batch_size, config.learning_rate, config.seed) == (1, 16, 0.05, 0)
    assert (config.on_cluster_loss, config.round_deadline_s, config.resources) == ("wait", 600.0, "uniform")
    assert config.checkpoint_every == 10
    assert config.min_nodes is None
    assert config.placement == {}


def test_every_key_says_what_it_is() -> None:
    for key, field in FederationConfig.model_fields.items():
        assert field.description, key
    assert set(FederationConfig.model_json_schema()["required"]) == {
        "federation_id",
        "federated_learning_schema",
        "federated_learning_topology",
    }


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("number_of_epochs: 0", "number_of_epochs", 0),
        ("number_of_clients: 0x10", "number_of_clients", 16),
        ("shuffle: False", "shuffle", False),
        ("round_deadline_s: null", "round_deadline_s", 600.0),
        ("round_deadline_s:", "round_deadline_s", 600.0),
        ("target_accuracy: ~", "target_accuracy", None),
        ("target_accuracy: 0.9", "target_accuracy", 0.9),
        ("seed: &s 7", "seed", 7),
        ("optimizer: AdamW", "optimizer", "AdamW"),
        ("dataset_type: my.data:load", "dataset_type", "my.data:load"),
        ("client_role: train-eval", "client_role", "train-eval"),
        ("client_template: my.nodes:Node", "client_template", "my.nodes:Node"),
        ("resources: {num_cpus: 0.5}", "resources", SlotResources(num_cpus=0.5, num_gpus=0.0)),
        (
            "placement: {client_0: us-east, client_1: {zone: 1}}",
            "placement",
            {"client_0": "us-east", "client_1": {"zone": "1"}},
        ),
        ("data_dir: off", "data_dir", "off"),
        ("checkpoint_every: 0", "checkpoint_every", 0),
        ("checkpoint_every: 1000000", "checkpoint_every", 1_000_000),
        ("on_cluster_loss: wait", "on_cluster_loss", "wait"),
        ("on_cluster_loss: reassign", "on_cluster_loss", "reassign"),
        ("clustering_period: 2", "clustering_period", 2),
        ("on_cluster_loss: fail", "on_cluster_loss", "fail"),
    ],
)
def test_values(tmp_path: Path, line: str, key: str, value: Any) -> None:
    found = getattr(load(tmp_path, HEAD + line), key)
    if key == "data_dir":
        value = str(tmp_path / value)
    assert found == value
    assert type(found) is type(value)


def test_numbers_are_fine_where_text_is_wanted(tmp_path: Path) -> None:
    for written in ("20", '"20"'):
        assert load(tmp_path, HEAD + f"data_distribution_kind: {written}").data_distribution_kind == "20"
    assert load(tmp_path, HEAD.replace("fed\n", "2024\n", 1)).federation_id == "2024"


def test_the_short_name_of_star_learning_is_the_same_schema() -> None:
    config = FederationConfig.from_mapping({**STAR, "schema": "StarFederatedLearning"})
    assert config == FederationConfig.from_mapping(STAR)


def test_bom_and_crlf_are_fine(tmp_path: Path) -> None:
    (tmp_path / "fed.yaml").write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode())
    assert load_config(tmp_path / "fed.yaml").federation_id == "fed"


# ---------------------------------------------------------------- layers


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    text = HEAD + "seed: 1\nbatch_size: 2\nnumber_of_clients: 3\n"
    overrides = ("seed=4", "seed=5", "schema=StarFederatedLearning")
    environment = {"ICRF_SEED": "6", "ICRF_BATCH_SIZE": "7", "ICRF_MEDIATOR": "127.0.0.1:7443"}
    config = load(tmp_path, text, *overrides, **environment)
    assert (config.seed, config.batch_size, config.number_of_clients) == (5, 7, 3)
    sources = explain_sources(tmp_path / "fed.yaml", overrides, environment=environment)
    assert sources["seed"] == sources["federated_learning_schema"] == "-o"
    assert sources["batch_size"] == "ICRF_BATCH_SIZE"
    assert sources["number_of_clients"] == "fed.yaml:6"
    assert sources["device"] == "default"
    assert set(sources) == set(FederationConfig.model_fields)


def test_the_process_environment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fed.yaml").write_text(HEAD)
    monkeypatch.setenv("ICRF_SEED", "11")
    assert load_config(tmp_path / "fed.yaml").seed == FederationConfig.from_yaml(tmp_path / "fed.yaml").seed == 11


def test_errors_of_flags_and_variables_name_them(tmp_path: Path) -> None:
    assert only_error(tmp_path, HEAD, "seed=-1").startswith("C007 -o seed=-1: seed: -1 not in [0, ")
    assert (
        only_error(tmp_path, HEAD, "sede=1")
        == "C005 -o sede=1: unknown key 'sede'; did you mean 'seed' or 'edge_probability'?"
    )
    assert only_error(tmp_path, HEAD, "seed").startswith("C001 -o seed: not of the form key=value")
    assert only_error(tmp_path, HEAD, "seed=[").startswith("C001 -o seed=[: ")
    assert only_error(tmp_path, HEAD, ICRF_SEED="ten").startswith("C006 ICRF_SEED: seed: expected an integer")
    assert only_error(tmp_path, HEAD, ICRF_SEED="!!int 3").startswith("C002 ICRF_SEED: tag '!!int' not allowed")


def test_a_flag_mends_a_wrong_value_of_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, HEAD + "seed: ten", "seed=3").seed == 3


def test_files_are_relative_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "ring.csv").write_text("0,1\n1,0\n")
    monkeypatch.chdir(tmp_path)
    (folder / "fed.yaml").write_text(HEAD + "data_dir: ../data\n")
    overrides = ["schema=DecentralizedFederatedLearning", "federated_learning_topology=custom"]
    config = load_config("a/fed.yaml", [*overrides, "adjacency_matrix_file_name=ring.csv"])
    assert config.data_dir == str(tmp_path / "data")
    assert config.adjacency_matrix_file_name == str(folder / "ring.csv")
    assert FederationConfig.from_mapping({**STAR, "data_dir": "d"}, base_dir=folder).data_dir == str(folder / "d")
    with pytest.raises(ConfigErrors, match=r"C015 -o adjacency_matrix_file_name=no.csv: .*no such file 'no.csv'"):
        load_config("a/fed.yaml", [*overrides, "adjacency_matrix_file_name=no.csv"])


# ---------------------------------------------------------------- what is refused, by document


def test_syntax_errors_name_line_and_column(tmp_path: Path) -> None:
    assert only_error(tmp_path, HEAD + "seed: 1: 2\n").startswith("C001 fed.yaml:4:8: mapping values are not allowed")
    assert only_error(tmp_path, HEAD + "seed: *x\n").startswith("C001 fed.yaml:4:7: alias '*x' is not defined")
    assert only_error(tmp_path, HEAD + "seed: &x [*x]\n").startswith("C001 fed.yaml:4:11: alias '*x' contains itself")
    assert only_error(tmp_path, HEAD + "---\nseed: 1\n").startswith("C001 fed.yaml:4:1: a second document")
    assert only_error(tmp_path, HEAD + "seed: \x07\n").startswith("C001 fed.yaml:4")


def test_other_bytes_are_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "fed.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigErrors, match=r"C001 fed.yaml: not UTF-8 at byte 0"):
        load_config(tmp_path / "fed.yaml")
    assert only_error(tmp_path, "- a\n- b\n").startswith("C006 fed.yaml:1: expected keys and values, got a list")
    assert [e[:4] for e in errors(tmp_path, "")] == ["C016"] * 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"C015 .*none.yaml: .*No such file") as caught:
        load_config(tmp_path / "none.yaml")
    assert caught.value.exit_code == 78
    with pytest.raises(ConfigErrors, match=r"C015 .*is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigErrors, match="C015"):
        load_config("a\0b")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!str 3", "!x 3", "! 3", "!<tag:x,2:y> {}", "!!binary aGk="]
)
def test_tags_are_refused(tmp_path: Path, tag: str) -> None:
    error = only_error(tmp_path, HEAD + f"seed: {tag}\n")
    assert error.startswith("C002 fed.yaml:4: tag '!") or error.startswith("C002 fed.yaml:4: tag 'tag:x")


def bomb(levels: int, width: int = 9) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        bomb(9),
        bomb(18, 2),
        bomb(30, 1),
        "a: " + "[" * 100_000,
        "a: " + "{b: " * 25 + "}" * 25,
        "- " * 5000,
        "# " + "x" * 1_000_001,
        "[" + "1," * 400_000 + "]",
        "? " * 1000,
    ],
    ids=["aliases", "deep aliases", "chain", "lists", "mappings", "indents", "size", "many values", "keys"],
)
def test_bombs_are_refused_at_once(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    error = only_error(tmp_path, text)
    assert error.startswith("C003 fed.yaml:")
    assert time.process_time() - started < 5  # far above what it takes; expansion would take hours


def test_aliases_within_bounds_are_fine(tmp_path: Path) -> None:
    config = load(tmp_path, HEAD + "placement:\n  client_0: &where {zone: eu}\n  client_1: *where\n")
    assert config.placement == {"client_0": {"zone": "eu"}, "client_1": {"zone": "eu"}}


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    assert only_error(tmp_path, HEAD + "seed: 1\nseed: 1\n").startswith(
        "C004 fed.yaml:5: duplicate key 'seed' (lines 4, 5)"
    )
    nested = "placement:\n  client_0: eu\n  'client_0': us\n"
    assert "duplicate key 'client_0' (lines 5, 6)" in only_error(tmp_path, HEAD + nested)
    assert "'schema' is 'federated_learning_schema' (lines 2, 4)" in only_error(
        tmp_path, HEAD + "federated_learning_schema: TraditionalFederatedLearning\n"
    )
    with pytest.raises(ConfigErrors, match="C004 request: duplicate key"):
        FederationConfig.from_mapping({**STAR, "federated_learning_schema": STAR["schema"]}, source="request")


def test_unknown_keys(tmp_path: Path) -> None:
    assert only_error(tmp_path, HEAD + "sed: 1") == "C005 fed.yaml:4: unknown key 'sed'; did you mean 'seed'?"
    assert "'federated_learning_rounds'" in only_error(tmp_path, HEAD + "rounds: 1")
    assert "'federated_learning_rounds'" in only_error(tmp_path, HEAD + "round: 1")
    assert "'resources.cpus'; did you mean 'num_cpus'" in only_error(tmp_path, HEAD + "resources: {cpus: 1}")
    assert "unknown key '<<'" in only_error(tmp_path, HEAD + "<<: {seed: 1}")
    assert only_error(tmp_path, HEAD + "1: 2").startswith("C006 fed.yaml:4: key 1 is no string")


def test_peers_need_all_of_their_neighbours(tmp_path: Path) -> None:
    peers = HEAD.replace("TraditionalFederatedLearning", "DecentralizedFederatedLearning").replace("star", "ring")
    error = only_error(tmp_path, peers + "min_nodes: 9")
    assert error.startswith("C012 fed.yaml:4: min_nodes: 9 is not built yet")


# ---------------------------------------------------------------- what is refused, by value


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            "federated_learning_rounds: ten",
            "C006 # federated_learning_rounds: expected an integer in [1, 1000000], got string 'ten'",
        ),
        ('federated_learning_rounds: "3"', "got string '3'. Write the number without quotes or leading zeros."),
        ("federated_learning_rounds: 1e3", "got number 1000.0. Write 1000 without point or exponent."),
        ("federated_learning_rounds: 10.0", "C006 #"),
        ("federated_learning_rounds: 010", "C006 #"),
        ("federated_learning_rounds: 0b1", "C006 #"),
        ("federated_learning_rounds: 1_000", "C006 #"),
        ("federated_learning_rounds: 1:30", "C006 #"),
        (
            "federated_learning_rounds: true",
            "C006 # federated_learning_rounds: expected an integer in [1, 1000000], got true",
        ),
        ("federated_learning_rounds:", "got null"),
        ("federated_learning_rounds: [1]", "got a list"),
        ("federated_learning_rounds: 0", "C007 # federated_learning_rounds: 0 not in [1, 1000000]"),
        ("federated_learning_rounds: -1", "C007 # federated_learning_rounds: -1 not in [1, 1000000]"),
        ("federated_learning_rounds: 1000000000000", "C007 # federated_learning_rounds: 1000000000000 not in"),
        (f"federated_learning_rounds: {'9' * 290}", "C007 # federated_learning_rounds: about 2^"),
        (f"federated_learning_rounds: {'9' * 9000}", "C006 #"),
        (
            "shuffle: off",
            "C006 # shuffle: expected true or false, got string 'off'. In YAML 1.2 'off' is a string; write false.",
        ),
        ("shuffle: 1", "C006 # shuffle: expected true or false, got number 1"),
        ("device: true", "C006 # device: expected text, got true"),
        ("device: 1.5", "C006 # device: expected text, got number 1.5"),
        ("learning_rate: .nan", "C009 # learning_rate: must be finite, got number nan"),
        ("learning_rate: -.inf", "C009 # learning_rate: must be finite, got number -inf"),
        ("learning_rate: 1e999", "C009 # learning_rate: must be finite, got number inf"),
        ("learning_rate: -0.1", "C007 # learning_rate: -0.1 not in [0, 1000000.0]"),
        ("target_accuracy: 0", "C007 # target_accuracy: 0 not in (0, 1]"),
        ("target_accuracy: x", "C006 # target_accuracy: expected a number in (0, 1] or null, got string 'x'"),
        ("checkpoint_every: -1", "C007 # checkpoint_every: -1 not in [0, 1000000]"),
        ("momentum: 1", "C007 # momentum: 1 not in [0, 1)"),
        ("seed: 9223372036854775808", "C007 # seed: 9223372036854775808 not in [0, 9223372036854775808)"),
        ("number_of_clients: 8\nmin_nodes: 9", "C008 fed.yaml:5: min_nodes 9 > 8 nodes"),
        ("client_fraction: 0.5\nmin_nodes: 6", "C008 fed.yaml:5: min_nodes 6 > 5 that take part in a round"),
        ("client_fraction: 0.5\nsampled_clients: 6", "C008 fed.yaml:5: sampled_clients 6 contradicts client_fraction"),
        ("sampled_clients: 11", "C008 # sampled_clients 11 > 10 nodes"),
        (
            "min_nodes: 2\nlate_updates: weigh\nclustering_period: 5",
            "C008 fed.yaml:5: late_updates 'weigh' contradicts clustering_period",
        ),
        (
            "min_nodes: 2\nlate_updates: weigh\non_cluster_loss: reassign",
            "C008 fed.yaml:5: late_updates 'weigh' contradicts on_cluster_loss 'reassign'",
        ),
        ("on_cluster_loss: exclude", "C008 # on_cluster_loss 'exclude' contradicts min_nodes null"),
        ("optimizer: Adam\nmomentum: 0.9", "C008 fed.yaml:5: momentum 0.9 contradicts optimizer Adam"),
        ("optimizer: Rprop\nweight_decay: 0.1", "C008 fed.yaml:5: weight_decay 0.1 contradicts optimizer Rprop"),
        ("client_role: eval", "C008 # client_role 'eval' leaves no node that trains"),
        ("client_role: train-train", "C008 # client_role: role 'train' twice"),
        (
            "client_role: train-evla",
            "C010 # client_role: role 'evla' unknown; allowed: train, eval, test, aggregate. Did you mean 'eval'?",
        ),
        ("client_template: nodes.py", "C006 # client_template: 'nodes.py' is no import path"),
        ("resources: lots", "C006 # resources: expected resources, got string 'lots'"),
        ("resources: {num_cpus: 0}", "C007 # resources.num_cpus: 0 not in (0, 4096]"),
        ("resources:\n  num_cpus: 1\n  num_gpus: .nan", "C009 fed.yaml:6: resources.num_gpus: must be finite"),
        ("placement: eu", "C006 # placement: expected a mapping from node to cluster, got string 'eu'"),
        ("placement: {client_0: [eu]}", "C006 # placement: client_0: expected a cluster, got a list"),
        ("placement: {client_0: {}}", "C006 # placement: client_0"),
        ("placement: {client_0: ../x}", "C013 # placement: client_0: bad cluster name '../x'"),
        ("placement: {client_0: ''}", "C013 #"),
        ("placement: {client_0: Eu}", "C013 #"),
        (f"placement: {{client_0: {'a' * 300}}}", "C013 #"),
        ("placement: {client_0: \u0435u}", "C013 #"),
        ('data_dir: "a\\0b"', "C007 # data_dir: 'a\\x00b' has characters that cannot be printed"),
        (f"data_dir: {'a' * 5000}", "C007 #"),
    ],
)
def test_refused_values(tmp_path: Path, line: str, error: str) -> None:
    assert error.replace("#", "fed.yaml:4:", 1) in only_error(tmp_path, HEAD + line)


@pytest.mark.parametrize("name", ["''", "'a b'", "../x", "-a", "a/b", "'a\\nb'", "a" * 129, "é"])
def test_federation_ids_are_safe_names(tmp_path: Path, name: str) -> None:
    assert only_error(tmp_path, HEAD.replace(" fed", f" {name}", 1)).startswith("C007 fed.yaml:1: federation_id: ")


@pytest.mark.parametrize(
    "line",
    [
        "model_type: lstm",
        "dataset_type: text",
        "optimizer: LBFGS",
        "aggregation_strategy: FedBuff",
        "topology_adaptation_strategy: random",
        "store_node_models: true",
        "inter_cluster_codec: int8",
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(tmp_path: Path, line: str) -> None:
    key, _, value = line.partition(": ")
    error = only_error(tmp_path, HEAD + line)
    assert error.startswith(f"C012 fed.yaml:4: {key}: ")
    assert value in error
    assert "is not built yet; allowed: " in error


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    error = only_error(tmp_path, HEAD + "aggregation_strategy: fedavgg")
    assert error.startswith("C010 fed.yaml:4: aggregation_strategy: 'fedavgg' unknown; allowed: FedAvg, FedProx, ")
    assert error.endswith("a registered name, module:attr. Did you mean 'FedAvg' or 'FedAvgM'?")
    assert "Did you mean 'SGD'?" in only_error(tmp_path, HEAD + "optimizer: sgd")


@pytest.mark.parametrize(
    ("key", "value"), [("aggregation_strategy", "Krum"), ("aggregation_strategy", "mine:Rule"), ("clip_norm", 0.5)]
)
def test_what_only_a_server_does_is_refused_among_peers(key: str, value: object) -> None:
    keys = {"federation_id": "x", "schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
    with pytest.raises(ConfigErrors) as caught:
        FederationConfig.from_mapping({**keys, key: value})
    (error,) = caught.value.errors
    assert (error.code, error.allowed) == ("C008", "null" if key == "clip_norm" else "FedAvg")
    assert f"{key} {value} contradicts federated_learning_schema Decentralized" in error.message


@pytest.mark.parametrize(
    ("schema", "topology", "code"),
    [
        ("TraditionalFederatedLearning", "ring", "C008"),
        ("TraditionalFederatedLearning", "my.graphs:torus", "C008"),
        ("TraditionalFederatedLearning", "torus", "C008"),
        ("DecentralizedFederatedLearning", "star", "C008"),
        ("DecentralizedFederatedLearning", "k_connected", "C016"),
        ("DecentralizedFederatedLearning", "exponential", "C008"),
        ("DecentralizedFederatedLearning", "rnig", "C010"),
        ("DecentralizedFederatedLearning", "custom", "C016"),
        ("ClusterFederatedLearning", "star", "C016"),
        ("Federated", "star", "C010"),
    ],
)
def test_schema_and_topology_fit(schema: str, topology: str, code: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        FederationConfig(federation_id="x", federated_learning_schema=schema, federated_learning_topology=topology)
    assert [error.code for error in caught.value.errors] == [code]


def test_the_page_names_every_topology_and_every_mixing_rule() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "topologies.md").read_text(encoding="utf-8")
    for key in ("federated_learning_topology", "mixing"):
        assert all(f"\n| `{name}` | " in page for name in CHOICES[key].built)


@pytest.mark.parametrize(
    ("keys", "codes"),
    [
        ({"directed": True}, ["C008"]),
        ({"directed": True, "mixing": "uniform"}, ["C008"]),
        ({"directed": True, "mixing": "push_sum"}, []),
        ({"directed": True, "mixing": "my.rules:own"}, []),
        ({"federated_learning_topology": "exponential"}, ["C008"]),
        ({"federated_learning_topology": "exponential", "mixing": "push_sum"}, []),
        ({"federated_learning_topology": "random_regular"}, ["C016"]),
        ({"federated_learning_topology": "small_world", "k_value": 4, "rewire_probability": 1.5}, ["C007"]),
        ({"federated_learning_topology": "erdos_renyi", "edge_probability": 0.0}, ["C007"]),
        ({"mixing": "custom"}, ["C016"]),
        ({"mixing": "custom", "mixing_matrix_file_name": "weights.csv"}, []),
        ({"torus_rows": 3, "branching_factor": 4, "allow_no_consensus": True}, []),
    ],
)
def test_topologies_and_mixing_fit(keys: dict[str, object], codes: list[str]) -> None:
    try:
        FederationConfig.from_mapping({**RING, **keys})
        found = []
    except ConfigErrors as caught:
        found = [error.code for error in caught.errors]
    assert found == codes


def test_registered_names_are_accepted() -> None:
    topologies: Registry[object] = Registry("topology")
    with pytest.raises(ConfigErrors, match="C010"):
        FederationConfig.from_mapping({**RING, "federated_learning_topology": "two_stars"})
    topologies.add("two_stars", object)
    for name in ("two_stars", "my.graphs:torus", "mesh"):
        config = FederationConfig.from_mapping({**RING, "federated_learning_topology": name})
        assert config.federated_learning_topology == name


def test_a_decentralized_federation_has_no_server() -> None:
    with pytest.raises(ConfigErrors, match="C008 request: server_template contradicts"):
        FederationConfig.from_mapping({**RING, "server_template": "a:b"}, source="request")


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    text = (
        "federation_id: a b\nschema: TraditionalFederatedLearning\nseed: x\nseed: y\nshufle: true\n"
        "learning_rate: .nan\n"
        "number_of_clients: 2\nmin_nodes: 3\nmodel_type: lstm\noptimizer: Adm\ndata_dir: !!str x\nbatch_size: 0\n"
    )
    found = {tuple(e.split(": ")[0].split(" ", 1)) for e in errors(tmp_path, text, "device=tpu", ICRF_SHUFFLE="no")}
    assert found == {
        ("C007", "fed.yaml:1"),
        ("C016", "fed.yaml"),
        ("C004", "fed.yaml:4"),
        ("C005", "fed.yaml:5"),
        ("C009", "fed.yaml:6"),
        ("C008", "fed.yaml:8"),
        ("C012", "fed.yaml:9"),
        ("C010", "fed.yaml:10"),
        ("C002", "fed.yaml:11"),
        ("C007", "fed.yaml:12"),
        ("C010", "-o device=tpu"),
        ("C006", "ICRF_SHUFFLE"),
    }
