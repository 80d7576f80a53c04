"""Work of a GPU that comes again and again in the same shapes: recorded once, then asked for with one call.

A small step is a thousand operations, and Python takes longer to ask for one than a GPU to do it. Knows nothing of what
the work is.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RECORDINGS_KEPT = 64
"""Of a GPU's memory each takes some megabytes for its list of operations; what they compute with they share."""

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
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            results = work()
        return graph.replay, results


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same there. A GPU is not waited for: from other memory than pinned it would be, until all it has is done."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], None]
    results: Sequence[Tensor]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return [result.clone() for result in self.results]


class Replays:
    """What was recorded, or None for what was asked for once: the latest few. For one thread at a time."""

    def __init__(self, recorder: Recorder | None, kept: int = RECORDINGS_KEPT) -> None:
        """Without a recorder, all is done as if it were the first time."""
        self._recorder, self._kept = recorder, kept
        self._known: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def run(self, key: Hashable, inputs: Sequence[Tensor], work: Work) -> Sequence[Tensor]:
        """The results of `work(inputs)`, to the bit. Raises what `work` raises.

        `key`, with the shapes of the inputs, says all that the work depends on besides; tensors that it reads or writes
        beyond those given must lie where they lay, and must be such that doing it twice is as good as once. Done the
        second time, it is recorded too, and what the recording says is held against what it said: where that is not the
        same, or nothing can be recorded, nothing is from then on.
        """
        if self._recorder is None:
            return work(inputs)
        whole = key, tuple((given.shape, given.dtype) for given in inputs)
        recording = self._known.get(whole)
        if recording is not None:
            self._known.move_to_end(whole)
            return recording.run(inputs)
        if whole in self._known:
            return self._record(self._recorder, whole, inputs, work)
        self._keep(whole, None)
        return work(inputs)

    def _record(self, recorder: Recorder, key: Hashable, inputs: Sequence[Tensor], work: Work) -> Sequence[Tensor]:
        own = [given.clone() for given in inputs]
        expected = [result.clone() for result in work(own)]
        try:
            recording = _Recording(own, *recorder.record(partial(work, own)))
            if not all(map(_same_bits, recording.run(inputs), expected)):
                raise RuntimeError("a recording says something else than what was recorded")
        except RuntimeError as error:
            logger.warning("steps cannot be recorded here, and small ones take longer: %s", error)
            self._recorder = None
            self._known.clear()
            return expected
        self._keep(key, recording)
        return expected

    def _keep(self, key: Hashable, recording: _Recording | None) -> None:
        self._known[key] = recording
        self._known.move_to_end(key)
        while len(self._known) > self._kept:
            self._known.popitem(last=False)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same, be they numbers or none."""
    flat = (each.contiguous().flatten().view(torch.uint8) for each in (one, other))
    return one.shape == other.shape and torch.equal(*flat)
