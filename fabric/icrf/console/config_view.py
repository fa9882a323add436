"""A configuration as people check it: every value and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from icrf.console.format import format_count, safe_text
from icrf.console.terminal import Terminal
from icrf.spec import FederationConfig

_DEFAULT = "default"


def show_sources(terminal: Terminal, file: Path, config: FederationConfig, sources: Mapping[str, str]) -> None:
    """Print all keys: those that were set first, then the defaults, dimmed."""
    values = config.model_dump()
    given = [key for key in values if sources.get(key, _DEFAULT) != _DEFAULT]
    rest = [key for key in values if key not in given]
    rows: list[tuple[str | Text, ...]] = [(Text(key, style="bold"), _value(values[key]), sources[key]) for key in given]
    rows += [tuple(Text(text, style="dim") for text in (key, _value(values[key]), _DEFAULT)) for key in rest]
    terminal.table(("key", "value", "from"), rows, wrap=("value",))
    terminal.line()
    mark = "  ✓ " if terminal.live else ""
    verdict = f"{safe_text(str(file))} is valid: {format_count(config.number_of_clients, 'client')}, "
    verdict += format_count(config.federated_learning_rounds, "round")
    terminal.line(Text.assemble((mark, "green"), verdict))


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
