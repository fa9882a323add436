"""``report.html``: one run on one page that needs nothing else, no script and no network.

The page is also well-formed XML, which keeps every value from elsewhere escaped by construction of the checks in the
tests. Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from icrf.console.format import (
    MISSING,
    compress_names,
    format_bytes,
    format_duration,
    format_metric,
    safe_text,
    saved_text,
    short_id,
)
from icrf.errors import error_from_dict
from icrf.profiling import profile_table
from icrf.protocol import Plan, RoundResult
from icrf.spec.documents import dump_yaml

# Above this a page gets slow to open; rounds.jsonl always has every round.
MAX_ROWS = 1000
MAX_POINTS = 600

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #e3e7ee; --paper: #ffffff; --tile: #f6f8fb;
  --good: #12805c; --bad: #c0362c; --accent: #2f5fd0; --second: #c2741a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2b3240; --paper: #11151c;
  --tile: #191f29; --good: #4cc38a; --bad: #ff7a6e; --accent: #7da2ff; --second: #f0a860; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 40px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 16px; margin: 40px 0 12px; }
.sub { color: var(--soft); margin: 4px 0 24px; }
.badge { display: inline-block; padding: 2px 10px; border-radius: 999px; font-size: 12px; font-weight: 600;
  border: 1px solid currentColor; vertical-align: middle; margin-left: 10px; }
.COMPLETED { color: var(--good); } .FAILED { color: var(--bad); } .CANCELLED { color: var(--second); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 12px; }
.tile { background: var(--tile); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 22px; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th.t, td.t { text-align: left; white-space: normal; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--tile); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  overflow-x: auto; }
.error { border-color: var(--bad); white-space: pre-wrap; }
.hash { color: var(--soft); overflow-wrap: anywhere; }
svg { width: 100%; min-width: 620px; height: auto; display: block; }
table + table { margin-top: 20px; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .a { stroke: var(--accent); fill: none; stroke-width: 2.2; }
.b { stroke: var(--second); fill: none; stroke-width: 2.2; stroke-dasharray: 6 4; }
svg .ta { fill: var(--accent); font-weight: 600; } svg .tb { fill: var(--second); font-weight: 600; }
"""


@dataclass(frozen=True)
class ReportData:
    """All that the page shows.

    Attributes:
        summary: the values of ``summary.json``.
        rounds: committed rounds in order.
        config: the resolved configuration.
        plan: where the nodes went, if known.
    """

    summary: Mapping[str, Any]
    rounds: Sequence[RoundResult]
    config: Mapping[str, Any]
    plan: Plan | None = None


def render(data: ReportData) -> str:
    """The whole page."""
    summary = data.summary
    status = _text(summary["status"])
    title = f"{_text(summary['federation'])} · {_text(short_id(str(summary['run_id'])))}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{_text(summary["federation"])}<span class="badge {status}">{status}</span></h1>',
        f'<p class="sub">{_headline(data)}</p>',
        _tiles(summary),
    ]
    if summary.get("error"):
        parts.append(f'<pre class="error">{_text(error_from_dict(summary["error"]))}</pre>')
    parts += [_curve_section(data.rounds), _rounds_section(data.rounds), _profile_section(data.rounds)]
    if data.plan is not None:
        parts.append(_plan_section(data.plan))
    config = dump_yaml(dict(data.config))
    parts.append(f"<h2>Configuration</h2><pre>{_text(config)}</pre>")
    if summary.get("model_sha256"):
        parts.append(f'<p class="hash">model sha256 <code>{_text(summary["model_sha256"])}</code></p>')
    parts.append("</body></html>\n")
    return "\n".join(parts)


