"""Claim: a thousand tuned models of one base answer behind one server, in bounded memory, at the speed of a single one.

    python -m benchmarks.serving.thousand

Imports 1,000 adapters (random, of `--rank`), then asks each for the first time, one after another; then measures the
rate of classifications (prompts of 300 tokens, one token with log-probabilities) of one model, of all models in any
order, and of all models as often as in life (the k-th most asked one 1/k as often as the first), in turn. The server
keeps 64 adapters in memory, as it does by default.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import conclude, parser, serving, table
from benchmarks.serving.adapters import bring
from benchmarks.serving.asking import Outcome, Work, drive, percentile, post, resident_mib
from benchmarks.serving.planted import package
from tests.e2e.harness import Server
from tests.engine.models import make_adapter
from tunesmith.core import box

RATIO = 0.8
ROUNDS = 3
PROMPT_TOKENS = 300
VOCABULARY = 16_000


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--models", type=int, default=1000)
    options.add_argument("--resident", type=int, default=64)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--requests", type=int, default=400, help="of each measurement")
    args = options.parse_args()
    torch.set_num_threads(1)
    settings = {"TUNESMITH_MAX_RESIDENT_ADAPTERS": str(args.resident)}
    with tempfile.TemporaryDirectory() as folder, serving(args, **settings) as server:
        base = args.base or box.unpack(box.BOX / "ada", Path(folder))
        before = resident_mib(server)
        begun = time.perf_counter()
        models = _import(server, base, Path(folder), args.models, args.rank)
        print(f"{args.models} adapters imported in {time.perf_counter() - begun:.0f} s")
        numbers = random.Random(1)
        cold = drive(server, 1, (_ask("cold", model, numbers) for model in models))
        warm = drive(server, 1, (_ask("warm", models[-1], numbers) for _ in range(args.requests // 4)))
        after_all = resident_mib(server)
        rates: dict[str, list[float]] = {"one model": [], "any order": [], "as in life": []}
        outcomes = [*cold, *warm]
        for turn in range(ROUNDS):
            orders = list(_orders(models, args.requests, seed=turn).items())
            for kind, asked in orders[turn:] + orders[:turn]:  # each is the first once: the machine may warm up
                begun = time.perf_counter()
                outcomes += drive(server, args.clients, (_ask(kind, model, numbers) for model in asked))
                rates[kind].append(args.requests / (time.perf_counter() - begun))
        memory = resident_mib(server)
    faults = Counter(outcome.fault for outcome in outcomes if outcome.fault is not None)
    for fault, number in faults.most_common(10):
        print(f"WRONG {number} times: {fault}")
    single = statistics.median(rates["one model"])
    ratios = {kind: statistics.median(found) / single for kind, found in rates.items()}
    print(
        table(
            ("requests", "a second", "ratio"), [(k, statistics.median(v), f"{ratios[k]:.2f}") for k, v in rates.items()]
        )
    )
    shown = [(kind, *(_ms(each, share) for share in (0.5, 0.99))) for kind, each in (("cold", cold), ("warm", warm))]
    print(table(("first call", "p50 ms", "p99 ms"), shown))
    stages = (("at the start", before), ("after each was asked", after_all), ("in the end", memory))
    print(table(("engine", "MiB"), [(stage, found["tunesmith.engine"]) for stage, found in stages]))
    facts = {
        "models": args.models,
        "resident": args.resident,
        "rank": args.rank,
        "ratios": {kind: round(ratio, 2) for kind, ratio in ratios.items()},
        "cold_p99_ms": round(_ms(cold, 0.99)),
        "warm_p99_ms": round(_ms(warm, 0.99)),
        "engine_mib": {stage: round(found["tunesmith.engine"]) for stage, found in stages},
        "faults": faults.total(),
    }
    return conclude("serving/thousand", min(ratios.values()) >= RATIO and not faults, facts)


def _import(server: Server, base: Path, folder: Path, count: int, rank: int) -> list[str]:
    """Models of adapters that are all different."""
    first = make_adapter(base, folder / "adapter", seed=0, rank=rank)
    weights = load_file(first / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    names = []
    for number in range(count):
        changed = {k: t + 0.01 * t.std() * torch.randn(t.shape, generator=generator) for k, t in weights.items()}
        save_file(changed, first / "adapter_model.safetensors")
        names.append(bring(server, package(first), number))
    return names


def _orders(models: Sequence[str], count: int, seed: int) -> dict[str, list[str]]:
    chance = random.Random(seed)
    return {
        "one model": [models[0]] * count,
        "any order": chance.choices(models, k=count),
        "as in life": chance.choices(models, weights=[1 / (place + 1) for place in range(len(models))], k=count),
    }


def _ask(kind: str, model: str, numbers: random.Random) -> Work:
    prompt = numbers.choices(range(1, VOCABULARY), k=PROMPT_TOKENS)
    return kind, partial(
        _classify, {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 2}
    )


async def _classify(body: dict[str, Any], client: httpx.AsyncClient) -> None:
    await post(client, "completions", body)


def _ms(outcomes: Sequence[Outcome], share: float) -> float:
    return percentile([outcome.seconds * 1000 for outcome in outcomes], share)


if __name__ == "__main__":
    sys.exit(main())
