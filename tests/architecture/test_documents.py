"""What the documents say is there: files behind links, names in the code, commands with their flags."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import icrf.cli
import icrf_agent.cli
import icrf_mediator.cli
from icrf.errors import ConfigErrors
from icrf.spec import FederationConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])
APPS = {"fabric": icrf.cli.app, "fabric-agent": icrf_agent.cli.app, "fabric-mediator": icrf_mediator.cli.app}

LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
YAML = re.compile(r"```ya?ml\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
JOURNEY = ROOT / "docs" / "journey.md"
TIME_OUTS = re.compile(r"^\| (\d.*) \|$", re.MULTILINE)
COMMAND = re.compile(r"^(?:docker .* exec \w+ )?(fabric|fabric-agent|fabric-mediator) ([^#\n]+)", re.MULTILINE)


def links(page: Path) -> list[tuple[str, Path]]:
    """(text, target) of all links to files of this repository."""
    found = LINK.findall(page.read_text(encoding="utf-8"))
    return [(text, page.parent / to.partition("#")[0]) for text, to in found if "://" not in to and to[0] != "#"]


def names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What the statements of a module or a class define."""
    found: dict[str, ast.stmt] = {}
    for item in body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[item.name] = item
        for target in getattr(item, "targets", [getattr(item, "target", None)]):
            found |= {part.id: item for part in ast.walk(target) if isinstance(part, ast.Name)} if target else {}
    return found


def defines(path: Path, dotted: str) -> bool:
    """Whether the file defines ``name`` or ``Class.name``."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in dotted.split("."):
        item = names(body).get(part)
        if item is None:
            return False
        body = getattr(item, "body", [])
    return True


def seconds(path: Path, dotted: str) -> float | None:
    """The number of seconds, or what is counted, that a name of a file stands for; None for another kind of value."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in dotted.split("."):
        item = names(body)[part]
        body = getattr(item, "body", [])
    value = getattr(item, "value", None)
    return value.value if isinstance(value, ast.Constant) else None


def commands(page: Path) -> list[str]:
    """The commands of the fabric in the shell blocks of a page."""
    blocks = SHELL.findall(page.read_text(encoding="utf-8"))
    return [f"{name} {rest.strip()}" for block in blocks for name, rest in COMMAND.findall(block)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(page: Path) -> None:
    missing = [str(target) for _, target in links(page) if not target.exists()]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_linked_name_is_defined_where_the_link_leads(page: Path) -> None:
    named = [(text.strip("`"), to) for text, to in links(page) if text[0] == "`" and to.suffix == ".py"]
    wrong = [f"{name} is not in {to}" for name, to in named if name != to.name and not defines(to, name)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("row", TIME_OUTS.findall(JOURNEY.read_text(encoding="utf-8")))
def test_a_time_out_is_as_long_as_the_journey_says(row: str) -> None:
    """The constants that a row of the table links to have the numbers of its first cell, in their order."""
    shown, _, where = row.split(" | ")
    numbers = [float(number.replace(",", "")) for number in re.findall(r"[\d.,]*\d", shown)]
    values = [seconds(JOURNEY.parent / to, name.strip("`")) for name, to in LINK.findall(where) if to.endswith(".py")]
    if None not in values:
        assert all(number == value for number, value in zip(numbers, values, strict=False))


@pytest.mark.parametrize("text", sorted({text for page in PAGES for text in YAML.findall(page.read_text("utf-8"))}))
def test_an_excerpt_of_a_configuration_is_one_with_a_server_or_among_peers(text: str) -> None:
    excerpt = yaml.safe_load(text)
    if excerpt.keys().isdisjoint(FederationConfig.model_fields):
        return  # of another program
    if "schema" in excerpt:
        excerpt["federated_learning_schema"] = excerpt.pop("schema")
    kinds = [("TraditionalFederatedLearning", "star"), ("DecentralizedFederatedLearning", "ring")]
    complaints = []
    for schema, topology in kinds:
        usual = {"federated_learning_schema": schema, "federated_learning_topology": topology}
        try:
            FederationConfig.from_mapping({"federation_id": "x", "number_of_clients": 100, **usual, **excerpt})
        except ConfigErrors as refused:
            complaints.append(str(refused))
    assert len(complaints) < len(kinds), complaints


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page)}))
def test_a_command_takes_what_the_documents_give_it(line: str) -> None:
    name, *arguments = shlex.split(line)
    command = typer.main.get_command(APPS[name])
    while hasattr(command, "get_command"):
        with command.make_context(name, list(arguments), resilient_parsing=True) as context:
            command, arguments = command.get_command(context, arguments[0]), arguments[1:]
        assert command is not None, line
    with command.make_context(name, arguments):
        pass


def test_the_tests_look_at_something() -> None:
    assert len([text for text, _ in links(JOURNEY) if text[0] == "`"]) > 100
    assert len(TIME_OUTS.findall(JOURNEY.read_text(encoding="utf-8"))) > 30
    assert len(commands(ROOT / "README.md")) > 5
    assert not defines(ROOT / "fabric" / "icrf" / "errors.py", "IcrfError.no_such_name")
