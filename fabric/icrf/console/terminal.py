"""Where a command writes: people's text, the one line of JSON, errors.

With ``--json`` all that people read goes to standard error, so that standard output ends with the JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from icrf.console.format import clean_json, safe_text
from icrf.errors import ConfigErrors, IcrfError

LABEL_WIDTH = 14


class Terminal:
    """The output of one command.

    Args:
        json_output: send people's text to standard error and keep standard output for JSON.
        plain: no colour and no live display even on a terminal.
    """

    def __init__(self, *, json_output: bool = False, plain: bool = False) -> None:
        self.json_output = json_output
        force: dict[str, Any] = {"force_terminal": False, "no_color": True} if plain else {}
        self.console = Console(stderr=json_output, highlight=False, **force)
        self._errors = Console(stderr=True, highlight=False, **force)

    @property
    def live(self) -> bool:
        """Whether lines may be redrawn: a terminal that can, and nobody asked for plain lines."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def line(self, text: str | Text = "", style: str = "") -> None:
        """One line for people. Never wrapped where it is piped."""
        shown = Text(safe_text(text), style=style) if isinstance(text, str) else text
        self.console.print(shown, soft_wrap=not self.live)

    def facts(self, rows: Sequence[tuple[str, str | Text]]) -> None:
        """Aligned ``label  value`` lines; long values wrap under themselves on a terminal."""
        if not self.live:
            for label, value in rows:
                self.line(f"{label:<{LABEL_WIDTH}}{safe_text(str(value))}".rstrip())
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, min_width=LABEL_WIDTH - 2)
        grid.add_column(overflow="fold")
        for label, value in rows:
            grid.add_row(label, value if isinstance(value, Text) else Text(safe_text(value)))
        self.console.print(Padding(grid, (0, 0, 0, 2)))

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str | Text]],
        *,
        right: Sequence[str] = (),
        wrap: Sequence[str] = (),
    ) -> None:
        """A table with a thin rule on a terminal, aligned columns without any decoration elsewhere.

        Args:
            columns: the headings; those in `right` are right-aligned, those in `wrap` may take several lines.
            rows: cells as text.
        """
        if not self.live:
            self._plain_table(columns, rows, right)
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in columns:
            table.add_column(
                name,
                justify="right" if name in right else "left",
                no_wrap=name not in wrap,
                overflow="fold" if name in wrap else "ellipsis",
            )
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(safe_text(cell)) for cell in row))
        self.console.print(Padding(table, (0, 0, 0, 2)))

    def _plain_table(self, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], right: Sequence[str]) -> None:
        cells = [list(columns), *([safe_text(str(c)) for c in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for row in cells:
            padded = (
                text.rjust(width) if name in right else text.ljust(width)
                for text, width, name in zip(row, widths, columns, strict=True)
            )
            self.line("  ".join(padded).rstrip())

    def json(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """The one line of JSON, as the last line of standard output."""
        Console(highlight=False).out(json.dumps(clean_json(value), ensure_ascii=False, allow_nan=False))

    def error(self, error: IcrfError) -> None:
        """Every error on a line of its own that begins with ``error CODE``; parts follow indented on a terminal."""
        errors = error.errors if isinstance(error, ConfigErrors) else (error,)
        for one in errors:
            if not self._errors.is_terminal:
                self._errors.print(Text(safe_text(f"error {one}")), soft_wrap=True)
                continue
            head = Text.assemble(("error ", "bold red"), (one.code, "bold"), " ")
            if one.place:
                head.append(f"{safe_text(one.place)}: ", style="cyan")
            head.append(safe_text(one.message))
            if one.value is not None and one.value not in one.message:
                head.append(f" (found {safe_text(one.value)})")
            self._errors.print(head)
            for label, part in (("allowed", one.allowed), ("hint", one.hint)):
                if part:
                    self._errors.print(Text.assemble((f"      {label:<8}", "dim"), safe_text(part)))

    def note(self, text: str) -> None:
        """A remark on standard error, whatever goes to standard output."""
        self._errors.print(Text(safe_text(text), style="dim"), soft_wrap=not self._errors.is_terminal)
