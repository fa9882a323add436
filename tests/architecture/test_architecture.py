"""The shape of the code base as rules over its source; each rule is shown to bite on a bad snippet.

A rule takes a file's path (relative to the root, with slashes) and its text and returns what is wrong with it.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from icrf import errors

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("fabric/icrf", "agent/icrf_agent", "mediator/icrf_mediator")
GENERATED = "/_generated/"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

WIRE = (
    "fabric/icrf/wire/*",
    "agent/icrf_agent/gateway*.py",
    "mediator/icrf_mediator/servicer.py",
    "mediator/icrf_mediator/relay.py",
    "mediator/icrf_mediator/server.py",
)
MEDIATOR_CORE = tuple(
    f"mediator/icrf_mediator/{n}*.py"
    for n in (
        "checkpoints",
        "checks",
        "effects",
        "mediator",
        "membership",
        "moves",
        "placement",
        "rounds",
        "run_",
        "runs",
    )
)
AGENT_CORE = tuple(f"agent/icrf_agent/{n}*.py" for n in ("core", "delivery", "mail", "round_machine", "phase_reports"))
IMPURE = frozenset(
    [
        "grpc",
        "sqlite3",
        "time",
        "asyncio",
        "ray",
        "torch",
        "random",
        "uuid",
        "datetime",
        "secrets",
        "socket",
        "subprocess",
        "threading",
    ]
)
PICKLES = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"})

Rule = Callable[[str, str], list[str]]


# ---------------------------------------------------------------- helpers


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether the path fits one of the shell patterns; ``*`` also spans folders."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported, ``from a import b`` as ``a.b``, also by name at run time."""
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            yield from ((item.lineno, alias.name) for alias in item.names)
        elif isinstance(item, ast.ImportFrom) and item.level == 0:
            yield from ((item.lineno, f"{item.module}.{alias.name}") for alias in item.names)
        elif isinstance(item, ast.Call) and item.args and isinstance(item.args[0], ast.Constant):
            called = item.func.attr if isinstance(item.func, ast.Attribute) else getattr(item.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(item.args[0].value, str):
                yield item.lineno, item.args[0].value


def under(name: str, package: str) -> bool:
    """Whether a dotted name is the package or inside it."""
    return name == package or name.startswith(f"{package}.")


def product_files() -> list[str]:
    """Paths of all hand-written Python files that users install."""
    files = (path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
    return sorted(n for n in (p.relative_to(ROOT).as_posix() for p in files) if GENERATED not in n)


def python_files() -> list[str]:
    """Product, test and benchmark files."""
    others = (p.relative_to(ROOT).as_posix() for folder in ("tests", "scripts") for p in (ROOT / folder).rglob("*.py"))
    return sorted([*product_files(), *others])


def tracked_files() -> list[str]:
    """What the repository holds, or will hold once added; everything on disk where there is no git."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return sorted({n for n in output.split("\0") if n and (ROOT / n).is_file()})
    names = (p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file())
    return sorted(n for n in names if not re.match(r"\.|.*/(__pycache__|\.)", n))


def broken(rule: Rule, files: list[str]) -> list[str]:
    """Everything the rule finds in these files."""
    return [problem for name in files for problem in rule(name, (ROOT / name).read_text(encoding="utf-8"))]


# ---------------------------------------------------------------- rules


def import_direction(path: str, text: str) -> list[str]:
    """icrf <- icrf_agent, icrf_mediator; only icrf/local.py and icrf/testing/ look upward."""
    if path.startswith("agent/"):
        forbidden: tuple[str, ...] = ("icrf_mediator",)
    elif path.startswith("mediator/"):
        forbidden = ("icrf_agent",)
    elif matches(path, ("fabric/icrf/local.py", "fabric/icrf/testing/*")):
        forbidden = ()
    else:
        forbidden = ("icrf_agent", "icrf_mediator")
    found = imported(ast.parse(text))
    return [f"{path}:{line} imports {name}" for line, name in found if any(under(name, f) for f in forbidden)]


def wire_fence(path: str, text: str) -> list[str]:
    """grpc, google.protobuf and generated modules are named behind the wire fence only."""
    if matches(path, WIRE):
        return []
    tree = ast.parse(text)
    problems = [
        f"{path}:{line} imports {name}"
        for line, name in imported(tree)
        if re.match(r"grpc(_\w+)?(\.|$)|google\.protobuf(\.|$)|google$", name) or re.search(r"_pb2(_grpc)?(\.|$)", name)
    ]
    for item in ast.walk(tree):
        name = item.id if isinstance(item, ast.Name) else item.attr if isinstance(item, ast.Attribute) else ""
        if name == "grpc" or re.search(r"_pb2(_grpc)?$", name):
            problems.append(f"{path}:{item.lineno} names {name}")  # type: ignore[attr-defined]
    return problems


def pure_core(path: str, text: str) -> list[str]:
    """The cores decide; they own no clock, no randomness, no I/O and no tensor."""
    if not matches(path, MEDIATOR_CORE + AGENT_CORE):
        return []
    tree = ast.parse(text)
    problems = [f"{path}:{line} imports {name}" for line, name in imported(tree) if name.split(".")[0] in IMPURE]
    calls = (i for i in ast.walk(tree) if isinstance(i, ast.Call) and isinstance(i.func, ast.Name))
    return problems + [f"{path}:{c.lineno} opens a file" for c in calls if c.func.id == "open"]  # type: ignore[attr-defined]


def no_pickle(path: str, text: str) -> list[str]:
    """No pickle crosses a cluster boundary or lands on disk: product code does not know the modules."""
    found = imported(ast.parse(text))
    return [f"{path}:{line} imports {name}" for line, name in found if PICKLES & set(name.split("."))]


def small_rooms(path: str, text: str) -> list[str]:
    """Files below 500 lines, functions of at most 60."""
    lines = text.count("\n")
    problems = [f"{path} has {lines} lines"] if lines >= MAX_FILE_LINES else []
    for item in ast.walk(ast.parse(text)):
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (item.end_lineno or item.lineno) - item.lineno + 1
            if length > MAX_FUNCTION_LINES:
                problems.append(f"{path}:{item.lineno} {item.name} has {length} lines")
    return problems


def no_machine_path(path: str, text: str) -> list[str]:
    """No path of somebody's own machine."""
    pattern = re.compile(r"(?<![\w.$}-])/(?:work|root|home/\w+|Users/\w+)/")
    lines = enumerate(text.splitlines(), 1)
    return [f"{path}:{number} holds {m.group()}" for number, line in lines if (m := pattern.search(line))]


def known_codes(path: str, text: str) -> list[str]:
    """Every error code in a string is one of the catalogue."""
    letters = "".join(sorted({code[0] for code in errors.CATALOGUE}))
    problems = []
    for item in ast.walk(ast.parse(text)):
        if isinstance(item, ast.Constant) and isinstance(item.value, str):
            whole = re.fullmatch(r"[A-Z]\d{3}", item.value)
            found = [item.value] if whole else re.findall(rf"\b[{letters}]\d{{3}}\b", item.value)
            problems += [
                f"{path}:{item.lineno} {code} is not in CATALOGUE" for code in found if code not in errors.CATALOGUE
            ]
    return problems


def no_sleep(path: str, text: str) -> list[str]:
    """Tests wait for what they need (icrf.testing.waiting) and not for time to pass; ``sleep(0)`` lets others go on."""
    return [
        f"{path}:{call.lineno} sleeps"
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call)
        and (called := ast.unparse(call.func)).rpartition(".")[2] == "sleep"
        and not (called == "asyncio.sleep" and ast.unparse(call.args[0]) == "0")
    ]


# ---------------------------------------------------------------- the code base keeps them


@pytest.mark.parametrize(
    "rule", [import_direction, wire_fence, pure_core, no_pickle, known_codes], ids=lambda r: r.__name__
)
def test_product_code_keeps_the_rule(rule: Rule) -> None:
    problems = broken(rule, product_files())
    assert not problems, "\n".join(problems)


def test_tests_do_not_sleep() -> None:
    tests = [name for name in python_files() if name.startswith("tests/")]
    problems = broken(no_sleep, tests)
    assert tests and not problems, "\n".join(problems)


def test_files_and_functions_stay_small() -> None:
    problems = broken(small_rooms, python_files())
    assert not problems, "\n".join(problems)


def test_no_file_names_a_path_of_one_machine() -> None:
    problems = []
    for name in tracked_files():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content[:8192]:
            problems += no_machine_path(name, content.decode("utf-8", "replace"))
    assert not problems, "\n".join(problems)


def test_the_rules_look_at_something() -> None:
    """A renamed folder must not turn a rule into one that holds because it sees nothing."""
    files = product_files()
    for folder in PRODUCT:
        assert any(name.startswith(folder) for name in files)
    assert any(matches(name, MEDIATOR_CORE) for name in files)
    assert any(matches(name, AGENT_CORE) for name in files)
    assert any(matches(name, WIRE) for name in files)


# ---------------------------------------------------------------- the rules bite

SDK = "fabric/icrf/client.py"
CORE = "mediator/icrf_mediator/rounds.py"
BAD = [
    (import_direction, SDK, "from icrf_agent.core import AgentCore"),
    (import_direction, SDK, "def late():\n    import icrf_mediator.cli"),
    (import_direction, SDK, "importlib.import_module('icrf_agent')"),
    (import_direction, "agent/icrf_agent/service.py", "import icrf_mediator"),
    (import_direction, "mediator/icrf_mediator/server.py", "from icrf_agent import core"),
    (wire_fence, SDK, "import grpc"),
    (wire_fence, SDK, "import grpc.aio as g"),
    (wire_fence, SDK, "from grpc_health.v1 import health"),
    (wire_fence, SDK, "from google.protobuf import message"),
    (wire_fence, SDK, "from google import protobuf"),
    (wire_fence, SDK, "from icrf.wire._generated.icrf.v1 import types_pb2"),
    (wire_fence, SDK, "from icrf import wire\nwire.cluster_pb2.Lease()"),
    (wire_fence, "agent/icrf_agent/service.py", "import grpc"),
    (wire_fence, "mediator/icrf_mediator/mediator.py", "from grpc import StatusCode"),
    *((pure_core, CORE, f"import {module}") for module in sorted(IMPURE)),
    (pure_core, CORE, "def now():\n    from time import monotonic"),
    (pure_core, CORE, "open('x')"),
    (pure_core, "agent/icrf_agent/core.py", "import asyncio"),
    (pure_core, "agent/icrf_agent/round_machine.py", "import ray.actor"),
    (no_pickle, SDK, "import pickle"),
    (no_pickle, SDK, "from ray import cloudpickle"),
    (small_rooms, SDK, "x = 1\n" * MAX_FILE_LINES),
    (small_rooms, SDK, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (no_sleep, "tests/unit/test_x.py", "import time\ntime.sleep(0)"),
    (no_sleep, "tests/unit/test_x.py", "async def f():\n    await asyncio.sleep(0.01)"),
    (no_machine_path, "README.md", "see /" + "work/main for more, or /" + "home/ada/x"),
    (known_codes, SDK, "make_error('C999', 'x')"),
    (known_codes, SDK, "make_error('Q001', 'x')"),
    (known_codes, SDK, "'''Raises T999 when it is not.'''"),
]
GOOD = [
    (import_direction, "fabric/icrf/local.py", "import icrf_agent\nimport icrf_mediator"),
    (import_direction, "fabric/icrf/testing/environment.py", "import icrf_agent"),
    (import_direction, "agent/icrf_agent/service.py", "import icrf\nfrom icrf_agent import core"),
    (wire_fence, "fabric/icrf/wire/status.py", "import grpc"),
    (wire_fence, "agent/icrf_agent/gateway_service.py", "import grpc"),
    (wire_fence, "mediator/icrf_mediator/relay.py", "import grpc"),
    (wire_fence, SDK, "'''Talks gRPC, see icrf.wire.'''"),
    (pure_core, CORE, "from dataclasses import dataclass"),
    (pure_core, "mediator/icrf_mediator/server.py", "import asyncio"),
    (no_pickle, SDK, "import safetensors"),
    (small_rooms, SDK, "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    (no_sleep, "tests/unit/test_x.py", "async def f():\n    await asyncio.sleep(0)"),
    (no_machine_path, "README.md", "framework/py, $HOME/work/x, https://example.org/root/"),
    (known_codes, SDK, "make_error('C001', 'on an H100')"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_a_rule_finds_what_breaks_it(rule: Rule, path: str, text: str) -> None:
    assert rule(path, text) != []


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_a_rule_allows_what_keeps_it(rule: Rule, path: str, text: str) -> None:
    assert rule(path, text) == []


# ---------------------------------------------------------------- the error catalogue


@pytest.mark.parametrize("code", errors.CATALOGUE)
def test_every_code_has_a_title_a_status_and_an_exit_code(code: str) -> None:
    entry = errors.CATALOGUE[code]
    exits = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert re.fullmatch(r"[A-Z]\d{3}", code)
    assert entry.title
    assert entry.status in grpc.StatusCode.__members__
    assert entry.status not in {"OK", "UNKNOWN"}
    assert entry.exit_code in exits
    assert errors.error_class(code) is not errors.IcrfError


def test_titles_are_unique() -> None:
    titles = [entry.title for entry in errors.CATALOGUE.values()]
    assert len(set(titles)) == len(titles)


def test_the_error_page_lists_every_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z]\d{3})` \| (.+) \| (\d+) \| `(\w+)` \|$", page, re.MULTILINE)
    expected = {(c, e.title, str(e.exit_code), e.status) for c, e in errors.CATALOGUE.items()}
    assert set(rows) == expected
