"""Every architecture: tuned, saved, served; trainer, engine, PEFT and the wire agree on the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.architectures import FOREIGN, OWN, Bits, in_plain_products, make_base
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import Server, messages, put_base, reviews, upload, wait_for
from tests.training.rows import CLASSIFY, examples, make_run
from tunesmith.client import Client
from tunesmith.engine.base import GenerateRequest, PromptScored, SampledToken, SamplingParams
from tunesmith.engine.messages import Ended, Produced
from tunesmith.engine.runner import Runner
from tunesmith.rundir import RunDir
from tunesmith.training.loop import train

TOLERANCE_NATS = 1e-4
PRODUCTS = (
    "results.csv",
    "progress.jsonl",
    "parity.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
)


BASES: dict[str, tuple[dict[str, Any], Bits]] = {
    **{name: (config, 32) for name, config in (OWN | FOREIGN).items()},
    "qwen2 in bf16": (OWN["qwen2"], 16),
    "llama in 4 bits": (OWN["llama"], 4),
}


@pytest.fixture(scope="module", params=BASES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunDir]]:
    """A base and two runs that tuned it on different rows."""
    folder = tmp_path_factory.mktemp("tuned")
    config, bits = BASES[request.param]
    base = make_base(folder / "base", config, bits=bits)
    runs = [_run(folder / str(first), base, first) for first in (0, 9)]
    for run_dir in runs:
        outcome = train(run_dir)
        assert outcome is not None
        assert outcome.status == "succeeded"
    return base, runs


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_peft_gives_what_the_trainer_reports(tuned: tuple[Path, list[RunDir]]) -> None:
    base, (run_dir, _) = tuned
    network = in_plain_products(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    theirs = PeftModel.from_pretrained(network, str(run_dir.adapter)).eval()
    tensors = {name: tensor for name, tensor in theirs.named_parameters() if "lora_" in name}
    assert all(tensor.any() for tensor in tensors.values())  # it found all of ours, and has none besides
    for row in _parity(run_dir):
        ids, start = row["token_ids"], row["completion_start"]
        with torch.no_grad():
            logprobs_TV = theirs(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
        expected = logprobs_TV[range(start - 1, len(ids) - 1), ids[start:]]
        assert row["logprobs"] == pytest.approx(expected.tolist(), abs=TOLERANCE_NATS)


def test_the_engine_gives_what_the_trainer_reports(tuned: tuple[Path, list[RunDir]]) -> None:
    """Echoed and steered token by token: one request at a time, and all at once with both adapters and the base."""
    base, runs = tuned
    runner = Runner(step_tokens=64)  # the longest rows go in chunks
    runner.load("base", str(base), None)
    asked: list[tuple[GenerateRequest, list[float]]] = []
    for index, run_dir in enumerate(runs):
        runner.load(str(index), str(base), str(run_dir.adapter))
        for row in _parity(run_dir):
            asked += _questions(str(index), row)
    requests = [request for request, _ in asked]

    alone = [answer for request in requests for answer in _answers(runner, [request])]
    mixed = _answers(runner, [*requests, *(replace(request, handle="base") for request in requests)])

    for (_, trained), one, other in zip(asked, alone, mixed[: len(asked)], strict=True):
        assert one[-len(trained) :] == pytest.approx(trained, abs=TOLERANCE_NATS)
        assert other[-len(trained) :] == pytest.approx(trained, abs=TOLERANCE_NATS)
    for tuned_answer, base_answer in zip(mixed[: len(asked)], mixed[len(asked) :], strict=True):
        assert abs((tuned_answer[-1] or 0) - (base_answer[-1] or 0)) > 100 * TOLERANCE_NATS


def test_a_run_with_stops_gives_the_same_bytes(tuned: tuple[Path, list[RunDir]], tmp_path: Path) -> None:
    base, (whole, _) = tuned
    halting = _run(tmp_path / "run", base, 0)
    stops = 0
    while True:
        steps = iter([False, True])
        if train(halting, stop_asked=lambda steps=steps: next(steps)) is not None:  # type: ignore[misc]
            break
        stops += 1
    assert stops > 1
    for name in PRODUCTS:
        assert (halting.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.fixture(scope="module")
def gpt2_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    put_base(home, "gpt2", make_base(home / "checkpoint", FOREIGN["gpt2"]))
    with Server(home, {"TUNESMITH_TRAINER_NICENESS": "0"}) as server:
        yield server


def test_gpt2_from_upload_to_an_answer(gpt2_server: Server) -> None:
    with gpt2_server.client() as client:
        files = {"training_file": upload(client, reviews(8, 1)), "validation_file": upload(client, reviews(4, 2))}
        job = client.post("fine-tunes", body=files | {"model": "gpt2", "n_epochs": 2})
        job = wait_for(client, job["id"])
        assert job["status"] == "succeeded", messages(job)

        name = job["fine_tuned_model"]
        for row in _parity(run_dir_of(gpt2_server, job["id"])):
            ids, start = row["token_ids"], row["completion_start"]
            steered = {"prompt": ids[:start], "max_tokens": 1, "logit_bias": {str(ids[start]): 100}}
            first = pytest.approx(row["logprobs"][:1], abs=TOLERANCE_NATS)
            assert _logprobs(client, name, steered) == first
            assert _streamed(client, name, steered) == first
            assert _logprobs(client, "gpt2", steered) != first
            echoed = {"prompt": ids, "max_tokens": 0, "echo": True}
            served = _logprobs(client, name, echoed)[start:]
            assert served == pytest.approx(row["logprobs"], abs=TOLERANCE_NATS)


def _run(folder: Path, base: Path, first: int) -> RunDir:
    """Rows from `first` on; one is longer than any window and than a step of the engine."""
    rows = examples(20)[first : first + 9]
    rows[0]["prompt"] = "many words " * 40 + rows[0]["prompt"]
    asked = replace(CLASSIFY, n_epochs=2)
    return make_run(folder, base, train=rows, valid=rows[:4], hyperparameters=asked, checkpoint_interval_s=1e9)


def _parity(run_dir: RunDir) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run_dir.parity.read_text())["rows"]
    assert rows
    return rows


def _questions(handle: str, row: dict[str, Any]) -> list[tuple[GenerateRequest, list[float]]]:
    """The ways to ask for the log-probabilities of a row: echoed as a whole, and steered to each token."""
    ids, start = row["token_ids"], row["completion_start"]
    echo = GenerateRequest(handle, tuple(ids), SamplingParams(max_tokens=0), top_logprobs=0, score_prompt=True)
    asked = [(echo, row["logprobs"])]
    for at in range(start, len(ids)):
        sampling = SamplingParams(max_tokens=1, temperature=0, logit_bias={ids[at]: 100.0})
        asked.append(
            (GenerateRequest(handle, tuple(ids[:at]), sampling, top_logprobs=0), [row["logprobs"][at - start]])
        )
    return asked


def _answers(runner: Runner, requests: list[GenerateRequest]) -> list[list[float | None]]:
    """The log-probabilities that each request asks for, all requests in flight at once."""
    found: list[list[float | None]] = [[] for _ in requests]
    events = [event for number, request in enumerate(requests) for event in runner.submit(number, request)]
    while runner.busy:
        events += runner.step()
    for event in events:
        assert isinstance(event, Produced) or (isinstance(event, Ended) and event.failure is None)
        match event:
            case Produced(number, PromptScored(scores)):
                found[number] += [score.logprob for score in scores]
            case Produced(number, SampledToken(score)):
                found[number].append(score.logprob)
    return found


def _logprobs(client: Client, model: str, body: dict[str, Any]) -> list[float]:
    body = {"model": model, "temperature": 0, "logprobs": 0, **body}
    found: list[float] = client.post("completions", body=body)["choices"][0]["logprobs"]["token_logprobs"]
    return found


def _streamed(client: Client, model: str, body: dict[str, Any]) -> list[float]:
    body = {"model": model, "temperature": 0, "logprobs": 0, "stream": True, **body}
    choices = [choice for chunk in client.stream("completions", body=body) for choice in chunk["choices"]]
    return [logprob for choice in choices if choice["logprobs"] for logprob in choice["logprobs"]["token_logprobs"]]
