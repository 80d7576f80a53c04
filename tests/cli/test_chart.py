"""Curves in characters."""

from __future__ import annotations

from tunesmith.cli.chart import Cell, Curve, draw, running_mean


def text(cells: list[list[Cell]]) -> list[str]:
    return ["".join(cell.character for cell in row) for row in cells]


def test_a_straight_line_from_corner_to_corner() -> None:
    rising = draw([Curve([(0, 0), (1, 1)])], columns=2, rows=1, x_range=(0, 1), y_range=(0, 1))
    # Four dots across, four down: the lowest left to the highest right.
    assert text(rising) == ["⡠⠊"]
    falling = draw([Curve([(0, 1), (1, 0)])], columns=2, rows=1, x_range=(0, 1), y_range=(0, 1))
    assert text(falling) == ["⠑⢄"]


def test_marks_stand_where_their_points_are_and_cover_lines() -> None:
    curves = [Curve([(0, 0), (3, 0)]), Curve([(0, 0), (3, 1)], "x")]
    cells = draw(curves, columns=4, rows=2, x_range=(0, 3), y_range=(0, 1))
    assert text(cells) == ["   x", "x⣀⣀⣀"]
    assert [cell.curve for cell in cells[1]] == [1, 0, 0, 0]
    assert cells[0][0] == Cell(" ", None)


def test_what_is_out_of_range_is_at_the_edge() -> None:
    cells = draw([Curve([(1, 99), (2, -99)], "x")], columns=2, rows=2, x_range=(1, 2), y_range=(0, 1))
    assert text(cells) == ["x ", " x"]


def test_equal_values_are_one_flat_line() -> None:
    cells = draw([Curve([(1, 5), (2, 5)])], columns=2, rows=1, x_range=(1, 2), y_range=(5, 5))
    assert text(cells) == ["⣀⣀"]


def test_a_running_mean_begins_with_what_there_is() -> None:
    assert running_mean([(1, 4.0), (2, 2.0), (3, 0.0)], over=2) == [(1, 4.0), (2, 3.0), (3, 1.0)]
    assert running_mean([], over=5) == []
