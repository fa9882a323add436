"""Every example of docs/examples and of the README does what its page says, on the fabric without Ray."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import icrf.local
from icrf.client import Fabric
from icrf.protocol import COMPLETED
from icrf.spec import load_config
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
CONFIGURATIONS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
PROGRAMS = ["custom_node.py", "federated_base.py", "plain_script.py", "sdk.py"]
MOST_LINES = 25
LEAST_ACCURACY = {"digits-star.yaml": 0.95}


class InlineHandle(InlineFabric):
    """An inline fabric in the place of an embedded one."""

    takes_classes = True

    @property
    def templates(self) -> dict[str, type]:
        return self._templates

    def node_handle(self, run_id: str, index: int) -> None:
        return None


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory of a program whose embedded fabric is an inline one."""
    monkeypatch.setattr(icrf.local, "open_local", lambda clusters, **_: InlineHandle(clusters))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def program(folder: Path, request: pytest.FixtureRequest) -> Any:
    """An example's module."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / request.param)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)  # and taken off the path again: hosts put the user's folder there
    submission = build_submission(load_config(EXAMPLES / name, environment={}), code_path=str(EXAMPLES))
    with InlineFabric(2) as inline:
        result = Fabric(inline.port).submit(submission).result()
    assert result.info.status == COMPLETED
    assert result.info.accuracy >= LEAST_ACCURACY.get(name, 0.93)


def test_federating_a_script_takes_few_lines_and_none_in_the_script() -> None:
    lines = [
        line for name in ("own_script.py", "own_script.yaml") for line in (EXAMPLES / name).read_text().splitlines()
    ]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= MOST_LINES
    assert "icrf" not in (EXAMPLES / "plain_script.py").read_text()


@pytest.mark.parametrize("program", PROGRAMS, indirect=True)
def test_a_program_runs(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program.main()
    (accuracy,) = re.findall(r"accuracy of the .*: (0\.\d+)", capsys.readouterr().out) or ["1"]
    assert float(accuracy) >= 0.93


def test_the_readme_runs(folder: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    configuration, *_ = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (folder / "digits.yaml").write_text(configuration, encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(programs) == 2
    for number, text in enumerate(programs):
        found: dict[str, Any] = {"__name__": f"readme_{number}"}
        exec(compile(text, f"README.md, program {number}", "exec"), found)
    assert (folder / "model.safetensors").exists()
    assert [model["id"] for model in found["models"]] == ["client_7"]


def test_a_federated_script_has_equal_bits_on_one_and_on_three_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    config = load_config(EXAMPLES / "own_script.yaml", ["federated_learning_rounds=2"], environment={})
    found = set()
    for clusters in (1, 3):
        with InlineFabric(clusters) as inline:
            found.add(Fabric(inline.port).submit(config, code_path=str(EXAMPLES)).result().model_sha256)
    assert len(found) == 1


def test_the_page_names_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in page for name in [*CONFIGURATIONS, *PROGRAMS])
