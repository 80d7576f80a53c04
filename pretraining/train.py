"""Trains one model of the family from a token file. CPU and CUDA, resumes, deterministic data order.

    python -m pretraining.train ada --data build/train.bin --tokens 60e6 --out build/ada
    torchrun --nproc-per-node 2 -m pretraining.train babbage ... --compile      # two processes share each batch

Products in bf16, where the device multiplies it, over fp32 weights; Muon for the matrices inside the layers, Adam for
embedding and norms; a schedule of warm-up, plateau and linear decay to zero; short rows first, full context for the
last part, so that 2,048 tokens of context are really trained and most tokens cost the attention of 512.

A folder made by `pretraining.grow` is gone on with: its weights come from a smaller model, and the data from where that
model had stopped reading.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from pretraining.optimizer import Optimizer, Workers, gradient
from pretraining.recipe import Recipe
from pretraining.rows import rows
from pretraining.shapes import SHAPES, flops_per_token, random_llama, to_json
from pretraining.steps import steps
from tunesmith.decoder.base import to_device
from tunesmith.decoder.llama import Llama

# N = tokens of a micro-batch, R = its rows, T = tokens of a row


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    step: int
    tokens_before: int = 0
    """Tokens that the models this one was grown from had read."""
    tokens: int = 0
    """Of the whole run, where they follow from the time that it was given; 0: not told yet."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a run is carried out; changes its speed, and its weights by rounding alone."""

    device: str = "cpu"
    compile: bool = False
    autograd: bool = False
    """Whether gradients are torch's where compiled code of ours could make them."""
    checkpoint_every_steps: int = 100
    minutes: float | None = None
    """Instead of the recipe's tokens as many are read as fit into that, by the speed of the first steps."""
    keep_hot: bool = False
    """Keeps the model in `hot` as it is before the rate falls: what a larger one is to be grown from."""


