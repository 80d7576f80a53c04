"""Steps on a device, held against the processor: the same answers, and nothing computed where it is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.devices import DEVICE, pretended
from tests.engine.models import make_adapter
from tests.tiny import VOCABULARY_SIZE
from tunesmith.decoder.quantizing import quantize
from tunesmith.engine.base import GenerateRequest, Precision, PromptScored, SamplingParams, TokenScore
from tunesmith.engine.messages import Produced
from tunesmith.engine.process import EngineProcess
from tunesmith.engine.runner import Runner

WAYS = (
    SamplingParams(max_tokens=6, temperature=0),
    SamplingParams(max_tokens=6, temperature=1, seed=4, logit_bias={7: 2.0}, presence_penalty=0.5),
    SamplingParams(max_tokens=6, temperature=0.8, top_p=0.7, seed=5),
)
BOUND_NATS = {"float32": 1e-4, "bfloat16": 0.1}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain = Runner.step.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(Runner, "step", torch.no_grad()(plain))  # marked tensors cannot be those of inference mode
    with pretended():
        yield


def _answers(device: str, precision: Precision, base: Path, adapters: list[Path | None]) -> list[list[TokenScore]]:
    chance = random.Random(3)
    prompts = [tuple(chance.choices(range(VOCABULARY_SIZE), k=length)) for length in (3, 40, 90, 1, 33, 12)]
    runner = Runner(precision=precision, device=device)
    for index, adapter in enumerate(adapters):
        runner.load(str(index), str(base), None if adapter is None else str(adapter))
    for number, prompt in enumerate(prompts):
        handle, sampling = str(number // 2), WAYS[number % 3]
        assert runner.submit(number, GenerateRequest(handle, prompt, sampling, 3, score_prompt=number < 3)) == []
    found: list[list[TokenScore]] = [[] for _ in prompts]
    while runner.busy:
        for event in runner.step():
            if isinstance(event, Produced):
                output = event.output
                found[event.number] += output.scores if isinstance(output, PromptScored) else [output.score]
    return found


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == 4:
        quantize(tiny_base, tmp_path / "fourbit", lambda *told: None)
        return tmp_path / "fourbit"
    return tiny_base


@pytest.mark.parametrize("base", [32, 4], indirect=True)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_answers_are_those_of_the_processor(base: Path, tmp_path: Path, pretend: None, precision: Precision) -> None:
    adapters = [None, *(make_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2))]

    here = _answers("cpu", "float32", base, adapters)
    there = _answers(DEVICE, precision, base, adapters)

    compared = 0
    for ours, theirs in zip(there, here, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            if mine.token_id != other.token_id and precision == "bfloat16":
                break  # from here on it is another answer
            assert mine.token_id == other.token_id
            if other.logprob is not None:
                assert mine.logprob == pytest.approx(other.logprob, abs=BOUND_NATS[precision])
            compared += 1
    assert compared > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_says_that_its_device_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    begun = EngineProcess(threads=1, device="cuda")
    with begun.connection:
        assert begun.process.wait(60) == 1
    assert "TUNESMITH_ENGINE_DEVICE=cuda: torch" in capfd.readouterr().err