def curve_svg(rounds: Sequence[RoundResult]) -> str:
    """Accuracy (left axis, 0 to 1) and loss (right axis) over the rounds; empty with nothing to draw."""
    accuracy, loss = _points(rounds, "accuracy"), _points(rounds, "loss")
    if not loss:
        loss = _points(rounds, "train_loss")
    if not accuracy and not loss:
        return ""
    first, last = rounds[0].number, rounds[-1].number
    top = _ceiling(max((y for _, y in loss), default=1.0))
    left, right, upper, lower = 46, 914, 30, 270

    def x(number: float) -> float:
        return left + (right - left) * ((number - first) / (last - first) if last > first else 0.5)

    def y(share: float) -> float:
        return lower - (lower - upper) * min(1.0, max(0.0, share))

    parts = ['<svg viewBox="0 0 960 310" role="img" aria-label="accuracy and loss per round">']
    for step in range(5):
        share = step / 4
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        if accuracy:
            parts.append(f'<text x="{left - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.2f}</text>')
        if loss:
            parts.append(f'<text x="{right + 8}" y="{y(share) + 4:.1f}">{share * top:.3g}</text>')
    for number in sorted({first, last, *(first + round((last - first) * i / 4) for i in range(1, 4))}):
        parts.append(f'<text x="{x(number):.1f}" y="{lower + 22}" text-anchor="middle">{number}</text>')
    for name, points, scale, letter, at in (
        ("accuracy", accuracy, 1.0, "a", left),
        ("loss", loss, top, "b", right),
    ):
        if points:
            path = " ".join(f"{x(n):.1f},{y(v / scale):.1f}" for n, v in points)
            anchor = "start" if letter == "a" else "end"
            parts.append(f'<polyline class="{letter}" points="{path}"/>')
            parts.append(f'<text class="t{letter}" x="{at}" y="16" text-anchor="{anchor}">{name}</text>')
            if len(points) == 1:
                number, value = points[0]
                parts.append(f'<circle class="{letter}" cx="{x(number):.1f}" cy="{y(value / scale):.1f}" r="3"/>')
    parts.append("</svg>")
    return "".join(parts)


def summary_table(summary: Mapping[str, Any]) -> str:
    """The tiles as a small table, for notebooks."""
    rows = "".join(f'<tr><th class="t">{name}</th><td>{value}</td></tr>' for name, value in _tile_values(summary))
    return f"<table>{rows}</table>"


def _headline(data: ReportData) -> str:
    config, summary = data.config, data.summary
    words = [
        f"run {_text(summary['run_id'])}",
        _text(config.get("federated_learning_schema", "")),
        _text(config.get("federated_learning_topology", "")),
        f"{_text(config.get('model_type', ''))} on {_text(config.get('dataset_type', ''))}",
        f"seed {_text(config.get('seed', ''))}",
    ]
    return " · ".join(word for word in words if word)


def _tile_values(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ", ".join(summary.get("cluster_names") or ())
    values = [
        ("accuracy", format_metric(summary["accuracy"])),
        ("loss", format_metric(summary["loss"])),
        ("rounds", str(summary["rounds"])),
        (f"clusters: {names}" if names else "clusters", str(summary["clusters"])),
        ("between clusters", format_bytes(summary["bytes_inter_cluster"])),
        ("within clusters", format_bytes(summary["bytes_intra_cluster"])),
        ("wall time", format_duration(summary["wall_s"])),
    ]
    if "bytes_saved" in summary:
        values.insert(5, (f"by {summary['inter_cluster_codec']}", saved_text(summary)))
    if "rounds_to_target" in summary:
        values.insert(3, ("rounds to target", str(summary["rounds_to_target"] or MISSING)))
    return [(_text(name), _text(value)) for name, value in values]


def _tiles(summary: Mapping[str, Any]) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in _tile_values(summary)
    )
    return f'<div class="tiles">{tiles}</div>'


def _curve_section(rounds: Sequence[RoundResult]) -> str:
    chart = curve_svg(rounds)
    return f'<h2>Accuracy and loss</h2><div class="scroll">{chart}</div>' if chart else ""


