"""Steps on a device, held against the processor: the same answers, and nothing computed where it is not."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.devices import DEVICE, Broken, Tape, pretended
from tests.engine.models import make_adapter
from tests.tiny import VOCABULARY_SIZE
from tunesmith.decoder import replays
from tunesmith.decoder.quantizing import quantize
from tunesmith.engine import recorded
from tunesmith.engine.base import (
    GenerateRequest,
    Precision,
    PromptScored,
    SampledToken,
    SamplingParams,
    TokenScore,
)
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


def _answers(
    device: str, precision: Precision, base: Path, adapters: list[Path | None], max_tokens: int = 6
) -> list[list[TokenScore]]:
    chance = random.Random(3)
    prompts = [tuple(chance.choices(range(VOCABULARY_SIZE), k=length)) for length in (3, 40, 90, 1, 33, 12)]
    runner = Runner(precision=precision, device=device)
    for index, adapter in enumerate(adapters):
        runner.load(str(index), str(base), None if adapter is None else str(adapter))
    for number, prompt in enumerate(prompts):
        handle, sampling = str(number // 2), replace(WAYS[number % 3], max_tokens=max_tokens)
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


@pytest.mark.parametrize("base", [32, 4], indirect=True)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_steps_say_what_others_do(
    base: Path, tmp_path: Path, pretend: None, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [None, *(make_adapter(base, tmp_path / str(seed), seed=seed, rank=2 * seed) for seed in (1, 2))]
    tape, broken, found = Tape(), Broken(), []
    for recorder in (None, tape, broken):
        monkeypatch.setattr(replays, "recorder_of", lambda _, recorder=recorder: recorder)
        found.append(_answers(DEVICE, precision, base, adapters, max_tokens=12))
    assert found[0] == found[1] == found[2]
    assert tape.replayed > tape.recorded > 0
    assert broken.replayed == 2


def test_sequences_and_adapters_come_and_go_while_steps_are_recorded(
    tiny_base: Path, tmp_path: Path, pretend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is the one of a processor, whatever is generated beside it: models, lengths and ends all differ."""
    tape, chance = Tape(), random.Random(5)
    monkeypatch.setattr(replays, "recorder_of", lambda _: tape)
    adapters = [
        None,
        *(make_adapter(tiny_base, tmp_path / str(seed), seed=seed, rank=1 + seed % 5) for seed in range(1, 6)),
    ]
    there, here = (Runner(device=device, max_running=6, cache_bytes=1 << 20) for device in (DEVICE, "cpu"))
    asked = [
        GenerateRequest(
            str(chance.randrange(6)),
            tuple(chance.choices(range(VOCABULARY_SIZE), k=chance.choice([1, 5, 31, 32, 70]))),
            SamplingParams(max_tokens=chance.choice([1, 8, 30]), temperature=0),
            top_logprobs=0,
        )
        for _ in range(24)
    ]
    answers: list[list[list[TokenScore]]] = []
    for runner in (there, here):
        for index, adapter in enumerate(adapters):
            runner.load(str(index), str(tiny_base), None if adapter is None else str(adapter))
        found: list[list[TokenScore]] = [[] for _ in asked]
        for number, request in enumerate(asked):
            assert runner.submit(number, request) == []
        while runner.busy:
            for event in runner.step():
                if isinstance(event, Produced):
                    assert isinstance(event.output, SampledToken)
                    found[event.number].append(event.output.score)
        answers.append(found)
    for ours, theirs in zip(*answers, strict=True):
        assert [score.token_id for score in ours] == [score.token_id for score in theirs]
        assert [score.logprob for score in ours] == pytest.approx([score.logprob for score in theirs], abs=1e-4)
    assert tape.recorded > 3 and tape.replayed > 40, (tape.recorded, tape.replayed)


def test_a_long_sequence_among_short_ones_is_not_recorded(
    tiny_base: Path, pretend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = Tape()
    monkeypatch.setattr(replays, "recorder_of", lambda _: tape)
    monkeypatch.setattr(recorded, "SPARE_BLOCKS", 0)
    runner = Runner(device=DEVICE)
    runner.load("0", str(tiny_base), None)
    chance = random.Random(2)
    counts = []
    for lengths in ([5] * 8, [5] * 7 + [400], [400]):
        before = tape.replayed
        for number, length in enumerate(lengths):
            prompt = tuple(chance.choices(range(VOCABULARY_SIZE), k=length))
            sampling = SamplingParams(max_tokens=8, temperature=0)
            assert runner.submit(number, GenerateRequest("0", prompt, sampling, None)) == []
        while runner.busy:
            runner.step()
        counts.append(tape.replayed - before)
    assert counts == [6, 0, 6]  # of seven steps behind the prompts the first is computed


def test_a_model_with_all_weights_tuned_shares_the_cache_and_not_the_recordings(
    tiny_base: Path, tmp_path: Path, pretend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "recorder_of", lambda _: Tape())
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_base, tuned)
    state = load_file(tuned / "model.safetensors")
    save_file({name: weight * 1.1 for name, weight in state.items()}, tuned / "model.safetensors", {"format": "pt"})
    there, here = Runner(device=DEVICE), Runner()
    answers = []
    for runner in (there, here):
        runner.load("0", str(tiny_base), None)
        runner.load("1", str(tiny_base), str(tuned))
        found: list[list[int]] = [[], [], [], []]
        for number in range(4):
            request = GenerateRequest(
                str(number % 2), tuple(range(3, 40)), SamplingParams(max_tokens=9, temperature=0), None
            )
            assert runner.submit(number, request) == []
        while runner.busy:
            for event in runner.step():
                if isinstance(event, Produced):
                    assert isinstance(event.output, SampledToken)
                    found[event.number].append(event.output.score.token_id)
        answers.append(found)
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_says_that_its_device_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    begun = EngineProcess(threads=1, device="cuda")
    with begun.connection:
        assert begun.process.wait(60) == 1
    assert "TUNESMITH_ENGINE_DEVICE=cuda: torch" in capfd.readouterr().err
