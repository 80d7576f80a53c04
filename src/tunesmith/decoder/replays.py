"""Work of a GPU that comes again and again in the same shapes: recorded once, then asked for with one call.

A small step is a thousand operations, and Python takes longer to ask for one than a GPU to do it. Knows nothing of what
the work is.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RECORDINGS_KEPT = 64
"""Beside its inputs and results each takes some megabytes of a GPU for its list of operations; what is between they
share."""
SEEN_KEPT = 1_024

Work = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Recorder(Protocol):
    """Of one device."""

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """What does `work` again, reading and writing where it does now, and its results, which are not there yet.

        Raises RuntimeError for work that cannot be recorded, such as that which waits for what it computes.
        """


class GraphRecorder:
    """Implements `Recorder` by the graphs of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        self._latest: torch.cuda.CUDAGraph | None = None
        """Held on to: a pool without any graph cannot be gone on with."""

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Not by `torch.cuda.graph`: where a recording breaks, that leaves the thread on its stream.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    results = work()
                finally:
                    graph.capture_end()
            except BaseException:
                with suppress(RuntimeError):  # which a broken one leaves undone
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                raise
        self._latest = graph
        return graph.replay, results


def recorder_of(device: torch.device) -> Recorder | None:
    """None: nothing is gained by recording there."""
    return GraphRecorder(device) if device.type == "cuda" else None


def power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


def recurring(number: int, least: int) -> int:
    """The least of 4, 5, 6 and 7 times a power of two that is no less, and so at most a quarter more; below 8 all are.

    Sizes that are rounded up come again.
    """
    number = max(number, least)
    step = max(1, power(number + 1) // 8)
    return -(-number // step) * step


@dataclass(slots=True)
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], None]
    results: Sequence[Tensor]
    trusted: bool = False
    """Whether it has said the right thing of other inputs than those it was recorded with."""

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return [result.clone() for result in self.results]


class Replays:
    """The latest recordings. For one thread at a time."""

    def __init__(self, recorder: Recorder | None, kept: int = RECORDINGS_KEPT) -> None:
        """Without a recorder, all is done as if it were the first time."""
        self._recorder, self._kept = recorder, kept
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()
        """What was asked for once, and whether it may be recorded: not where there was too little memory for it."""

    def clear(self) -> None:
        """Forgets all: what they read or write beyond inputs and results has come to lie elsewhere."""
        self._recordings.clear()
        self._seen.clear()

    def run(
        self, key: Hashable, inputs: Sequence[Tensor], work: Work, changed: Sequence[Tensor] = ()
    ) -> Sequence[Tensor]:
        """The results of `work(inputs)`, to the bit. Raises what `work` raises.

        `key`, with the shapes of the inputs, says all that the work depends on besides. Tensors that it reads or writes
        beyond those given must lie where they lay, and doing it twice must be as good as once; `changed` are those that
        others read afterwards. Done the second time, it is recorded too. Then and the next time what the recording says
        is held against what the work says: where that is not the same, or nothing can be recorded, nothing is from then
        on.
        """
        if self._recorder is None:
            return work(inputs)
        whole = key, tuple((given.shape, given.dtype) for given in inputs)
        recording = self._recordings.get(whole)
        if recording is None:
            if self._seen.get(whole):
                return self._record(self._recorder, whole, inputs, work, changed)
            self._see(whole, recordable=whole not in self._seen)
            return work(inputs)
        self._recordings.move_to_end(whole)
        if recording.trusted:
            return recording.run(inputs)
        found = _copies([*recording.run(inputs), *changed])
        results = work(inputs)
        recording.trusted = self._judged(found, [*results, *changed])
        return results

    def _record(
        self, recorder: Recorder, key: Hashable, inputs: Sequence[Tensor], work: Work, changed: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        own = _copies(inputs)
        results = _copies(work(own))
        expected = [*results, *_copies(changed)]
        try:
            recording = _Recording(own, *recorder.record(partial(work, own)))
            for tensor in (*recording.results, *changed):
                _bytes(tensor).fill_(255)  # a recording that does nothing is not to find its results there
            if self._judged([*recording.run(inputs), *changed], expected):
                self._recordings[key] = recording
                while len(self._recordings) > self._kept:
                    self._recordings.popitem(last=False)
        except torch.OutOfMemoryError as error:
            logger.warning("there is too little memory to record a step, which takes longer: %s", error)
            self._see(key, recordable=False)
        except Exception as error:
            self._give_up(error)
        for tensor, known in zip(changed, expected[len(results) :], strict=True):
            tensor.copy_(known)
        return results

    def _judged(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        same = all(map(_same_bits, found, expected))
        if not same:
            self._give_up("a recording says something else than what was recorded")
        return same

    def _give_up(self, reason: object) -> None:
        logger.warning("steps cannot be recorded here, and small ones take longer: %s", reason)
        self._recorder = None
        self.clear()

    def _see(self, key: Hashable, *, recordable: bool) -> None:
        self._seen[key] = recordable
        self._seen.move_to_end(key)
        while len(self._seen) > SEEN_KEPT:
            self._seen.popitem(last=False)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same, be they numbers or none."""
    return one.shape == other.shape and torch.equal(_bytes(one.contiguous()), _bytes(other.contiguous()))
