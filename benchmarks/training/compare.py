"""Claim: our training step is several times as fast as the peers', in at most half the memory, at the same work.

    python -m benchmarks.training.compare --peers /path/to/peers/bin/python [--quick] [--model 10M] [--json]
    python -m benchmarks.training.compare --peers /path/to/peers/bin/python --device cuda --model 1B

The peers are TRL's SFTTrainer and transformers' Trainer, both with PEFT, each at several settings; per shape the
fastest counts. How to make their environment, and what was found: README.md beside this file.

Everybody gets the same checkpoint (random weights), the same rows as token ids, adapters of rank 16 on every linear
layer, the same batch, and loss on completion tokens alone. Measurements take turns, each in a fresh process with one
thread. The peers' settings are all tried in the first round; the two fastest go on to the others. Rates are medians of
the rounds, tokens without padding: for a second of processor time, or with `--device cuda` for a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import conclude, table
from benchmarks.training.forks import Competitor, Result
from benchmarks.training.shapes import MODELS, ROWS, Shape, read_tokens, useful_flops
from tunesmith.runs.local import trainer_environment

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "TRL defaults",
    "TRL fp32",
    "TRL bf16 packing",
    "TRL bf16 by length",
    "HF fp32",
    "HF fp32 by length",
    "HF bf16 by length",
)
"""`peers.SETTINGS` in the order in which they are tried; that module does not load without the peers."""
FINALISTS = 2
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
"""For the libraries of the peers."""
TARGETS = {"10M": 4.0, "31M": 3.0, "126M": 2.0}
ON_A_GPU = 1.5
"""Ours over the best peer, in tokens per second of processor time, or of a GPU's."""
GEMM_SHARE, MEMORY_SHARE = 0.45, 0.5
LARGE_BATCH = 64
"""From this batch on the share of the GEMM rate has a target."""
GEMM_SIZES = {"cpu": (512, 1_024, 2_048), "cuda": (4_096, 8_192)}
HEADER = ("shape", "ours", "best peer", "its setting", "ratio", "wall", "GEMM", "MiB", "TRL MiB")


@dataclass
class Cell:
    """Everything measured of one shape."""

    shape: Shape
    device: str
    flops_per_token: float
    ours: list[Result] = field(default_factory=list)
    peers: dict[str, list[Result]] = field(default_factory=dict)

    def summary(self, gemm_gflops: float) -> dict[str, Any]:
        """The medians, and how they compare."""
        on_cpu = self.device == "cpu"
        per, memory = ("cpu_s", "peak_rss_mib") if on_cpu else ("wall_s", "peak_device_mib")
        rates = {setting: _rate(results, per) for setting, results in self.peers.items()}
        best = max(rates, key=lambda setting: rates[setting])
        by_trl = [setting for setting in rates if setting.startswith("TRL")]
        trl = max(by_trl, key=lambda setting: rates[setting], default=None)
        ours = _rate(self.ours, per)
        return {
            "name": self.shape.name,
            "ratio": round(ours / rates[best], 2),
            "ratio_wall": round(_rate(self.ours, "wall_s") / _rate(self.peers[best], "wall_s"), 2),
            "per": per,
            "rate": round(ours),
            "tokens_per_s": round(_rate(self.ours, "wall_s")),
            "best_peer": best,
            "peer_rates": {setting: round(rate) for setting, rate in rates.items()},
            "peer_tokens_per_s": round(_rate(self.peers[best], "wall_s")),
            "gemm_share": round(ours * self.flops_per_token / 1e9 / gemm_gflops, 3),
            "peak_mib": round(_median(self.ours, memory)),
            "trl_setting": trl,
            "trl_peak_mib": None if trl is None else round(_median(self.peers[trl], memory)),
            "system_share": round(_median(self.ours, "system_share"), 3),
            "target": TARGETS[self.shape.model.name] if on_cpu else ON_A_GPU,
        }


def main() -> int:
    """Exit code 0 if every target is met."""
    options = _options()
    shapes = [
        shape
        for shape in _shapes(options.quick)
        if shape.model.name in ([options.model] if options.model else TARGETS)
        and (not options.rows or shape.rows.name in options.rows)
    ]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-")))
        log = options.log or scratch / "log"
        plain = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
        environment = trainer_environment(plain, options.threads)
        ours = stack.enter_context(Competitor(Path(sys.executable), "benchmarks.training.ours", environment, log))
        peers = stack.enter_context(Competitor(options.peers, "benchmarks.training.peers", plain, log))
        gemm: list[float] = []
        cells = [_measure(shape, ours, peers, scratch, options, gemm) for shape in shapes]
    summaries = [cell.summary(statistics.median(gemm)) for cell in cells]
    if not options.json:
        print(_table(summaries))
    misses = [miss for summary, cell in zip(summaries, cells, strict=True) for miss in _misses(summary, cell.shape)]
    facts = {"threads": options.threads, "gemm_gflops": round(statistics.median(gemm)), "misses": misses}
    return conclude("training", not misses, {"shapes": summaries, **facts})


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peers", type=Path, required=True, help="the Python of the peers' environment")
    options.add_argument("--model", choices=MODELS, help="only this one")
    options.add_argument("--quick", action="store_true", help="fewer shapes, shorter measurements")
    options.add_argument(
        "--rounds", type=int, default=3, help="of which the medians are taken; at least 3 to be quoted"
    )
    options.add_argument("--budget-s", type=float, help="seconds of one measurement; by default 8, quick 3")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", choices=GEMM_SIZES, default="cpu")
    options.add_argument("--precision", default="auto", help="of our products: auto, bfloat16 or float32")
    options.add_argument("--rows", choices=ROWS, action="append", help="only these")
    options.add_argument("--setting", choices=SETTINGS, action="append", help="try only these of the peers")
    options.add_argument("--log", type=Path, help="what the competitors print goes there")
    options.add_argument("--json", action="store_true", help="print the JSON line alone")
    chosen = options.parse_args()
    chosen.budget_s = chosen.budget_s or (3.0 if chosen.quick else 8.0)
    return chosen


