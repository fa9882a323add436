"""An installed package adds names to configurations without a change of ours: the one of docs/examples/plugin."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from icrf.client import Fabric
from icrf.errors import ConfigErrors
from icrf.protocol import COMPLETED
from icrf.spec import FederationConfig, load_config
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric

PLUGIN = Path(__file__).resolve().parents[2] / "docs" / "examples" / "plugin"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as an installer lays it down: its module, and the metadata that name the entry points."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    shutil.copy(PLUGIN / "icrf_wine.py", tmp_path)
    metadata = tmp_path / f"icrf_wine-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in p.items()) for group, p in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "icrf_wine", raising=False)
    return tmp_path


def test_its_names_work_in_a_configuration_with_equal_bits_on_any_number_of_clusters(installed: Path) -> None:
    config = load_config(PLUGIN / "wine.yaml", environment={})
    found = {}
    for clusters in (1, 3):
        with InlineFabric(clusters) as inline:
            found[clusters] = Fabric(inline.port).submit(build_submission(config)).result()
    assert found[1].info.status == found[3].info.status == COMPLETED
    assert found[1].model_sha256 == found[3].model_sha256
    assert found[1].metrics["accuracy"] >= 0.95
    assert found[1].metrics["brier"] < 0.2 and 0.9 < found[1].metrics["macro_f1"] <= 1
    assert found[1].info.config_json.count("wheel") == 1


RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}


class Untidy:
    """A split and a metric that draw from NumPy's global generator."""

    @staticmethod
    def split(labels: np.ndarray, num_parts: int) -> np.ndarray:
        return np.random.permutation(len(labels)) % num_parts

    @staticmethod
    def luck(scores: np.ndarray, labels: np.ndarray) -> float:
        return float(np.random.rand())


def test_a_split_and_a_metric_that_draw_from_global_generators_are_the_same_everywhere() -> None:
    names = {"data_distribution_kind": f"{__name__}:Untidy.split", "metrics": [f"{__name__}:Untidy.luck"]}
    more = {"federation_id": "untidy", "number_of_clients": 4, "federated_learning_rounds": 2}
    config = FederationConfig.from_mapping({**more, **names, **RING})
    found = {}
    for clusters in (1, 3):
        with InlineFabric(clusters) as inline:
            found[clusters] = Fabric(inline.port).submit(build_submission(config)).result()
    assert found[1].info.status == found[3].info.status == COMPLETED
    assert found[1].model_sha256 == found[3].model_sha256
    assert found[1].metrics["luck"] == found[3].metrics["luck"]


def test_nothing_of_it_is_imported_before_it_is_needed(installed: Path) -> None:
    load_config(PLUGIN / "wine.yaml", environment={})
    assert "icrf_wine" not in sys.modules


def test_without_the_package_each_name_is_explained_with_the_nearest() -> None:
    with pytest.raises(ConfigErrors) as caught:
        load_config(PLUGIN / "wine.yaml", environment={})
    places = [error.place.rpartition(" ")[2] for error in caught.value.errors]
    assert {error.code for error in caught.value.errors} == {"C010"} and len(places) == 5
    assert any("install the package first" in error.hint for error in caught.value.errors)


def test_names_of_the_package_are_among_the_suggestions(installed: Path) -> None:
    with pytest.raises(ConfigErrors, match="Did you mean 'wheel'") as caught:
        FederationConfig.from_yaml(_with(installed, "federated_learning_topology: wheel", "whel"))
    assert len(caught.value.errors) == 1


def _with(folder: Path, line: str, value: str) -> Path:
    path = folder / "other.yaml"
    path.write_text((PLUGIN / "wine.yaml").read_text().replace(line, f"{line.partition(':')[0]}: {value}"))
    return path
