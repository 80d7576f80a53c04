"""Stop sequences over a stream of text: give out what is safe, hold back what may yet become a stop.

The stop that is whole first wins; of several that end together, the one that began first. So the cut does not depend
on how the text was split into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Scans one text. With no stops everything passes at once."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings."""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """Whether a stop sequence was found; nothing may be pushed after that."""

    def push(self, text: str) -> str:
        """The text that can be given out now: up to the stop, or all but a possible beginning of one."""
        assert not self.stopped
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        cut = len(text) - self._open_beginning(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """The text that was held back and is no stop after all."""
        held, self._held = self._held, ""
        return held

    def _open_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
