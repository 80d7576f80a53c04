"""A device that is none: its tensors lie in memory, and nothing knows so but what computes with them here.

Whatever is made on it, brought to it or computed there is marked, and says that its device is `meta`. An operation on
tensors of both sides fails, as it does with CUDA; so does all that a device has no answer to, such as `numpy`. What the
numbers come to can be held against the processor's, and no device is needed.

Where there is one, `TUNESMITH_TEST_DEVICE=cuda` has the same tests use that, without pretence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Self

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tunesmith.decoder.replays import recorder_of

DEVICE = os.environ.get("TUNESMITH_TEST_DEVICE", "meta")
PRETENDED = DEVICE == "meta"
of_pretence = pytest.mark.skipif(not PRETENDED, reason="the device is a real one")
CROSSING = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
)
"""What a device has to be waited for."""


def _flash(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, _: Any, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What torch has for GPUs alone: causal attention of rows that lie one after another, [N, heads, d]."""
    longest, _, causal, scale, window, *more = options
    grouped = bool(more and more[0])  # what is as by default may be left out
    assert (causal, scale, window, grouped) == (True, None, [-1, 0], q.shape[1] != k.shape[1])
    assert q.dtype == torch.bfloat16 and all(x.stride(-1) == 1 for x in (q, k, v))
    out = torch.empty_like(q)
    for row, weights, (_, _, value) in _rows(q, k, v, edges, longest):
        out[row] = (weights @ value).transpose(0, 1).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    _, _, edges, _, longest = saved[:5]
    of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
    for row, weights, (query, key, value) in _rows(q, k, v, edges, longest):
        of_out = grad[row].float().transpose(0, 1)
        of_weights = of_out @ value.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
        for into, gradient in ((of_q, of_scores @ key), (of_k, of_scores.mT @ query), (of_v, weights.mT @ of_out)):
            shared = gradient.unflatten(0, (into.shape[1], -1)).sum(1)  # a key head has several query heads
            into[row] = shared.transpose(0, 1).to(into.dtype)
    return of_q, of_k, of_v


def _rows(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int
) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Where each is, the weights of its attention [H, T, T], and its queries, keys and values [H, T, d], in fp32."""
    ends = edges.tolist()
    assert edges.dtype == torch.int32 and ends[-1] == len(q)
    assert max(end - start for start, end in pairwise(ends)) <= longest
    for start, end in pairwise(ends):
        row = slice(start, end)
        group = q.shape[1] // k.shape[1]
        query, key, value = (x[row].float().transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(group, 0) for x in (key, value))
        scores = query @ key.mT * q.shape[2] ** -0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        yield row, scores.masked_fill(future, -torch.inf).softmax(-1), (query, key, value)


OF_DEVICES = {
    torch.ops.torch_attn._varlen_attn.default: _flash,
    torch.ops.torch_attn._varlen_attn_backward.default: _flash_backward,
}


class _There(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        shape = (held.shape, held.stride(), held.storage_offset())
        there = Tensor._make_wrapper_subclass(cls, *shape, dtype=held.dtype, device=torch.device(DEVICE))
        there.held = held
        return there

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _compute(operation, args, kwargs or {})


class _Making(TorchDispatchMode):
    """What is made on the device has no tensor among its arguments that could say so."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _compute(operation, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Lists that become tensors on the device, and tensors that become lists, without an operation to be seen."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is Tensor.__getitem__ and isinstance(args[0], _There) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(DEVICE))
        if function is Tensor.tolist and isinstance(args[0], _There):
            assert not _UNDER_WAY, "a list is asked for in the midst of a recording"
            args = (args[0].held,)
        return function(*args, **kwargs)


def _compute(operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    results = _computed(operation, args, kwargs)
    if _UNDER_WAY:
        _UNDER_WAY[-1].take_down(operation, args, kwargs, results)
    return results


def _computed(operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _There)]
    if there and operation not in CROSSING:
        # A number may be anywhere.
        here = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, _There)]
        assert not here, (
            f"{operation} of tensors on the device and of {[tuple(tensor.shape) for tensor in here]} on none"
        )
    asked = kwargs.get("device")
    marked = bool(there) if asked is None else torch.device(asked).type == DEVICE
    if operation is CROSSING[0]:
        marked = isinstance(args[0], _There)

    def unmark(leaf: Any) -> Any:
        return leaf.held if isinstance(leaf, _There) else leaf

    args, kwargs = tree_map(unmark, (args, kwargs))
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    known = {id(tensor.held): tensor for tensor in there}

    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not marked:
            return leaf
        return known[id(leaf)] if id(leaf) in known else _There(leaf)

    return tree_map(mark, OF_DEVICES.get(operation, operation)(*args, **kwargs))


class Tape:
    """Implements `replays.Recorder` as strictly as CUDA: what is computed again are operations on the same memory.

    What comes from beyond the device, and what has to be known before it goes on, cannot be recorded.
    """

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0
        self._taken: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[_There]]] = []

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """See `Recorder`."""
        self.recorded += 1
        if not PRETENDED:
            return self._record_truly(work)
        self._taken = taken = []
        _UNDER_WAY.append(self)
        try:
            results = work()
        finally:
            _UNDER_WAY.pop()
        for *_, made in taken:  # a graph says where its results will be, and does not compute them
            for leaf in made:
                leaf.held.detach().fill_(torch.nan if leaf.dtype.is_floating_point else 0)

        def replay() -> None:
            self.replayed += 1
            for operation, args, kwargs, made in taken:
                again = _made(_computed(operation, args, kwargs), (args, kwargs))
                for new, old in zip(again, made, strict=True):
                    old.held.detach().copy_(new.held.detach())

        return replay, results

    def _record_truly(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        recorder = recorder_of(torch.device(DEVICE))
        assert recorder is not None
        again, results = recorder.record(work)

        def replay() -> None:
            self.replayed += 1
            again()

        return replay, results

    def take_down(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> None:
        """One more operation of what is recorded. Raises RuntimeError."""
        sides = {isinstance(leaf, _There) for leaf in tree_leaves((args, results)) if isinstance(leaf, Tensor)}
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        counted = operation is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if (
            operation in WAITING
            or counted
            or (operation in CROSSING and len(sides) > 1)
            or (operation in INDEXING and masks)
        ):
            raise RuntimeError(f"{operation} is not permitted when stream is capturing")
        if True in sides:
            self._taken.append((operation, args, kwargs, _made(results, (args, kwargs))))


class Broken(Tape):
    """Says something else than it recorded, from its second replay on."""

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """See `Recorder`."""
        replay, results = super().record(work)

        def wrong() -> None:
            replay()
            if self.replayed > 1:
                results[0].add_(1e-3)

        return wrong, results


_UNDER_WAY: list[Tape] = []


def _made(results: Any, given: Any) -> list[_There]:
    """The tensors among the results of an operation that lie in memory of their own."""
    known = {_place(leaf) for leaf in tree_leaves(given) if isinstance(leaf, _There)}
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, _There) and _place(leaf) not in known]


def _place(tensor: _There) -> int:
    return tensor.held.untyped_storage().data_ptr()


@contextmanager
def pretended() -> Iterator[str]:
    """The name of the device. In this thread alone."""
    if not PRETENDED:
        yield DEVICE
        return
    with _Literals(), _Making():
        yield DEVICE
