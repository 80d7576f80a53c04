"""Claim: a step of generation in compiled code is faster than torch's, for one sequence and for many, adapters or not.

    python -m benchmarks.decode

Generates greedily after prompts of 64 tokens, in the engine itself, without a server: tokens a second of CPU time, with
compiled steps and with those of torch in turn, and the ratio of the medians. `--base` is a box model by name.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.common import conclude, parser, table
from tests.engine.models import make_adapter
from tunesmith.core import box
from tunesmith.engine import prompts
from tunesmith.engine.base import GenerateRequest, SamplingParams
from tunesmith.engine.runner import Runner

TIMES = 3
TOKENS = 60


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--box", default="babbage", help="model of the box, where no --base is given")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        base = args.base or box.unpack(box.BOX / args.box, Path(folder))
        adapters = [make_adapter(base, Path(folder) / f"adapter{seed}", seed=seed, rank=32) for seed in range(8)]
        for sequences in (1, 4, 16, 32):
            for n_adapters in (0, min(sequences, 8)):
                found: dict[bool, list[float]] = {True: [], False: []}
                for _ in range(TIMES):
                    for native in (True, False):
                        found[native].append(_tokens_a_second(base, adapters[:n_adapters], sequences, native))
                ours, theirs = (statistics.median(found[native]) for native in (True, False))
                ratios[f"{sequences} sequences, {n_adapters} adapters"] = ours / theirs
                rows.append([sequences, n_adapters, ours, theirs, f"{ours / theirs:.2f}"])
    print(table(["sequences", "adapters", "compiled, tokens/s", "torch, tokens/s", "ratio"], rows))
    return conclude("decode", all(ratio > 1 for ratio in ratios.values()), {"ratios": ratios})


def _tokens_a_second(base: Path, adapters: list[Path], sequences: int, native: bool) -> float:
    runner = Runner()
    names = adapters if adapters else [None]
    with nullcontext() if native else patch.object(prompts, "library", lambda: None):
        for index, adapter in enumerate(names):
            runner.load(str(index), str(base), None if adapter is None else str(adapter))
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0)
    for number in range(sequences):
        prompt = tuple(range(100 + number, 164 + number))
        runner.submit(number, GenerateRequest(str(number % len(names)), prompt, sampling))
    runner.step()  # the prompts
    before, tokens = time.process_time(), 0
    while runner.busy:
        tokens += len(runner.step())
    return tokens / (time.process_time() - before)


if __name__ == "__main__":
    sys.exit(main())
