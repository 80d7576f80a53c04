"""What a trainer is told on its standard input while it works: lines of a verb and a folder (`tunesmith.rundir`)."""

from __future__ import annotations

import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Verb = Literal["take", "save", "drop"]


@dataclass(frozen=True, slots=True)
class Order:
    """One line."""

    verb: Verb
    folder: Path


class Orders:
    """Lines from a pipe, as they come; reading never waits."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._begun = b""

    def new(self) -> list[Order]:
        """Those that have come since the last call. Lines that are no orders are passed over."""
        while self._descriptor is not None and select.select([self._descriptor], [], [], 0)[0]:
            content = os.read(self._descriptor, 1 << 16)
            if not content:
                self._descriptor = None
            self._begun += content
        *lines, self._begun = self._begun.split(b"\n")
        orders = []
        for line in lines:
            verb, _, folder = os.fsdecode(line).partition(" ")
            if verb in get_args(Verb) and folder:
                orders.append(Order(verb, Path(folder)))  # type: ignore[arg-type]
        return orders
