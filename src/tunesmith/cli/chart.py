"""Curves in the characters of a terminal: two by four dots to a character, or plain signs. Pure; knows no colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each dot of a Braille character, by its row from above and its column."""
BRAILLE = 0x2800


@dataclass(frozen=True, slots=True)
class Curve:
    """What is drawn: points in the order of x."""

    points: Sequence[tuple[float, float]]
    mark: str | None = None
    """A character for each point; None joins them by a line of dots."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One character of a chart, and the number of the curve it is of; None where there is nothing."""

    character: str
    curve: int | None


def draw(
    curves: Sequence[Curve], columns: int, rows: int, x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[list[Cell]]:
    """`rows` lines of `columns` cells. Later curves cover earlier ones; points out of range are at its edge."""
    masks = [[0] * columns for _ in range(rows)]
    cells = [[Cell(" ", None)] * columns for _ in range(rows)]
    across, down = 2 * columns, 4 * rows
    for number, curve in enumerate(curves):
        places = [(_place(x, x_range, across), down - 1 - _place(y, y_range, down)) for x, y in curve.points]
        if curve.mark is not None:
            for x, y in places:
                cells[y // 4][x // 2] = Cell(curve.mark, number)
            continue
        for x, y in _line(places):
            masks[y // 4][x // 2] |= DOTS[y % 4][x % 2]
            cells[y // 4][x // 2] = Cell(chr(BRAILLE + masks[y // 4][x // 2]), number)
    return cells


def _place(value: float, bounds: tuple[float, float], dots: int) -> int:
    """The dot, from 0, of a value; that of the nearer bound for one beyond it."""
    low, high = bounds
    return 0 if high == low else max(0, min(dots - 1, int((value - low) / (high - low) * dots)))


def _line(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Dots from each place to the next, without a gap."""
    dots = list(places[:1])
    for (x, y), (to_x, to_y) in pairwise(places):
        steps = max(abs(to_x - x), abs(to_y - y))
        dots += [(x + (to_x - x) * i // steps, y + (to_y - y) * i // steps) for i in range(1, steps + 1)]
    return dots


def running_mean(points: Sequence[tuple[float, float]], over: int) -> list[tuple[float, float]]:
    """Each point with the mean of the last `over` values in place of its own."""
    return [
        (x, sum(y for _, y in points[max(0, i + 1 - over) : i + 1]) / min(over, i + 1))
        for i, (x, _) in enumerate(points)
    ]
