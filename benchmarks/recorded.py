"""Claim: on a GPU recorded steps are faster than others, and one stream reads weights at 60 % of the memory's rate.

    python -m benchmarks.recorded [--device cuda] [--model 1B]

A Llama with random weights in bf16. Steps of generation in the engine itself, without a server: tokens a second for 1,
8 and 64 sequences, of the base and of up to 50 adapters, recorded and not, in turn. Share of the memory's rate: the
bytes of the weights, read once a step, beside a copy of half a GiB. Then steps of training with 1, 4 and 16 short rows.
`--device cpu --model 10M` is to rehearse it: nothing is recorded there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.common import conclude, table
from benchmarks.training import ours as training
from benchmarks.training.shapes import MODELS, RANK, ROWS
from tests.engine.models import make_adapter
from tunesmith.decoder import replays
from tunesmith.engine.base import GenerateRequest, SamplingParams
from tunesmith.engine.runner import Runner

TIMES = 3
TOKENS = 128
ADAPTERS = 50
SHARE = 0.6
HEADER = ["what", "recorded", "asked for", "ratio"]


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = _options()
    device, model = options.device, MODELS[options.model]
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as folder:
        base = Path(folder) / "base"
        training.make_base(options.model, str(base))
        adapters = [make_adapter(base, Path(folder) / f"{i}", seed=2 * i, rank=RANK) for i in range(options.adapters)]
        for sequences in options.sequences:
            for count in sorted({0, min(sequences, options.adapters)}):
                what = f"generation, {sequences} sequences, {count} adapters"
                found[what] = _both(_generate, base, adapters[:count], sequences, device)
        text, tokens = Path(folder) / "text", Path(folder) / "tokens"
        training.make_rows("short", 512, str(text), str(tokens))
        for batch in (1, 4, 16):
            found[f"training, batch of {batch} {ROWS['short'].name} rows"] = _both(
                _train, base, text, tokens, batch, device
            )
    one = found["generation, 1 sequences, 0 adapters"][0]
    share = one * 2 * model.parameters / _copied_bytes_a_second(device)
    print(table(HEADER, [(what, *pair, f"{pair[0] / pair[1]:.2f}") for what, pair in found.items()]))
    print(f"one stream reads {share:.0%} of the memory's rate")
    ratios = {what: recorded / asked for what, (recorded, asked) in found.items()}
    holds = share >= SHARE and all(ratio > 1 for ratio in ratios.values())
    return conclude("recorded", holds, {"memory_share": share, "ratios": ratios, "tokens_per_s": found})


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--model", choices=MODELS, default="1B")
    options.add_argument("--adapters", type=int, default=ADAPTERS)
    options.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    return options.parse_args()


def _both(work: Callable[..., float], *arguments: object) -> tuple[float, float]:
    """Medians of its rates, with recordings and without, in turn."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TIMES):
        for recording in (True, False):
            with _recording(recording):
                rates[recording].append(work(*arguments))
    return statistics.median(rates[True]), statistics.median(rates[False])


@contextmanager
def _recording(wanted: bool) -> Iterator[None]:
    if wanted:
        yield
    else:
        with patch.object(replays, "recorder_of", lambda _: None):
            yield


def _generate(base: Path, adapters: list[Path], sequences: int, device: str) -> float:
    """Tokens a second, once all shapes have come twice."""
    runner = Runner(precision="bfloat16", device=device, max_running=64)
    names = adapters if adapters else [None]
    for index, adapter in enumerate(names):
        runner.load(str(index), str(base), None if adapter is None else str(adapter))
    for timed in (False, True):
        for number in range(sequences):
            prompt = tuple(range(100 + number, 164 + number))
            sampling = SamplingParams(max_tokens=TOKENS, temperature=0)
            runner.submit(number, GenerateRequest(str(number % len(names)), prompt, sampling))
        runner.step()  # the prompts
        began, tokens = time.perf_counter(), 0
        while runner.busy:
            tokens += len(runner.step())
        if timed:
            return tokens / (time.perf_counter() - began)
    raise AssertionError


def _train(base: Path, text: Path, tokens: Path, batch: int, device: str) -> float:
    """Tokens a second."""
    paths = str(base), str(text), str(tokens)
    result = training.measure(*paths, batch, budget_s=3.0, threads=1, precision="bfloat16", device=device)
    return float(result["tokens"] / result["wall_s"])


def _copied_bytes_a_second(device: str) -> float:
    """Read and written."""
    source = torch.zeros(1 << 29, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * len(source) / statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
