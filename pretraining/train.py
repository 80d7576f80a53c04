"""Trains one model of the family from a token file. CPU and CUDA, resumes, deterministic data order.

    python -m pretraining.train ada --data build/train.bin --tokens 60e6 --out build/ada

bf16 arithmetic over fp32 weights; Muon for the matrices inside the layers, Adam for embedding and norms; a schedule of
warm-up, plateau and linear decay to zero; short rows first, full context for the last part, so that 2,048 tokens of
context are really trained and most tokens cost the attention of 512.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretraining.shapes import SHAPES, to_json
from tunesmith.decoder.llama import Layer, Llama, LlamaConfig

# B = rows, T = tokens of a row, N = B * T, D = width, V = vocabulary


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights besides the data and the shape."""

    tokens: int
    batch_tokens: int = 16_384
    micro_batch_tokens: int = 4_096
    row_tokens: int = 512
    long_row_tokens: int = 2_048
    long_share: float = 0.15
    """Share of the tokens, at the end, that is trained in long rows."""
    muon_learning_rate: float = 0.01
    adam_learning_rate: float = 0.003
    warmup_steps: int = 100
    decay_share: float = 0.45
    seed: int = 0

    @property
    def steps(self) -> int:
        """Number of optimizer updates."""
        return self.tokens // self.batch_tokens

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at `step`."""
        warmup = (step + 1) / self.warmup_steps
        decay = (self.steps - step) / max(1.0, self.steps * self.decay_share)
        return min(1.0, warmup, decay)

    def row_length(self, step: int) -> int:
        """Tokens of a row at `step`."""
        return self.long_row_tokens if step >= self.steps * (1 - self.long_share) else self.row_tokens


def random_llama(config: LlamaConfig, generator: torch.Generator) -> Llama:
    """A model with fresh fp32 weights; the products that write into the residual stream begin at zero."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    layers = [
        Layer(
            attention_norm_D=torch.ones(config.width),
            qkv=matrix(config.query_width + 2 * config.key_width, config.width),
            qkv_bias=None,
            q_norm_d=None,
            k_norm_d=None,
            o=torch.zeros(config.width, config.query_width),
            feed_norm_D=torch.ones(config.width),
            gate_up=matrix(2 * config.feed_forward_width, config.width),
            down=torch.zeros(config.width, config.feed_forward_width),
        )
        for _ in range(config.layers)
    ]
    embedding = torch.randn(config.vocabulary_size, config.width, generator=generator) * 0.02
    return Llama(config, embedding, layers, torch.ones(config.width), embedding)


def with_parameters(model: Llama, parameters: list[Tensor]) -> Llama:
    """The same model over other tensors, in the order of `Llama.parameters`."""
    supply = iter(parameters)
    embedding = next(supply)
    layers = [
        Layer(
            attention_norm_D=next(supply),
            qkv=next(supply),
            qkv_bias=None,
            q_norm_d=None,
            k_norm_d=None,
            o=next(supply),
            feed_norm_D=next(supply),
            gate_up=next(supply),
            down=next(supply),
        )
        for _ in model.layers
    ]
    return Llama(model.config, embedding, layers, next(supply), embedding)


@dataclass(frozen=True, slots=True)
class CausalRows:
    """Each row attends to its own past."""

    rows: int

    def __call__(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        """See `tunesmith.decoder.llama.Attend`."""
        q, k, v = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (q_NHd, k_NKd, v_NKd))
        out_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out_BHTd.transpose(1, 2).flatten(0, 1)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy through a tied head, chunk by chunk: the [N, V] logits never exist as a whole."""

    CHUNK = 256
    """Rows at once."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """The loss; the gradients are computed here too, while a chunk's logits are in cache."""
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_head = torch.empty_like(hidden_ND), torch.zeros_like(head_VD, dtype=torch.float32)
        narrow = hidden_ND.new_empty(HeadLoss.CHUNK, len(head_VD))  # reused: fresh pages cost more than the arithmetic
        logits = torch.empty_like(narrow, dtype=torch.float32)
        for start in range(0, len(hidden_ND), HeadLoss.CHUNK):
            rows = slice(start, start + HeadLoss.CHUNK)
            h, target = hidden_ND[rows], target_N[rows, None]
            narrow, logits = narrow[: len(h)], logits[: len(h)]
            logits.copy_(torch.mm(h, head_VD.T, out=narrow))
            logits -= logits.amax(-1, keepdim=True)
            target_logit = logits.gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (total.log() - target_logit).sum()
            narrow.copy_(logits.mul_(1 / total).scatter_add_(1, target, torch.full_like(total, -1.0)))
            grad_hidden[rows] = narrow @ head_VD
            grad_head += narrow.T @ h
        ctx.save_for_backward(grad_hidden, grad_head.to(head_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        """Scales what `forward` computed."""
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_head * grad_loss, None


@dataclass(slots=True)
class Optimizer:
    """Muon for matrices inside the layers, Adam for the rest; momentum and moments are the state."""

    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]

    @classmethod
    def over(cls, parameters: list[Tensor]) -> Optimizer:
        """An optimizer at rest."""
        return cls(parameters, [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters])

    @torch.no_grad()
    def step(self, step: int, recipe: Recipe) -> None:
        """One update from the `.grad` of every parameter."""
        rate = recipe.rate(step)
        for index, (parameter, first, second) in enumerate(zip(self.parameters, self.first, self.second, strict=True)):
            grad = parameter.grad
            assert grad is not None
            if parameter.ndim == 2 and index > 0:
                first.mul_(0.95).add_(grad)
                update = orthogonal(grad + 0.95 * first)
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - 0.01 * rate * recipe.muon_learning_rate)
                parameter.sub_(update * (rate * recipe.muon_learning_rate * scale))
            else:
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.05)
                bias_1, bias_2 = 1 - 0.9 ** (step + 1), 1 - 0.95 ** (step + 1)
                parameter.sub_(rate * recipe.adam_learning_rate * (first / bias_1) / ((second / bias_2).sqrt() + 1e-8))
            parameter.grad = None


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values near 1, by five Newton-Schulz steps.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).float()


