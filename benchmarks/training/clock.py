"""When steps ended, and when enough of them have been seen. The same for every competitor.

On a processor the budget is of its time; on a GPU of time as it passes, and a step has ended when all is computed.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import torch

from benchmarks.training.forks import Result, peak_rss_mib

WARM_UP_SHARE = 0.25
"""Of the budget: steps that end within it, and the first in any case, are not counted. Libraries choose and compile
their products then."""


@dataclass
class Clock:
    """To be told of the end of each step of a run."""

    budget_s: float
    """After which a run may end."""
    device: str = "cpu"
    ends: list[tuple[float, float, float]] = field(default_factory=list)
    """Wall, processor and system time."""
    began: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))
    """Wall and processor time."""

    def tick(self) -> bool:
        """A step has ended; whether that is enough: the budget spent, and a step at least beyond those to warm up."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        times = os.times()
        self.ends.append((time.perf_counter(), time.process_time(), times.system))
        return self._spent_s(-1) >= self.budget_s * (1 + WARM_UP_SHARE) and len(self.ends) > self._warm_steps

    def result(self, step_tokens: list[int]) -> Result:
        """What was measured, given the tokens of each step, padding not counted."""
        warm = self._warm_steps
        (wall, cpu, system), (wall_end, cpu_end, system_end) = self.ends[warm - 1], self.ends[-1]
        tokens = sum(step_tokens[warm : len(self.ends)])
        on_device = {} if self.device == "cpu" else {"peak_device_mib": torch.cuda.max_memory_reserved() / 2**20}
        return {
            **on_device,
            "steps": len(self.ends) - warm,
            "tokens": tokens,
            "wall_s": wall_end - wall,
            "cpu_s": cpu_end - cpu,
            "system_share": (system_end - system) / (cpu_end - cpu),
            "peak_rss_mib": peak_rss_mib(),
        }

    @property
    def _warm_steps(self) -> int:
        within = (index for index in range(len(self.ends)) if self._spent_s(index) > self.budget_s * WARM_UP_SHARE)
        return max(1, next(within, len(self.ends)))

    def _spent_s(self, index: int) -> float:
        kind = 1 if self.device == "cpu" else 0
        return self.ends[index][kind] - self.began[kind]
