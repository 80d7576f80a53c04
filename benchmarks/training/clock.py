"""When steps ended, and when enough of them have been seen. The same for every competitor."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from benchmarks.training.forks import Result, peak_rss_mib

WARM_UP_SHARE = 0.25
"""Of the budget: steps that end within it, and the first in any case, are not counted. Libraries choose and compile
their products then."""


@dataclass
class Clock:
    """To be told of the end of each step of a run."""

    budget_s: float
    """Processor time after which a run may end."""
    ends: list[tuple[float, float, float]] = field(default_factory=list)
    """Wall, processor and system time."""
    began_cpu_s: float = field(default_factory=time.process_time)

    def tick(self) -> bool:
        """A step has ended; whether that is enough: the budget spent, and a step at least beyond those to warm up."""
        times = os.times()
        self.ends.append((time.perf_counter(), time.process_time(), times.system))
        return self._cpu_s(-1) >= self.budget_s * (1 + WARM_UP_SHARE) and len(self.ends) > self._warm_steps

    def result(self, step_tokens: list[int]) -> Result:
        """What was measured, given the tokens of each step, padding not counted."""
        warm = self._warm_steps
        (wall, cpu, system), (wall_end, cpu_end, system_end) = self.ends[warm - 1], self.ends[-1]
        tokens = sum(step_tokens[warm : len(self.ends)])
        return {
            "steps": len(self.ends) - warm,
            "tokens": tokens,
            "wall_s": wall_end - wall,
            "cpu_s": cpu_end - cpu,
            "system_share": (system_end - system) / (cpu_end - cpu),
            "peak_rss_mib": peak_rss_mib(),
        }

    @property
    def _warm_steps(self) -> int:
        within = (index for index in range(len(self.ends)) if self._cpu_s(index) > self.budget_s * WARM_UP_SHARE)
        return max(1, next(within, len(self.ends)))

    def _cpu_s(self, index: int) -> float:
        return self.ends[index][1] - self.began_cpu_s