def _shapes(quick: bool) -> Iterator[Shape]:
    """Batches of 8 and 64; for the largest model 4 and 16, since a peer's step would take minutes."""
    for model in MODELS.values():
        small, large = (4, 16) if model.name == "126M" else (8, LARGE_BATCH)
        for rows in ROWS.values():
            yield Shape(model, rows, small)
            if not quick or rows.name == "short":
                yield Shape(model, rows, large)


def _measure(
    shape: Shape, ours: Competitor, peers: Competitor, scratch: Path, options: argparse.Namespace, gemm: list[float]
) -> Cell:
    base, rows = scratch / shape.model.name, shape.rows.name
    if not base.exists():
        _checked(ours.perform({"task": "base", "model": shape.model.name, "folder": str(base)}))
    text, tokens = scratch / f"{rows}.jsonl", scratch / f"{rows}.tokens"
    if not tokens.exists():
        _checked(ours.perform({"task": "rows", "kind": rows, "n": 2_048, "text": str(text), "tokens": str(tokens)}))
    every = read_tokens(tokens)
    cell = Cell(shape, options.device, useful_flops(shape.model, every) / sum(len(row.token_ids) for row in every))
    task = {"base": str(base), "tokens": str(tokens), "batch": shape.batch, "threads": options.threads}
    task |= {"budget_s": options.budget_s, "device": options.device}
    mine = {**task, "task": "train", "text": str(text), "precision": options.precision}
    how = {"threads": options.threads, "precision": options.precision, "device": options.device}
    sizes = GEMM_SIZES[options.device]
    settings: Sequence[str] = options.setting or SETTINGS
    for number in range(options.rounds):
        rates = [_checked(ours.perform({"task": "gemm", "size": size, "budget_s": 0.3, **how})) for size in sizes]
        gemm.append(max(float(rate["gflops"]) for rate in rates))
        cell.ours.append(_checked(ours.perform(mine)))
        for setting in settings:
            cell.peers.setdefault(setting, []).append(_checked(peers.perform({**task, "setting": setting})))
        if number == 0:
            per = "cpu_s" if options.device == "cpu" else "wall_s"
            settings = sorted(settings, key=lambda setting: -_rate(cell.peers[setting], per))[:FINALISTS]
    print(json.dumps({"measured": shape.name, **cell.summary(statistics.median(gemm))}), file=sys.stderr, flush=True)
    return cell


def _checked(result: Result) -> Result:
    if "error" in result:
        raise SystemExit(f"a measurement failed: {result['error']}; --log FILE keeps what was printed")
    return result


def _rate(results: Sequence[Result], per: str) -> float:
    """Tokens per second."""
    return statistics.median(result["tokens"] / result[per] for result in results)


def _median(results: Sequence[Result], name: str) -> float:
    return statistics.median(result[name] for result in results)


def _misses(summary: Mapping[str, Any], shape: Shape) -> Iterator[str]:
    """Which targets a shape missed."""
    if summary["ratio"] < summary["target"]:
        yield f"{shape.name}: ratio {summary['ratio']} < {summary['target']}"
    if shape.batch >= LARGE_BATCH and summary["gemm_share"] < GEMM_SHARE:
        yield f"{shape.name}: {summary['gemm_share']} of the GEMM rate < {GEMM_SHARE}"
    by_trl = summary["trl_peak_mib"]
    if by_trl is not None and summary["peak_mib"] > MEMORY_SHARE * by_trl:
        yield f"{shape.name}: {summary['peak_mib']} MiB > {MEMORY_SHARE} of {by_trl}"


def _table(summaries: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for each in summaries:
        best = each["best_peer"]
        rate = each["peer_rates"][best]
        share = f"{each['gemm_share']:.1%}"
        memory = (each["peak_mib"], each["trl_peak_mib"])
        lines.append((each["name"], each["rate"], rate, best, each["ratio"], each["ratio_wall"], share, *memory))
    return table(HEADER, lines)


if __name__ == "__main__":
    sys.exit(main())
