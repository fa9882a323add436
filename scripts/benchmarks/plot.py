"""Plots as SVG text, with nothing but the standard library. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 170, 24, 56
_COLOURS = ("#1f5fa8", "#b3541e", "#3a7d44", "#6b4c9a")
_FONT = 'font-family="sans-serif" font-size="13"'


def log_log(series: Mapping[str, Points], dashed: Mapping[str, Points], x_title: str, y_title: str) -> str:
    """A plot with two logarithmic axes, each from one power of ten to another.

    Args:
        series: name -> measured points, all positive, ascending in x: dots with lines between them.
        dashed: name -> points of a line to compare with, without dots.
    """
    points = [point for some in (*series.values(), *dashed.values()) for point in some]
    axes = [_decades([point[k] for point in points]) for k in range(2)]
    place = _Place(*axes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" {_FONT}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *_grid(place, x_title, y_title),
    ]
    for k, (name, some) in enumerate((*dashed.items(), *series.items())):
        is_measured = k >= len(dashed)
        colour = _COLOURS[(k - len(dashed)) % len(_COLOURS)] if is_measured else "#777777"
        parts += _line(place, some, colour, is_measured, name, _TOP + 16 + 22 * k)
    return "\n".join([*parts, "</svg>", ""])


class _Place:
    """Where a point lies in the picture."""

    def __init__(self, x_decades: tuple[int, int], y_decades: tuple[int, int]) -> None:
        self.x_decades, self.y_decades = x_decades, y_decades

    def x(self, value: float) -> float:
        return _LEFT + _share(value, self.x_decades) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - _share(value, self.y_decades) * (_HEIGHT - _TOP - _BOTTOM)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _share(value: float, decades: tuple[int, int]) -> float:
    return (math.log10(value) - decades[0]) / (decades[1] - decades[0])


def _grid(place: _Place, x_title: str, y_title: str) -> list[str]:
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    parts = []
    for exponent in range(place.x_decades[0], place.x_decades[1] + 1):
        x = place.x(10.0**exponent)
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{_number(exponent)}</text>')
    for exponent in range(place.y_decades[0], place.y_decades[1] + 1):
        y = place.y(10.0**exponent)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(exponent)}</text>')
    middle = (top + bottom) / 2
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{x_title}</text>')
    parts.append(f'<text transform="translate(18 {middle:.1f}) rotate(-90)" text-anchor="middle">{y_title}</text>')
    return parts


def _number(exponent: int) -> str:
    return f"{10**exponent:,}" if exponent >= 0 else f"{10.0**exponent:.{-exponent}f}"


def _line(place: _Place, points: Points, colour: str, is_measured: bool, name: str, legend_y: int) -> list[str]:
    at = [(place.x(x), place.y(y)) for x, y in points]
    dashes = "" if is_measured else ' stroke-dasharray="6 4"'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    left = _WIDTH - _RIGHT + 12
    parts = [
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>',
        f'<path d="M{left} {legend_y - 4}h22" stroke="{colour}" stroke-width="2"{dashes}/>',
        f'<text x="{left + 28}" y="{legend_y}">{name}</text>',
    ]
    return parts + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in at if is_measured]
