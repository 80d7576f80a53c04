"""The two costly pieces of a training step with hand-made gradients: attention over short rows, and the loss.

Legend: B = rows, T = tokens of a row, N = B * T, H = query heads, K = key/value heads, d = head width, D = model width,
V = vocabulary; X = B * K, Q = queries that share a key head, (H / K) * T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_SHORT_ROW = 512
"""`ShortRowAttention` holds a matrix of row by row in its backward pass: beyond this the fused kernel is better."""


@dataclass(frozen=True, slots=True)
class CausalRows:
    """Each row attends to its own past."""

    rows: int
    compiled_on_cpu: bool = False
    """Then short rows are better off with `ShortRowAttention`."""

    def __call__(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, *, window: int | None = None) -> Tensor:
        """See `tunesmith.decoder.llama.Attend`. No model trained here has a window."""
        assert window is None
        q, k, v = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (q_NHd, k_NKd, v_NKd))
        if self.compiled_on_cpu and q.shape[2] <= LONGEST_SHORT_ROW:
            out_BHTd = ShortRowAttention.apply(q, k, v)
        else:
            out_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out_BHTd.transpose(1, 2).flatten(0, 1)


class ShortRowAttention(torch.autograd.Function):
    """Causal attention on a CPU: the fused forward kernel, and a backward pass of plain products to be compiled."""

    @staticmethod
    def forward(ctx, q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """The attention output [B, H, T, d]."""
        group = q_BHTd.shape[1] // k_BKTd.shape[1]
        k_BHTd, v_BHTd = (x.repeat_interleave(group, dim=1) for x in (k_BKTd, v_BKTd))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # it alone also gives the row sums
        out_BHTd, log_sum_BHT = flash(q_BHTd, k_BHTd, v_BHTd, 0.0, True)
        ctx.save_for_backward(q_BHTd, k_BKTd, v_BKTd, out_BHTd, log_sum_BHT)
        return out_BHTd

    @staticmethod
    def backward(ctx, grad_BHTd: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        """Query heads that share a key head are stacked as rows (Q = group * T) of one product."""
        q, k, v, out, log_sum = ctx.saved_tensors
        (rows, heads, length, width), kv_heads = q.shape, k.shape[1]
        group, scale = heads // kv_heads, width**-0.5
        q_XQd, grad_XQd = (x.reshape(rows * kv_heads, group * length, width) for x in (q, grad_BHTd))
        k_XTd, v_XTd = (x.reshape(rows * kv_heads, length, width) for x in (k, v))
        log_sum_XQ, dot_XQ = (
            x.reshape(rows * kv_heads, group * length, 1) for x in (log_sum, (grad_BHTd.float() * out.float()).sum(-1))
        )
        past = torch.arange(length) <= torch.arange(length).repeat(group)[:, None]
        score_XQT = torch.bmm(q_XQd, k_XTd.transpose(1, 2)).float() * scale
        p_XQT = torch.where(past, torch.exp(score_XQT - log_sum_XQ), 0.0)
        grad_score = p_XQT * (torch.bmm(grad_XQd, v_XTd.transpose(1, 2)).float() - dot_XQ) * scale
        p_XQT, grad_score = p_XQT.to(q.dtype), grad_score.to(q.dtype)
        return (
            torch.bmm(grad_score, k_XTd).view(q.shape),
            torch.bmm(grad_score.transpose(1, 2), q_XQd).view(k.shape),
            torch.bmm(p_XQT.transpose(1, 2), grad_XQd).view(v.shape),
        )


def softmax_gradient(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The summed loss; puts its gradient, softmax minus one-hot, in the place of the logits."""
    logits, target_N1 = logits_NV.float(), target_N[:, None]
    highest_N1 = logits.amax(-1, keepdim=True)
    log_sum_N1 = torch.exp(logits - highest_N1).sum(-1, keepdim=True).log() + highest_N1
    loss = (log_sum_N1 - logits.gather(1, target_N1)).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target_N1
    logits_NV.copy_(torch.exp(logits - log_sum_N1) - is_target.float())
    return loss


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy through a tied head; logits turn into their gradient in place, some positions at a time."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        scratch_nV: Tensor,
        to_gradient: Callable[[Tensor, Tensor], Tensor] = softmax_gradient,
    ) -> Tensor:
        """The loss; the gradients are computed here too, while the logits are at hand.

        `scratch_nV` is overwritten; it has rows for as many positions as are done at a time.
        """
        loss, grad_head_VD = hidden_ND.new_zeros((), dtype=torch.float32), torch.zeros_like(head_VD)
        grad_ND = torch.empty_like(hidden_ND)
        parts = (x.split(len(scratch_nV)) for x in (hidden_ND, target_N, grad_ND))
        for hidden_nD, target_n, grad_nD in zip(*parts, strict=True):
            logits_nV = torch.mm(hidden_nD, head_VD.T, out=scratch_nV[: len(hidden_nD)])
            loss = loss + to_gradient(logits_nV, target_n)
            torch.mm(logits_nV, head_VD, out=grad_nD)
            grad_head_VD.addmm_(logits_nV.T, hidden_nD)
        ctx.save_for_backward(grad_ND, grad_head_VD)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        """Scales what `forward` computed."""
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_head * grad_loss, None, None, None