def train(name: str, data: Path, out: Path, recipe: Recipe, run: Run) -> None:
    """The whole run: resume if there is a checkpoint, train to the last step, write the model folder."""
    out.mkdir(parents=True, exist_ok=True)
    workers = Workers.join(run.device)
    stream = np.memmap(data, dtype=np.uint16, mode="r")
    template = random_llama(SHAPES[name], torch.Generator().manual_seed(recipe.seed))
    learner = steps(template, device=run.device, compiled=run.compile, autograd=run.autograd)
    parameters = learner.parameters
    optimizer = Optimizer.over(parameters)
    progress = resume(out, optimizer)
    pace = Pace(time.monotonic(), progress.step)
    if run.minutes is not None:
        recipe = replace(recipe, tokens=progress.tokens or NEVER)
    micro_batches = range(workers.rank, recipe.batch_tokens // recipe.micro_batch_tokens, workers.count)

    while progress.step < recipe.steps:
        row = recipe.row_length(progress.step)
        loss_sum = torch.zeros((), device=run.device)
        learner.begin()
        for micro in micro_batches:
            begin = progress.tokens_before + progress.step * recipe.batch_tokens + micro * recipe.micro_batch_tokens
            read_RT = torch.from_numpy(rows(stream, begin // row, recipe.micro_batch_tokens // row, row))
            read_RT = to_device(read_RT, torch.device(run.device))
            ids_N, next_N = read_RT[:, :-1].flatten(), read_RT[:, 1:].flatten()
            loss_sum += learner.learn(ids_N, next_N, row, 1 / recipe.batch_tokens)
        workers.sum([loss_sum, *(gradient(p) for p in parameters)])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(progress.step, recipe, workers)
        progress = replace(progress, step=progress.step + 1)

        if run.minutes is not None and not progress.tokens:
            float(loss_sum)  # once it can be read, a device has computed it
            pace.step(progress.step)
            if pace.seconds:
                progress = replace(progress, tokens=pace.tokens(progress.step, recipe, 60 * run.minutes))
                recipe = replace(recipe, tokens=progress.tokens)
                print(
                    f"{recipe.tokens:,} tokens in {recipe.steps} steps fit into {run.minutes:.3g} minutes", flush=True
                )
        last = progress.step == recipe.steps
        if workers.rank == 0 and (progress.step % 20 == 0 or last):
            speed = (progress.step - pace.first_step) * recipe.batch_tokens / (time.monotonic() - pace.started)
            rate = speed * flops_per_token(SHAPES[name], row) / 1e12
            steps_in_all = "?" if recipe.tokens == NEVER else recipe.steps
            print(
                f"step {progress.step}/{steps_in_all} loss {float(loss_sum) / recipe.batch_tokens:.4f}"
                f" {speed:,.0f} tokens/s {rate:.3g} TFLOP/s",
                flush=True,
            )
        if workers.rank == 0 and (progress.step % run.checkpoint_every_steps == 0 or last):
            save(out, optimizer, progress)
        if workers.rank == 0 and run.keep_hot and progress.step == recipe.decay_begins:
            keep(out / "hot", template, optimizer, progress)
    if workers.rank == 0:
        write_model(out, template.over([p.detach().cpu() for p in parameters]))
    if workers.count > 1:
        dist.destroy_process_group()


NEVER = 1 << 60
"""Tokens of a run before it is known how many there is time for: so many that the rate never falls."""
SETTLED, MEASURED = 10, 20
"""Steps that a run takes before its speed is measured, and then over how many."""
ROOM = 0.9
"""Share of the time left that is planned for: long rows take longer."""


@dataclass(slots=True)
class Pace:
    """How long steps take."""

    started: float
    first_step: int
    first_s: float = 0.0
    """What the first step took, the compiler's work among it: it has as much again to do for long rows."""
    settled_at: float = 0.0
    seconds: float = 0.0
    """Of a step, once it is known."""

    def step(self, step: int) -> None:
        """One more step has ended."""
        now, taken = time.monotonic(), step - self.first_step
        if taken == 1:
            self.first_s = now - self.started
        if taken == SETTLED:
            self.settled_at = now
        if taken == SETTLED + MEASURED:
            self.seconds = (now - self.settled_at) / MEASURED

    def tokens(self, step: int, recipe: Recipe, budget_s: float) -> int:
        """Of the whole run, if it is to end in `budget_s` after its start: at least two steps more."""
        left_s = budget_s - (time.monotonic() - self.started) - self.first_s
        return (step + max(2, int(ROOM * left_s / self.seconds))) * recipe.batch_tokens


def keep(out: Path, template: Llama, optimizer: Optimizer, progress: Progress) -> None:
    """A folder that `pretraining.grow` makes larger models from."""
    out.mkdir(exist_ok=True)
    save(out, optimizer, progress)
    write_model(out, template.over([p.detach().cpu() for p in optimizer.parameters]))


def save(out: Path, optimizer: Optimizer, progress: Progress) -> None:
    """A checkpoint in one file, renamed into place."""
    groups = {"parameter": optimizer.parameters, "first": optimizer.first, "second": optimizer.second}
    tensors = {f"{kind}.{i}": t.detach().contiguous() for kind, ts in groups.items() for i, t in enumerate(ts)}
    save_file(tensors, out / "checkpoint.tmp", metadata={key: str(value) for key, value in asdict(progress).items()})
    (out / "checkpoint.tmp").replace(out / "checkpoint.safetensors")


def resume(out: Path, optimizer: Optimizer) -> Progress:
    """Loads the checkpoint of `out`, if there is one, into the optimizer; returns where to go on."""
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return Progress(step=0)
    groups = {"parameter": optimizer.parameters, "first": optimizer.first, "second": optimizer.second}
    with safe_open(path, framework="pt") as tensors, torch.no_grad():
        for kind, targets in groups.items():
            for index, target in enumerate(targets):
                target.copy_(tensors.get_tensor(f"{kind}.{index}"))
        return Progress(**{key: int(value) for key, value in tensors.metadata().items()})


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
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--tokens", type=float, default=0)
    length.add_argument("--minutes", type=float, help="as many tokens as fit into that")
    Recipe.add_options(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers; needs a C++ compiler or CUDA")
    parser.add_argument(
        "--autograd", action="store_true", help="torch's gradients even where compiled steps are faster"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint-every-steps", type=int, default=100)
    parser.add_argument(
        "--keep-hot", action="store_true", help="keep the model as it is before the rate falls, in OUT/hot"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe.of(arguments, tokens=int(arguments.tokens))
    run = Run(
        arguments.device,
        arguments.compile,
        arguments.autograd,
        arguments.checkpoint_every_steps,
        arguments.minutes,
        arguments.keep_hot,
    )
    train(arguments.name, arguments.data, arguments.out, recipe, run)


if __name__ == "__main__":
    main()
