"""A job as a terminal shows it while it goes on: state, a bar, its losses as a chart, rate, time left, last events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tunesmith.cli.chart import Cell, Curve, draw, running_mean
from tunesmith.cli.course import Course, clock_time

LEAST_CHART_ROWS, MOST_CHART_ROWS = 4, 16
LAST_EVENTS = 4
USUAL_ROWS = 24
"""A terminal that is less high has fewer events, so that there is room for a chart."""
LEAST_BAR_COLUMNS = 8
AROUND_CHART = 13
"""Lines that are not the chart's: head, bar, axis, legend, figures, empty lines, and what is said at the end."""
SMOOTHED_OVER = 5
"""Reports: losses are those of small batches, and jump."""
ROOMY_COLUMNS = 70
"""From here on the legend has room for all of it."""
STATE_STYLES = {"running": "bold cyan", "succeeded": "bold green", "failed": "bold red", "paused": "bold yellow"}
LEVEL_STYLES = {"warn": "yellow", "error": "red"}
TRAINING, VALIDATION = "cyan", "yellow"


@dataclass(frozen=True, slots=True)
class Signs:
    """The characters that a terminal's encoding has."""

    dots: bool
    """Braille; else the points alone are drawn."""
    done: str
    to_do: str
    validation: str
    upright: str
    corner: str
    flat: str
    between: str


FINE = Signs(True, "━", "─", "•", "│", "└", "─", " · ")
PLAIN = Signs(False, "#", ".", "o", "|", "+", "-", ", ")


