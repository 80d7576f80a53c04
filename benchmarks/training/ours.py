"""Our side: `training.loop.train` itself on a run folder, as the platform starts it. Also makes what all share.

    python -m benchmarks.training.ours

Tasks come from `compare`; see `forks`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import tunesmith
from benchmarks.training import forks
from benchmarks.training.clock import Clock
from benchmarks.training.forks import Result, Task
from benchmarks.training.shapes import (
    ALPHA,
    CONTEXT_TOKENS,
    MODELS,
    RANK,
    ROWS,
    VOCABULARY_SIZE,
    ModelShape,
    Tokens,
    make_texts,
    write_tokens,
)
from tunesmith.adapters import checkpoint as adapter_checkpoint
from tunesmith.adapters.lora import initial
from tunesmith.data.formats import Example
from tunesmith.decoder import llama
from tunesmith.decoder.panels import Panels
from tunesmith.rundir import ResolvedHyperparameters, RunDir, RunSpec
from tunesmith.tokenizer import Tokenizer
from tunesmith.training import panels
from tunesmith.training.batches import Schedule, encode_rows, generator
from tunesmith.training.folded import product_dtype
from tunesmith.training.loop import train

SEED = 1
MANY_EPOCHS = 10_000
"""More than a measurement ever sees."""
TOKENIZER = Path(tunesmith.__file__).parent / "weights" / "tokenizer.json"
WORDS = 4_000
MOST_IN_FULL = 500_000_000
"""Larger models come in bf16, as they are found."""


def perform(task: Task) -> Result:
    """One of the tasks below, by its name."""
    arguments = {name: value for name, value in task.items() if name != "task"}
    return {"base": make_base, "rows": make_rows, "train": measure, "gemm": gemm}[task["task"]](**arguments)


def make_base(model: str, folder: str) -> Result:
    """A checkpoint with random weights, and the adapter that our training begins with."""
    shape, path = MODELS[model], Path(folder)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(shape.config(), indent=2))
    dtype = torch.bfloat16 if shape.parameters > MOST_IN_FULL else torch.float32
    state = {name: weight.to(dtype) for name, weight in _weights(shape)}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TOKENIZER, path / "tokenizer.json")
    layout = llama.load(path).config.layout
    # Adapters of ours cover the embedding too; here everybody trains the linear layers alone.
    bare = type(layout)(layout.path, layout.layers)
    start = initial(bare, rank=RANK, alpha=ALPHA, generator=generator(SEED, "factors"))
    adapter_checkpoint.save(start, path / "start", base_name_or_path=model, rank=RANK, alpha=ALPHA)
    return {"parameters": shape.parameters}


def _weights(shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    chance = torch.Generator().manual_seed(SEED)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=chance) * 0.02

    width, inner, keys = shape.width, shape.feed_forward_width, shape.width // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", matrix(VOCABULARY_SIZE, width)
    yield "model.norm.weight", torch.ones(width)
    for index in range(shape.layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", torch.ones(width)
        yield prefix + "post_attention_layernorm.weight", torch.ones(width)
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            yield f"{prefix}{name}.weight", matrix(rows, columns)


def make_rows(kind: str, n: int, text: str, tokens: str) -> Result:
    """Rows as a user would upload them, and as everybody trains on them."""
    tokenizer = Tokenizer.from_folder(TOKENIZER.parent)
    every = (tokenizer.token_text(token) for token in range(tokenizer.vocabulary_size))
    words = list(islice((word[1:] for word in every if word.startswith(" ") and word[1:].isalpha()), WORDS))
    texts = make_texts(ROWS[kind], words, n)
    Path(text).write_text("".join(json.dumps(asdict(row)) + "\n" for row in texts))
    examples = [Example(row.prompt, row.completion) for row in texts]
    rows = encode_rows(examples, tokenizer, context_tokens=CONTEXT_TOKENS, param="training_file")
    write_tokens(Path(tokens), [Tokens(list(row.token_ids), row.completion_start) for row in rows])
    return {"rows": len(rows), "tokens": sum(len(row.token_ids) for row in rows)}


def measure(
    base: str, text: str, tokens: str, batch: int, budget_s: float, threads: int, precision: str, device: str
) -> Result:
    """Steps of a whole run: the loop asks after each whether it is to stop, and that is the clock."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as scratch:
        run_dir = RunDir(Path(scratch))
        shutil.copy(text, run_dir.training_file)
        run_dir.write_spec(replace(_spec(base, batch, threads, precision), device=device))
        clock = Clock(budget_s, device)
        train(run_dir, stop_asked=clock.tick)
    with Path(tokens).open() as file:
        lengths = [len(json.loads(line)["token_ids"]) for line in file]
    steps = islice(Schedule(len(lengths), MANY_EPOCHS, batch, SEED).batches(0), len(clock.ends))
    return clock.result([sum(lengths[index] for index in indices) for indices in steps])


def _spec(base: str, batch: int, threads: int, precision: Any) -> RunSpec:
    return RunSpec(
        run_id="run-benchmark",
        job_id="ft-benchmark",
        base_dir=base,
        parent_adapter_dir=str(Path(base) / "start"),
        context_tokens=CONTEXT_TOKENS,
        hyperparameters=ResolvedHyperparameters(
            n_epochs=MANY_EPOCHS, batch_size=batch, learning_rate_multiplier=1.0, prompt_loss_weight=0.0
        ),
        base_learning_rate=1e-4,
        lora_rank=None,
        lora_alpha=None,
        seed=SEED,
        threads=threads,
        checkpoint_interval_s=30.0,
        precision=precision,
    )


def gemm(size: int, budget_s: float, threads: int, precision: str, device: str) -> Result:
    """Rate of a square product as a step of this precision has them, per second of one thread, or of a GPU."""
    torch.set_num_threads(threads)
    dtype = product_dtype(precision, torch.device(device))
    if device != "cpu":
        return {"gflops": _gemm_on(torch.device(device), size, budget_s, dtype)}
    library = panels.library() if dtype == torch.int16 else None
    a, b = (torch.randn(size, size, dtype=torch.float32 if dtype == torch.int16 else dtype) for _ in range(2))
    multiply = partial(torch.mm, a, b) if library is None else partial(Panels(library, b, bits=16).product, a)
    multiply()
    began, n = time.process_time(), 0
    while time.process_time() - began < budget_s:
        multiply()
        n += 1
    return {"gflops": 2e-9 * size**3 * n / (time.process_time() - began)}


def _gemm_on(device: torch.device, size: int, budget_s: float, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    n, began = 0, 0.0
    while n < 3 or time.perf_counter() - began < budget_s:
        torch.mm(a, b)
        torch.cuda.synchronize()
        n += 1
        began = time.perf_counter() if n == 3 else began  # the first are to warm up
    return 2e-9 * size**3 * (n - 3) / (time.perf_counter() - began)


if __name__ == "__main__":
    forks.serve(perform)
