"""Claim: served log-probabilities are those of the trainer's evaluation, however they are asked for.

Within the bounds of the gate (`runs/parity.py`): 1e-4 nats in float32, more in bfloat16 and int8.

    python -m benchmarks.parity_rows [--precision bfloat16]

Two models are tuned on one base. For each completion token of each validation row, the trainer's own log-probability
is compared with what the server answers: plain, streamed, as echo, and with requests for both models and their base in
flight together. Plain and streamed answers are steered to the token by `logit_bias`, which log-probabilities ignore.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common import conclude, parser, read_rows, serving, table
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import Server, messages, reviews, upload, wait_for
from tunesmith.client import Client
from tunesmith.runs.parity import BOUNDS

AT_ONCE = 16

Ask = Callable[[str, dict[str, Any]], list[float]]


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=200)
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--precision", choices=tuple(BOUNDS), default="float32", help="of the engine")
    args = options.parse_args()
    rows = read_rows(args.data, 1000 + args.rows) if args.data else reviews(400 + args.rows, seed=1)
    training, validation = rows[: -args.rows], rows[-args.rows :]

    bound = BOUNDS[args.precision]
    with serving(args, TUNESMITH_ENGINE_PRECISION=args.precision) as server, server.client() as client:
        first, second = (_tune(server, client, training[part::2], validation, args.epochs) for part in (0, 1))
        ways: dict[str, Ask] = {
            "plain": lambda model, row: _plain(client, model, row),
            "streamed": lambda model, row: _streamed(client, model, row),
            "echo": lambda model, row: _echo(client, model, row),
        }
        lines: list[tuple[str, list[tuple[float, float]]]] = []
        for way, ask in ways.items():
            name, trained = first
            lines.append((way, _pairs((row["logprobs"], ask(name, row)) for row in trained)))
        lines.append(("batched with another adapter", _pairs(_batched(client, [first, second]))))

    differences = {way: [abs(one - other) for one, other in found] for way, found in lines}
    shown = [(way, len(each), f"{statistics.mean(each):.2e}", f"{max(each):.2e}") for way, each in differences.items()]
    print(table(("served", "log-probabilities", "mean difference, nats", "largest"), shown))
    worst = max(max(each) for each in differences.values())
    within = all(abs(one - other) <= bound.of(one) for _, found in lines for one, other in found)
    print(f"{len(first[1])} validation rows; allowed are {bound.nats:g} nats and {bound.share:.0%} of the number")
    means = {way: statistics.mean(each) for way, each in differences.items()}
    numbers = {"precision": args.precision, "rows": len(first[1]), "largest_difference_nats": worst, "means": means}
    return conclude("parity_rows", within, numbers)


def _tune(
    server: Server, client: Client, training: list[dict[str, str]], validation: list[dict[str, str]], epochs: int
) -> tuple[str, list[dict[str, Any]]]:
    """A tuned model's name, and the rows of its validation file with the trainer's log-probabilities."""
    files = {"training_file": upload(client, training), "validation_file": upload(client, validation)}
    job = client.post("fine-tunes", body=files | {"model": "ada", "n_epochs": epochs})
    job = wait_for(client, job["id"], within_s=3600.0)
    assert job["status"] == "succeeded", messages(job)
    return job["fine_tuned_model"], json.loads(run_dir_of(server, job["id"]).parity.read_text())["rows"]


def _pairs(rows: Iterable[tuple[list[float], list[float]]]) -> list[tuple[float, float]]:
    """The trainer's log-probability of each token, and the served one, in nats."""
    return [pair for trained, served in rows for pair in zip(trained, served, strict=True)]


def _steered(model: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """One request for each completion token, which it makes the model give."""
    ids, start = row["token_ids"], row["completion_start"]
    return [
        {"model": model, "prompt": ids[:at], "max_tokens": 1, "logprobs": 0, "logit_bias": {str(ids[at]): 100}}
        | {"temperature": 0}
        for at in range(start, len(ids))
    ]


def _plain(client: Client, model: str, row: dict[str, Any]) -> list[float]:
    return [
        client.post("completions", body=body)["choices"][0]["logprobs"]["token_logprobs"][0]
        for body in _steered(model, row)
    ]


def _streamed(client: Client, model: str, row: dict[str, Any]) -> list[float]:
    found: list[float] = []
    for body in _steered(model, row):
        for chunk in client.stream("completions", body=body | {"stream": True}):
            for choice in chunk["choices"]:
                found += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
    return found


def _echo(client: Client, model: str, row: dict[str, Any]) -> list[float]:
    body = {"model": model, "prompt": row["token_ids"], "max_tokens": 0, "echo": True, "logprobs": 0}
    scored = client.post("completions", body=body)["choices"][0]["logprobs"]["token_logprobs"]
    return list(scored[row["completion_start"] :])


def _batched(
    client: Client, tuned: list[tuple[str, list[dict[str, Any]]]]
) -> Iterable[tuple[list[float], list[float]]]:
    """Rows of all models and of their base in turn, many in flight at once; the base's answers only fill batches."""
    asked = [
        (name, row)
        for together in zip(*(rows for _, rows in tuned), strict=True)
        for (name, _), row in zip(tuned, together, strict=True)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        fillers = [pool.submit(_plain, client, "ada", row) for _, row in asked[::4]]
        answers = list(pool.map(lambda one: _plain(client, *one), asked))
        for filler in fillers:
            filler.result()
    return [(row["logprobs"], answer) for (_, row), answer in zip(asked, answers, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
