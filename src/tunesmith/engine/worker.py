"""The loop around a runner: take commands, do a step, say what came of it. One thread; ends with `stop`."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

import torch

from tunesmith.engine.messages import Cancel, Command, Event, Generate, Load, Loaded, Unload
from tunesmith.engine.runner import Runner

logger = logging.getLogger(__name__)

Emit = Callable[[list[Event]], None]


class Worker:
    """Runs requests for whoever puts commands in. `put` and `stop` may be called from any thread."""

    def __init__(self, *, threads: int, emit: Emit, precision: str = "float32") -> None:
        """`emit` is called from the thread of `run`, with all events of one step at a time.

        `precision`: see `Settings.engine_precision`.
        """
        self._threads = threads
        self._emit = emit
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._runner = Runner(dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)

    def put(self, command: Command) -> None:
        """To be done before the next step."""
        self._commands.put(command)

    def stop(self) -> None:
        """Ends `run` after the step under way."""
        self._commands.put(None)

    def run(self) -> None:
        """Works until `stop`; sleeps while there is nothing to do."""
        torch.set_num_threads(self._threads)
        while True:
            events: list[Event] = []
            while not (self._commands.empty() and (self._runner.busy or events)):
                command = self._commands.get()
                if command is None:
                    return
                events += self._obey(command)
            if self._runner.busy:
                events += self._step()
            if events:
                self._emit(events)

    def _obey(self, command: Command) -> list[Event]:
        match command:
            case Load(number, handle, base_dir, adapter_dir):
                return [self._load(number, handle, base_dir, adapter_dir)]
            case Unload(handle):
                self._runner.unload(handle)
            case Generate(number, request):
                return self._runner.submit(number, request)
            case Cancel(number):
                self._runner.cancel(number)
        return []

    def _load(self, number: int, handle: str, base_dir: str, adapter_dir: str | None) -> Loaded:
        try:
            self._runner.load(handle, base_dir, adapter_dir)
        except ValueError as error:
            return Loaded(number, str(error))
        except Exception as error:
            # What a checkpoint can do to the libraries that read it has no end; the other models are served on.
            logger.exception("model could not be loaded base=%s adapter=%s", base_dir, adapter_dir)
            return Loaded(number, f"loading it failed ({type(error).__name__}); the log of the server tells more")
        logger.info("model loaded base=%s adapter=%s", base_dir, adapter_dir)
        return Loaded(number)

    def _step(self) -> list[Event]:
        try:
            return self._runner.step()
        except Exception:
            # Whatever it was (memory, a broken checkpoint): those who took part are told, and the engine goes on.
            logger.exception("a step failed")
            return self._runner.fail_running("The engine failed while it was working on this request.")