class Dashboard:
    """Renders the course of a job as it is at the moment, in whatever room there is."""

    def __init__(self, course: Course, clock: Callable[[], float]) -> None:
        self.course = course
        self.trouble: str | None = None
        """Why nothing new comes at the moment."""
        self._clock = clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines of text, none longer than the terminal is wide, and less than it is high."""
        signs = FINE if console.encoding.startswith("utf") else PLAIN
        width, height = options.max_width, console.height
        yield self._head(signs, width)
        yield self._bar(signs, width)
        shown_events = min(len(self.course.messages), LAST_EVENTS if height >= USUAL_ROWS else height // 8)
        rows = min(MOST_CHART_ROWS, height - AROUND_CHART - shown_events)
        if rows >= LEAST_CHART_ROWS and len(self.course.points) > 1:
            yield Text()
            yield from self._chart(signs, width, rows)
        yield Text()
        yield from self._figures(signs, width)
        yield Text()
        for event in self.course.messages[-shown_events:] if shown_events else []:
            line = f"{datetime.fromtimestamp(event['created_at']):%H:%M:%S}  {event['message']}"
            yield _fitted(line, width, LEVEL_STYLES.get(event["level"], "dim"))
        if self.trouble is not None:
            yield _fitted(self.trouble, width, "bold yellow")

    def _head(self, signs: Signs, width: int) -> Text:
        course = self.course
        line = Text(no_wrap=True, overflow="crop")
        line.append(course.state, STATE_STYLES.get(course.state, "bold"))
        if course.state == "running" and course.n_steps:
            line.append(f"{signs.between}epoch {course.epoch[0]} of {course.epoch[1]}")
        line.append(f"{signs.between}{course.job['model']}{signs.between}{course.job['id']}")
        line.truncate(width)
        return line

    def _bar(self, signs: Signs, width: int) -> Text:
        course = self.course
        told, steps = f" {course.share:4.0%}", f"  step {course.step:,}/{course.n_steps or 0:,}"
        if course.n_steps and width >= len(told + steps) + LEAST_BAR_COLUMNS:
            told += steps
        room = max(0, width - len(told))
        done = round(course.share * room)
        bar = Text(signs.done * done, STATE_STYLES.get(course.state, "cyan"), no_wrap=True)
        bar.append(signs.to_do * (room - done), "dim")
        bar.append(told)
        bar.truncate(width)
        return bar

    def _chart(self, signs: Signs, width: int, rows: int) -> Iterator[Text]:
        points = self.course.points
        training = running_mean([(one.step, one.training_loss) for one in points], SMOOTHED_OVER)
        measured = [(one.step, one.validation_loss) for one in points if one.validation_loss is not None]
        validation = running_mean(measured, SMOOTHED_OVER)
        low, high = _range([loss for _, loss in training], [loss for _, loss in validation])
        last_step = self.course.n_steps or points[-1].step
        labels = {0: f"{high:.2f}", rows // 2: f"{high + (low - high) * (rows // 2) / (rows - 1):.2f}"}
        labels[rows - 1] = f"{low:.2f}"
        margin = max(map(len, labels.values()))
        curves = [
            Curve(training, None if signs.dots else "*"),
            Curve(validation, signs.validation),
        ]
        columns = max(4, width - margin - 3)
        for number, row in enumerate(draw(curves, columns, rows, (1, last_step), (low, high))):
            line = Text(f"{labels.get(number, ''):>{margin}} {signs.upright}", "dim", no_wrap=True)
            for cell in row:
                line.append(cell.character, _curve_style(cell))
            yield line
        foot = f"{'':>{margin}} {signs.corner}{signs.flat * columns}"
        yield Text(foot, "dim", no_wrap=True)
        ends = f"1{f'step {last_step:,}':>{columns - 1}}"
        yield Text(f"{'':>{margin}}  {ends}", "dim", no_wrap=True)
        yield self._legend(signs, margin, width, training[-1][1], validation[-1][1] if validation else None)

    def _legend(self, signs: Signs, margin: int, width: int, training: float, validation: float | None) -> Text:
        roomy = width >= ROOMY_COLUMNS
        what = " loss" if roomy else ""
        legend = Text(" " * (margin + 2) if roomy else "", no_wrap=True)
        legend.append("⠤⠤" if signs.dots else "**", TRAINING)
        legend.append(f" training{what} {training:.2f}")
        if validation is not None:
            legend.append(f"   {signs.validation} ", VALIDATION)
            legend.append(f"validation{what} {validation:.2f}")
        whole = [one.full_validation_loss for one in self.course.points if one.full_validation_loss is not None]
        if whole and roomy:
            legend.append(f" (whole file {whole[-1]:.2f})")
        legend.truncate(width)
        return legend

    def _figures(self, signs: Signs, width: int) -> Iterator[Text]:
        course = self.course
        parts = []
        pace = None if course.ended else course.pace()
        if pace is not None and course.state == "running" and self.trouble is None:
            left_s = pace.ends_unix - self._clock()
            parts.append(f"{clock_time(left_s)} left, ends {datetime.fromtimestamp(pace.ends_unix):%H:%M}")
            parts.append(f"{pace.tokens_per_s:,.0f} tokens/s")
        elif course.state == "pending":
            parts.append(_waiting(course))
        if course.points:
            last = course.points[-1]
            parts.append(f"{last.tokens:,} tokens")
            parts.append(f"token accuracy {last.token_accuracy:.0%}")
        if course.cost is not None:
            parts.append(f"costs {course.cost}")
        line = ""
        for part in parts:
            joined = part if not line else f"{line}{signs.between}{part}"
            if line and len(joined) > width:
                yield Text(line, no_wrap=True)
                joined = part
            line = joined
        yield _fitted(line, width, "")


def _waiting(course: Course) -> str:
    before, starts = course.job.get("queue_number"), course.job.get("estimated_start")
    told = "waiting to start" if not before else f"{before} job{'s' * (before > 1)} before it"
    return told if starts is None else f"{told}, starts about {datetime.fromtimestamp(starts):%H:%M}"


def _range(*curves: list[float]) -> tuple[float, float]:
    """What the chart spans. The first tenth, where losses fall from far above, does not count: it would flatten all."""
    settled = [loss for curve in curves for loss in curve[len(curve) // 10 :]]
    return min(settled), max(settled)


def _curve_style(cell: Cell) -> str:
    return "" if cell.curve is None else (TRAINING, VALIDATION)[cell.curve]


def _fitted(text: str, width: int, style: str) -> Text:
    """One line, cut where the terminal ends."""
    line = Text(text, style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line
