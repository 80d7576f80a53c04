"""The loop around a runner: take commands, do a step, say what came of it. One thread; ends with `stop`.

Models are read in a thread beside it: those that are served are not kept waiting by one that comes.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from tunesmith.engine.base import Precision, PromptScored, SampledToken
from tunesmith.engine.messages import Cancel, Command, Ended, Event, Generate, Load, Loaded, Produced, Unload
from tunesmith.engine.runner import Model, Runner, StepFailed

logger = logging.getLogger(__name__)

Emit = Callable[[list[Event]], None]
MOST_HELD = 256
"""Outputs of a request that are held back for the others, at most: messages stay short, and so does what they stop."""
GATHER_S = 0.004
"""Tokens of shorter steps are passed on together: whoever takes them is woken by each message, for as long as a small
model's step."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A model that was to be loaded has been read, or why not."""

    load: Load
    model: Model | str


class Worker:
    """Runs requests for whoever puts commands in. `put` and `stop` may be called from any thread."""

    def __init__(
        self,
        *,
        threads: int,
        emit: Emit,
        precision: Precision = "float32",
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`emit` is called from the thread of `run`, with all events of one step, or of a few that are short.

        `precision` and `device`: see `Settings.engine_precision`.
        """
        self._clock = clock
        self._threads = threads
        self._emit = emit
        self._commands: queue.SimpleQueue[Command | _Read | None] = queue.SimpleQueue()
        self._reader = ThreadPoolExecutor(1, "reader")
        self._reading: dict[int, Load] = {}
        """By number; those that were unloaded meanwhile are gone from here."""
        self._held: dict[int, list[Event]] = {}
        """By number, of requests whose outputs are passed on together: those that came so far."""
        self._runner = Runner(precision=precision, device=device)

    def put(self, command: Command) -> None:
        """To be done before the next step."""
        self._commands.put(command)

    def stop(self) -> None:
        """Ends `run` after the step under way."""
        self._commands.put(None)

    def run(self) -> None:
        """Works until `stop`; sleeps while there is nothing to do."""
        torch.set_num_threads(self._threads)
        events: list[Event] = []
        emitted = -math.inf
        while True:
            while not (self._commands.empty() and (self._runner.busy or events)):
                command = self._commands.get()
                if command is None:
                    self._reader.shutdown(wait=False, cancel_futures=True)
                    return
                events += self._obey(command)
            if self._runner.busy:
                events += self._due(self._step())
            now = self._clock()
            if events and (now - emitted >= GATHER_S or not self._runner.busy or any(map(_urgent, events))):
                self._emit(events)
                events, emitted = [], now

    def _obey(self, command: Command | _Read) -> list[Event]:
        match command:
            case Load(number):
                self._reading[number] = command
                self._reader.submit(self._read, command)
            case _Read(load, str(reason)):
                self._reading.pop(load.number, None)
                return [Loaded(load.number, reason)]
            case _Read(load, Model() as model):
                if self._reading.pop(load.number, None) is not None:
                    self._runner.keep(load.handle, model)
                return [Loaded(load.number)]
            case Unload(handle):
                self._runner.unload(handle)
                self._reading = {number: load for number, load in self._reading.items() if load.handle != handle}
            case Generate(number, request):
                if request.together:
                    self._held[number] = []
                return list(self._due(self._runner.submit(number, request)))
            case Cancel(number):
                self._held.pop(number, None)
                self._runner.cancel(number)
        return []

    def _read(self, load: Load) -> None:
        """In the thread beside."""
        self._commands.put(_Read(load, self._model(load)))

    def _model(self, load: Load) -> Model | str:
        """The model, or why there is none."""
        try:
            model = self._runner.read(load.handle, load.base_dir, load.adapter_dir)
        except ValueError as error:
            return str(error)
        except Exception as error:
            # What a checkpoint can do to the libraries that read it has no end; the other models are served on.
            logger.exception("model could not be loaded base=%s adapter=%s", load.base_dir, load.adapter_dir)
            return f"loading it failed ({type(error).__name__}); the log of the server tells more"
        logger.info("model loaded base=%s adapter=%s", load.base_dir, load.adapter_dir)
        return model

    def _due(self, events: Iterable[Event]) -> Iterator[Event]:
        """What is to be passed on now, of what came."""
        for event in events:
            held = self._held.get(event.number)
            if held is None:
                yield event
                continue
            held.append(event)
            if _is_last(event):
                del self._held[event.number]
            elif len(held) < MOST_HELD:
                continue
            yield from held
            held.clear()

    def _step(self) -> list[Event]:
        try:
            return self._runner.step()
        except StepFailed as failed:
            # Whatever it was (memory, a broken checkpoint): those who took part are told, and the engine goes on.
            logger.exception("a step failed")
            ended = self._runner.fail_running("The engine failed while it was working on this request.")
            if isinstance(failed.__cause__, torch.AcceleratorError):
                # A GPU that has failed a process answers it no more: `remote.py` starts another.
                self._emit([*failed.events, *ended])
                os._exit(1)
            return [*failed.events, *ended]


def _urgent(event: Event) -> bool:
    """Whether it is more than one of a sequence's tokens under way."""
    return not isinstance(event, Produced) or isinstance(event.output, PromptScored) or _is_last(event)


def _is_last(event: Event) -> bool:
    """Whether nothing more is said of a request."""
    if isinstance(event, Produced):
        return isinstance(event.output, SampledToken) and event.output.finish is not None
    return isinstance(event, Ended)
