"""Rows -> tensors for one forward pass, without padding. Knows shapes, no model.

The rows of a micro-batch lie one after another, so that every product of the model works on real tokens only.
Attention alone sees them padded on the right, where a causal row never looks: it needs no mask.

Legend: N = tokens of the micro-batch, B = its rows, T = its longest row, M = positions whose prediction is weighed,
C = those of them that predict completion tokens, H, K = query and key/value heads, d = head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.decoder.base import to_device
from tunesmith.training.batches import Row

MICRO_BATCH_TOKENS = 2_048
"""Tokens of one forward pass: enough to fill a processor, few enough to bound memory. A longer row goes alone."""

MOST_PADDED = 4
"""Cells of a part whose rows are all as long as the longest: at most so many for each token that it may have."""
PROCESSOR = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows for one forward pass, and the positions whose prediction counts."""

    token_ids_N: Tensor
    positions_N: Tensor
    token_of_cell_BT: Tensor
    """Which token stands in each cell of the padded shape; padding repeats token 0."""
    cell_of_token_N: Tensor
    """Where each token stands in the padded shape, flattened."""
    predicting_M: Tensor
    """Which tokens predict a token that is weighed: their next one."""
    target_M: Tensor
    """The ids of the tokens predicted."""
    weight_M: Tensor
    """1 for completion tokens, the prompt loss weight for prompt tokens."""
    completion_C: Tensor
    """Which of M predict completion tokens, row by row."""
    completion_lengths: tuple[int, ...]
    """Completion tokens of each row."""
    row_lengths: tuple[int, ...]
    """Tokens of each row; rows stand longest first."""
    source: tuple[int, ...]
    """Where each row stood among the rows that were cut into micro-batches."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch there."""
        if device.type == "cpu":
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {
            name: to_device(value, device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def attend(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, *, window: int | None = None) -> Tensor:
        """Causal attention within each row (`decoder.base.Attend`)."""
        q, k, v = (self._padded(x).transpose(1, 2) for x in (q_NHd, k_NKd, v_NKd))
        length, grouped = q.shape[2], q.shape[1] != k.shape[1]
        if grouped and q.device.type != "cpu":  # see `attention._Differentiated`
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            grouped = False
        if window is None or window >= length:
            a_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            band_TT = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
            a_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=band_TT, enable_gqa=grouped)
        a_NHd: Tensor = _Unpad.apply(a_BHTd.transpose(1, 2), self.cell_of_token_N)  # type: ignore[no-untyped-call]
        return a_NHd

    def _padded(self, x_NHd: Tensor) -> Tensor:
        x_BTHd: Tensor = _Pad.apply(x_NHd, self.token_of_cell_BT, self.cell_of_token_N)  # type: ignore[no-untyped-call]
        return x_BTHd


def micro_batches(
    rows: Sequence[Row],
    *,
    prompt_loss_weight: float,
    max_tokens: int = MICRO_BATCH_TOKENS,
    device: torch.device = PROCESSOR,
) -> list[MicroBatch]:
    """`rows`, longest first, cut so that each part holds at most `max_tokens` tokens; a longer row goes alone.

    Nor does a part get many short rows behind a long one, as long as which attention may have them.

    With weight 0 no prompt token is predicted at all: the vocabulary makes the widest product of a small model.
    """
    longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index].token_ids))
    parts: list[list[int]] = []
    room = longest = 0
    for index in longest_first:
        length = len(rows[index].token_ids)
        if not parts or length > room or (len(parts[-1]) + 1) * longest > MOST_PADDED * max_tokens:
            parts.append([])
            room, longest = max_tokens, length
        parts[-1].append(index)
        room -= length
    return [_pack([rows[index] for index in part], tuple(part), prompt_loss_weight).to(device) for part in parts]


def _pack(rows: Sequence[Row], source: tuple[int, ...], prompt_loss_weight: float) -> MicroBatch:
    token_ids = array("i")
    predicting: list[int] = []
    weights: list[float] = []
    completion: list[int] = []
    for row in rows:
        token_ids += row.token_ids
        # The first token of a row has no predictor; the completion's first is predicted by the prompt's last.
        n_prompt = row.completion_start - 1 if prompt_loss_weight > 0 else 0
        n_weighed = n_prompt + row.n_completion
        completion += range(len(predicting) + n_prompt, len(predicting) + n_weighed)
        predicting += range(len(token_ids) - 1 - n_weighed, len(token_ids) - 1)
        weights += [prompt_loss_weight] * n_prompt + [1.0] * row.n_completion
    token_ids_N, predicting_M = torch.frombuffer(token_ids, dtype=torch.int32).long(), torch.tensor(predicting)
    row_lengths = tuple(len(row.token_ids) for row in rows)
    length_B1 = torch.tensor(row_lengths)[:, None]
    column_BT = torch.arange(max(row_lengths)).expand(len(rows), -1)
    real_BT = column_BT < length_B1
    return MicroBatch(
        token_ids_N=token_ids_N,
        positions_N=column_BT[real_BT],
        token_of_cell_BT=(column_BT + length_B1.cumsum(0) - length_B1) * real_BT,
        cell_of_token_N=real_BT.flatten().nonzero()[:, 0],
        predicting_M=predicting_M,
        target_M=token_ids_N[predicting_M + 1],
        weight_M=torch.tensor(weights),
        completion_C=torch.tensor(completion),
        completion_lengths=tuple(row.n_completion for row in rows),
        row_lengths=row_lengths,
        source=source,
    )


class _Pad(torch.autograd.Function):
    """[N, H, d] -> [B, T, H, d]. No real token attends to padding, so no gradient comes from it."""

    @staticmethod
    def forward(ctx: Any, x_NHd: Tensor, token_of_cell_BT: Tensor, cell_of_token_N: Tensor) -> Tensor:
        ctx.save_for_backward(cell_of_token_N)
        return x_NHd[token_of_cell_BT]

    @staticmethod
    def backward(ctx: Any, gradient_BTHd: Tensor) -> tuple[Tensor, None, None]:
        (cell_of_token_N,) = ctx.saved_tensors
        return gradient_BTHd.flatten(0, 1).index_select(0, cell_of_token_N), None, None


class _Unpad(torch.autograd.Function):
    """[B, T, H, d] -> [N, H, d]."""

    @staticmethod
    def forward(ctx: Any, x_BTHd: Tensor, cell_of_token_N: Tensor) -> Tensor:
        ctx.save_for_backward(cell_of_token_N)
        ctx.shape = x_BTHd.shape
        return x_BTHd.flatten(0, 1).index_select(0, cell_of_token_N)

    @staticmethod
    def backward(ctx: Any, gradient_NHd: Tensor) -> tuple[Tensor, None]:
        (cell_of_token_N,) = ctx.saved_tensors
        rows, width, heads, head_width = ctx.shape
        cells = gradient_NHd.new_zeros(rows * width, heads, head_width)
        return cells.index_copy_(0, cell_of_token_N, gradient_NHd).view(ctx.shape), None