def train(name: str, data: Path, out: Path, recipe: Recipe, device: str, checkpoint_every_steps: int) -> None:
    """The whole run: resume if there is a checkpoint, train to the last step, write the model folder."""
    out.mkdir(parents=True, exist_ok=True)
    stream = np.memmap(data, dtype=np.uint16, mode="r")
    template = random_llama(SHAPES[name], torch.Generator().manual_seed(recipe.seed))
    parameters = [p.to(device).requires_grad_() for p in template.parameters()]
    optimizer = Optimizer.over(parameters)
    step = resume(out, optimizer)
    started, start_step = time.monotonic(), step

    while step < recipe.steps:
        # The next batch is the next stretch of the stream, which begins again at its end.
        row = recipe.row_length(step)
        loss_sum = 0.0
        for micro in range(recipe.batch_tokens // recipe.micro_batch_tokens):
            begin = (step * recipe.batch_tokens + micro * recipe.micro_batch_tokens) % (
                len(stream) - recipe.micro_batch_tokens - 1
            )
            chunk = torch.from_numpy(stream[begin : begin + recipe.micro_batch_tokens + 1].astype(np.int64)).to(device)
            rows = recipe.micro_batch_tokens // row
            model = with_parameters(template, [p.bfloat16() for p in parameters])
            positions = torch.arange(row, device=device).repeat(rows)
            hidden_ND = model.hidden(chunk[:-1], positions, CausalRows(rows))
            loss = HeadLoss.apply(hidden_ND, model.head_VD, chunk[1:])
            (loss / recipe.batch_tokens).backward()
            loss_sum += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(step, recipe)
        step += 1

        if step % 20 == 0 or step == recipe.steps:
            speed = (step - start_step) * recipe.batch_tokens / (time.monotonic() - started)
            print(
                f"step {step}/{recipe.steps} loss {loss_sum / recipe.batch_tokens:.4f} {speed:,.0f} tokens/s",
                flush=True,
            )
        if step % checkpoint_every_steps == 0:
            save(out, optimizer, step)
    save(out, optimizer, step)
    write_model(out, with_parameters(template, [p.detach().cpu() for p in parameters]))


def save(out: Path, optimizer: Optimizer, step: int) -> None:
    """A checkpoint in one file, renamed into place."""
    groups = {"parameter": optimizer.parameters, "first": optimizer.first, "second": optimizer.second}
    tensors = {f"{kind}.{i}": t.detach().contiguous() for kind, ts in groups.items() for i, t in enumerate(ts)}
    save_file(tensors, out / "checkpoint.tmp", metadata={"step": str(step)})
    (out / "checkpoint.tmp").replace(out / "checkpoint.safetensors")


def resume(out: Path, optimizer: Optimizer) -> int:
    """Loads the checkpoint of `out`, if there is one, into the optimizer; returns the step to go on with."""
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return 0
    groups = {"parameter": optimizer.parameters, "first": optimizer.first, "second": optimizer.second}
    with safe_open(path, framework="pt") as tensors, torch.no_grad():
        for kind, targets in groups.items():
            for index, target in enumerate(targets):
                target.copy_(tensors.get_tensor(f"{kind}.{index}"))
        return int(tensors.metadata()["step"])


def write_model(out: Path, model: Llama) -> None:
    """An ordinary checkpoint folder: `config.json` and `model.safetensors` in fp32."""
    (out / "config.json").write_text(json.dumps(to_json(model.config), indent=2) + "\n")
    state = {name: tensor.contiguous().clone() for name, tensor in model.state().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Command line: a shape and a token file in, a model folder out."""
    parser = argparse.ArgumentParser(description="Train one model of the family from a token file.")
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, required=True)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--long-share", type=float, default=0.15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint-every-steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(
        tokens=int(arguments.tokens),
        batch_tokens=arguments.batch_tokens,
        row_tokens=arguments.row_tokens,
        long_share=arguments.long_share,
    )
    train(arguments.name, arguments.data, arguments.out, recipe, arguments.device, arguments.checkpoint_every_steps)


if __name__ == "__main__":
    main()