def _rounds_section(rounds: Sequence[RoundResult]) -> str:
    if not rounds:
        return "<h2>Rounds</h2><p>No round was committed.</p>"
    body = []
    for result in rounds[-MAX_ROWS:]:
        metrics = [format_metric(result.metrics.get(name)) for name in ("train_loss", "loss", "accuracy")]
        cells = [
            str(result.number),
            f"{result.participants:,}",
            *metrics,
            format_bytes(result.bytes_inter_cluster),
            format_duration(result.train_s),
            format_duration(result.exchange_s),
            format_duration(result.wall_s),
            str(result.attempt),
        ]
        row = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        body.append(f'<tr>{row}<td class="t"><code>{_text(result.model_sha256[:12])}</code></td></tr>')
    names = (
        "round", "nodes", "train loss", "loss", "accuracy", "between clusters",
        "train", "exchange", "whole", "attempt",
    )  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in names) + '<th class="t">state sha256</th>'
    note = ""
    if len(rounds) > MAX_ROWS:
        note = f'<p class="sub">the last {MAX_ROWS:,} of {len(rounds):,} rounds; rounds.jsonl has all</p>'
    return (
        f"<h2>Rounds</h2>{note}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _profile_section(rounds: Sequence[RoundResult]) -> str:
    table = profile_table(rounds)
    if table is None:
        return ""
    first, *others = table.columns
    head = f'<th class="t">{first}</th>' + "".join(f"<th>{name}</th>" for name in others)
    body = "".join(
        f'<tr><td class="t">{_text(name)}</td>' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in table.rows
    )
    note = f'<p class="sub">and {table.left_out:,} more hosts in profile.jsonl</p>' if table.left_out else ""
    return (
        f'<h2>Where the time went</h2>{note}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _plan_section(plan: Plan) -> str:
    nodes: dict[str, list[str]] = {name: [] for name in plan.clusters}
    for node, cluster in plan.assignment.items():
        nodes.setdefault(cluster, []).append(node)
    rows = "".join(
        f'<tr><td class="t">{_text(name)}</td><td>{len(ids):,}</td><td>{plan.slots.get(name, 0)}</td>'
        f'<td class="t">{_text(compress_names(ids))}</td></tr>'
        for name, ids in nodes.items()
    )
    links = "".join(
        f'<tr><td class="t">{_text(link.source)} → {_text(link.target)}</td>'
        f"<td>{format_bytes(link.bytes_per_round)}</td></tr>"
        for link in plan.links
    )
    facts = (
        f"{_text(plan.strategy)} placement · {plan.cut_edges:,} of {plan.num_edges:,} edges between clusters · "
        f"{plan.num_parameters:,} parameters · planned {format_bytes(plan.bytes_inter_cluster_total)} between clusters"
    )
    link_table = (
        '<table><thead><tr><th class="t">link</th><th>payload per round</th></tr></thead>'
        f"<tbody>{links}</tbody></table>"
        if links
        else ""
    )
    return (
        f'<h2>Plan</h2><p class="sub">{facts}</p><div class="scroll"><table><thead><tr><th class="t">cluster</th>'
        f'<th>nodes</th><th>slots</th><th class="t">which</th></tr></thead><tbody>{rows}</tbody></table>'
        f"{link_table}</div>"
    )


def _points(rounds: Sequence[RoundResult], name: str) -> list[tuple[int, float]]:
    found = [(r.number, r.metrics[name]) for r in rounds if math.isfinite(r.metrics.get(name, math.nan))]
    if len(found) <= MAX_POINTS:
        return found
    stride = math.ceil(len(found) / MAX_POINTS)
    return [*found[::stride], found[-1]]


def _ceiling(value: float) -> float:
    """The next round number above `value`, so that the axis has readable ticks."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * 0.999999)


def _text(value: object) -> str:
    return escape(safe_text("" if value is None else str(value)))
