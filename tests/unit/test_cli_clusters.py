"""``fabric clusters``, against a scripted mediator."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from icrf.cli import Doors, app
from icrf.client import Fabric
from icrf.errors import AgentError, make_error
from icrf.protocol import MeasuredLink
from icrf.testing.scripted import Script, ScriptedMediator

LINKS = (
    MeasuredLink("eu-west", "us-east", 6.25e6, 0.0812, False, 940.0),
    MeasuredLink("us-east", "eu-west", 0.0, 0.0, True, 880.0, make_error("P030", "it cannot be reached").to_json()),
)


def invoke(port: ScriptedMediator, *arguments: str) -> Any:
    doors = Doors(remote=lambda address, tls: port, wall_s=lambda: 1000.0)
    return CliRunner().invoke(app, ["clusters", *arguments], obj=doors)


def test_clusters_and_links_are_shown() -> None:
    result = invoke(ScriptedMediator(Script(links=LINKS)))
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["eu-west", "2/2", "2", "0"] in [line[:4] for line in lines]
    assert ["from", "to", "MB/s", "ms", "way", "measured"] in lines
    assert ["eu-west", "us-east", "6.25", "81.2", "direct", "1", "min", "ago"] in lines
    assert ["us-east", "eu-west", "–", "–", "relayed", "failed", "2", "min", "ago"] in lines
    assert "us-east to eu-west: P030 it cannot be reached" in result.stdout


def test_links_that_nobody_has_measured_are_said_to_be_so() -> None:
    result = invoke(ScriptedMediator())
    assert "fabric clusters --measure" in result.stdout and "MB/s" not in result.stdout
    assert "--measure" not in invoke(ScriptedMediator(Script(clusters=("alone",)))).stdout
    assert "fabric-agent" in invoke(ScriptedMediator(Script(clusters=()))).stdout


@pytest.mark.parametrize("measure", [False, True])
def test_links_are_measured_when_that_is_asked_for(measure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    port, asked = ScriptedMediator(), []
    monkeypatch.setattr(port, "measure_links", lambda: asked.append("measured") or list(LINKS))
    result = invoke(port, "--json", *(["--measure"] if measure else []))
    assert asked == (["measured"] if measure else [])
    found = json.loads(result.stdout.splitlines()[-1])
    assert [cluster["name"] for cluster in found["clusters"]] == ["eu-west", "us-east"]
    assert [link["bytes_per_s"] for link in found["links"]] == ([6.25e6, None] if measure else [])
    assert [link["error"] and link["error"]["code"] for link in found["links"]] == ([None, "P030"] if measure else [])


def test_without_a_second_cluster_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    port = ScriptedMediator()

    def refuse() -> list[MeasuredLink]:
        raise AgentError("A005", "1 cluster(s) connected: there is no link")

    monkeypatch.setattr(port, "measure_links", refuse)
    result = invoke(port, "--measure")
    assert result.exit_code == 69 and "A005" in result.output


def test_the_sdk_has_the_same() -> None:
    with Fabric(ScriptedMediator(Script(links=LINKS))) as fabric:
        assert fabric.links() == fabric.measure_links() == list(LINKS)
