"""The numbers of the torch engine are those of a plain forward, whatever the company, the chunks and the cache."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.models import make_adapter, plain_logprobs
from tests.tiny import CONTEXT_TOKENS, VOCABULARY_SIZE, make_tiny_base
from tunesmith.engine.base import (
    EngineOutput,
    GenerateRequest,
    PromptScored,
    SampledToken,
    SamplingParams,
    TokenScore,
)
from tunesmith.engine.embedded import EmbeddedEngine
from tunesmith.engine.handles import handle_of
from tunesmith.engine.messages import Ended, Event, Produced
from tunesmith.engine.runner import LoadedBase, Runner, StepFailed

pytestmark = pytest.mark.anyio
NATS = 1e-4


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCABULARY_SIZE), k=length))


async def outputs(engine: EmbeddedEngine, request: GenerateRequest) -> list[EngineOutput]:
    return [output async for output in engine.generate(request)]


async def check_against_plain(
    got: list[EngineOutput], request: GenerateRequest, base_dir: Path, adapter_dir: Path | None
) -> None:
    """Every score of a request against one forward over prompt and completion, alone."""
    scored, *tokens = got
    assert isinstance(scored, PromptScored)
    generated = [token.score for token in tokens if isinstance(token, SampledToken)]
    ids = [*request.prompt_ids, *(score.token_id for score in generated)]
    expected_TV = plain_logprobs(base_dir, adapter_dir, ids)
    for position, score in enumerate([*scored.scores, *generated][1:]):
        assert score.token_id == ids[position + 1]
        assert score.logprob == pytest.approx(float(expected_TV[position, ids[position + 1]]), abs=NATS)
        best = expected_TV[position].topk(len(score.top))
        assert [logprob for _, logprob in score.top] == pytest.approx(best.values.tolist(), abs=NATS)


async def test_many_adapters_mixed_are_each_as_alone(
    engine: EmbeddedEngine, tiny_base: Path, adapters: list[Path]
) -> None:
    models = [None, *adapters, None]
    handles = [await engine.load(tiny_base, adapter) for adapter in models]
    requests = [
        GenerateRequest(
            handle, prompt(1 + 7 * i, seed=i), SamplingParams(max_tokens=6, seed=i), top_logprobs=3, score_prompt=True
        )
        for i, handle in enumerate(handles)
    ]
    for request, got, adapter in zip(
        requests, await asyncio.gather(*(outputs(engine, r) for r in requests)), models, strict=True
    ):
        await check_against_plain(got, request, tiny_base, adapter)


async def test_models_of_all_weights_run_beside_adapters_of_the_same_base(
    engine: EmbeddedEngine, tiny_base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    retrained = [make_tiny_base(tmp_path / f"retrained{seed}", seed=seed) for seed in (11, 12)]
    bases = [tiny_base, *retrained, tiny_base]
    tuned = [adapters[0], *retrained, None]
    handles = [await engine.load(tiny_base, folder) for folder in tuned]
    requests = [
        GenerateRequest(handle, prompt(20 + i, seed=i), SamplingParams(max_tokens=5, seed=i), 2, score_prompt=True)
        for i, handle in enumerate(handles)
    ]
    everything = await asyncio.gather(*(outputs(engine, request) for request in requests))
    adapter_dirs = [adapters[0], None, None, None]
    for request, got, base, adapter in zip(requests, everything, bases, adapter_dirs, strict=True):
        await check_against_plain(got, request, base, adapter)

    for handle in handles[1:3]:
        await engine.unload(handle)
    other_shape = make_tiny_base(tmp_path / "other", layers=3)
    with pytest.raises(ValueError, match="another shape than its base"):
        await engine.load(tiny_base, other_shape)


async def test_a_beginning_from_the_cache_gives_the_numbers_of_a_plain_forward(
    tiny_base: Path, adapters: list[Path]
) -> None:
    runner = Runner()
    models = [None, *adapters[:3]]
    for index, adapter in enumerate(models):
        runner.load(str(index), str(tiny_base), str(adapter) if adapter else None)
    beginning = prompt(90, seed=5)
    numbers = itertools.count()

    def ask(index: int, ending: tuple[int, ...]) -> tuple[list[int], list[TokenScore]]:
        sampling = SamplingParams(max_tokens=4, temperature=0)
        number = next(numbers)
        assert runner.submit(number, GenerateRequest(str(index), beginning + ending, sampling, 2)) == []
        before, events = runner.tokens_computed, []
        while runner.busy:
            events += runner.step()
        assert runner.tokens_computed - before == 3 + len(ending) + (26 if ending[0] else 90)
        scores = [e.output.score for e in events if isinstance(e, Produced) and isinstance(e.output, SampledToken)]
        return [*beginning, *ending], scores

    for first in (0, 1):  # the first asked of each model fills the cache, the second uses it
        for index, adapter in enumerate(models):
            ids, scores = ask(index, (first, 7, 8))
            ids += [score.token_id for score in scores]
            expected_TV = plain_logprobs(tiny_base, adapter, ids)
            for place, score in enumerate(scores, start=len(ids) - len(scores)):
                assert score.logprob == pytest.approx(float(expected_TV[place - 1, ids[place]]), abs=NATS)


async def test_a_prompt_in_chunks_scores_as_in_one(
    engine: EmbeddedEngine, tiny_base: Path, adapters: list[Path]
) -> None:
    handle = await engine.load(tiny_base, adapters[0])
    sampling = SamplingParams(max_tokens=1, temperature=0)
    request = GenerateRequest(handle, prompt(2048, seed=1), sampling, top_logprobs=2, score_prompt=True)
    short = [
        GenerateRequest(handle, prompt(5, seed=i), SamplingParams(max_tokens=40, temperature=0), 0, True)
        for i in range(3)
    ]
    got, *others = await asyncio.gather(*(outputs(engine, r) for r in [request, *short]))
    await check_against_plain(got, request, tiny_base, adapters[0])
    for mine, asked in zip(others, short, strict=True):
        await check_against_plain(mine, asked, tiny_base, adapters[0])


@pytest.fixture(scope="module")
def golden(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """An adapter, and the same two models in transformers and PEFT."""
    folder = make_adapter(tiny_base, tmp_path_factory.mktemp("golden") / "adapter", seed=77, rank=4)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    another = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return folder, base, PeftModel.from_pretrained(another, folder).eval()


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers by its old name
@pytest.mark.parametrize("tuned", [False, True])
async def test_greedy_and_scores_equal_transformers_and_peft(
    engine: EmbeddedEngine, tiny_base: Path, golden: tuple[Path, Any, Any], tuned: bool
) -> None:
    folder, base, peft = golden
    model = peft if tuned else base
    handle = await engine.load(tiny_base, folder if tuned else None)
    for length in (1, 9, 70):
        ids = prompt(length, seed=length)
        sampling = SamplingParams(max_tokens=12, temperature=0)
        scored, *tokens = await outputs(engine, GenerateRequest(handle, ids, sampling, 5, score_prompt=True))
        assert isinstance(scored, PromptScored)
        generated = [token.score for token in tokens if isinstance(token, SampledToken)]
        expected = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, length),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
        )
        whole = expected[0].tolist()
        assert [score.token_id for score in generated] == whole[length:]
        with torch.inference_mode():
            logprobs_TV = model(expected).logits[0].float().log_softmax(-1)
        for position, score in enumerate([*scored.scores, *generated][1:]):
            assert score.logprob == pytest.approx(float(logprobs_TV[position, whole[position + 1]]), abs=NATS)
            best = logprobs_TV[position].topk(5)
            assert [i for i, _ in score.top] == best.indices.tolist()
            assert [p for _, p in score.top] == pytest.approx(best.values.tolist(), abs=NATS)


async def test_bases_are_served_side_by_side(engine: EmbeddedEngine, tiny_base: Path, tmp_path: Path) -> None:
    other = make_tiny_base(tmp_path / "other", width=48, layers=1, seed=9)
    adapter = make_adapter(other, tmp_path / "adapter", seed=3)
    models = [(tiny_base, None), (other, None), (other, adapter)]
    requests = []
    for i, (base, folder) in enumerate(models):
        handle = await engine.load(base, folder)
        requests.append(GenerateRequest(handle, prompt(20, i), SamplingParams(max_tokens=5, seed=i), 1, True))
    results = await asyncio.gather(*(outputs(engine, r) for r in requests))
    for got, request, (base, folder) in zip(results, requests, models, strict=True):
        await check_against_plain(got, request, base, folder)


async def test_an_adapter_of_another_shape_is_refused(engine: EmbeddedEngine, tiny_base: Path, tmp_path: Path) -> None:
    wider = make_tiny_base(tmp_path / "wider", width=48)
    deeper = make_tiny_base(tmp_path / "deeper", layers=3)
    for base in (wider, deeper):
        adapter = make_adapter(base, tmp_path / f"adapter of {base.name}", seed=1)
        with pytest.raises(ValueError, match="base"):
            await engine.load(tiny_base, adapter)


async def test_damaged_weights_are_refused(engine: EmbeddedEngine, tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", layers=1)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        await engine.load(base, None)
    (base / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        await engine.load(base, None)


async def test_a_model_that_is_long_in_coming_keeps_nobody_waiting(
    engine: EmbeddedEngine, tiny_base: Path, tmp_path: Path
) -> None:
    slow = make_tiny_base(tmp_path / "slow", layers=1)
    config, content = slow / "config.json", (slow / "config.json").read_bytes()
    config.unlink()
    os.mkfifo(config)  # whoever reads it waits for somebody who writes

    def write() -> None:
        with config.open("wb") as pipe:
            (tmp_path / "config.json").write_bytes(content)
            (tmp_path / "config.json").replace(config)
            pipe.write(content)

    handle = await engine.load(tiny_base, None)
    first, again = (asyncio.create_task(engine.load(slow, None)) for _ in range(2))
    request = GenerateRequest(handle, (5, 6), SamplingParams(max_tokens=5, temperature=0))
    assert len(await outputs(engine, request)) == 5
    assert not first.done()
    await asyncio.to_thread(write)
    slow_handle = await first
    assert len(await outputs(engine, replace(request, handle=slow_handle))) == 5
    assert await again == slow_handle


async def test_a_model_that_is_unloaded_before_it_has_come_does_not_stay(
    engine: EmbeddedEngine, tiny_base: Path, adapters: list[Path]
) -> None:
    await engine.load(tiny_base, None)
    loading = asyncio.create_task(engine.load(tiny_base, adapters[0]))
    await asyncio.sleep(0)  # it is asked for
    handle = handle_of(tiny_base, adapters[0])
    await engine.unload(handle)
    await loading
    with pytest.raises(KeyError):
        await outputs(engine, GenerateRequest(handle, (5, 6), SamplingParams(max_tokens=1)))


async def test_a_model_made_again_at_the_same_path_is_another(
    engine: EmbeddedEngine, tiny_base: Path, tmp_path: Path
) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0)
    folder = make_adapter(tiny_base, tmp_path / "adapter", seed=1)
    before = await engine.load(tiny_base, folder)
    first = await outputs(engine, GenerateRequest(before, (5, 6), sampling))
    make_adapter(tiny_base, folder, seed=2)
    after = await engine.load(tiny_base, folder)
    assert after != before
    assert await outputs(engine, GenerateRequest(after, (5, 6), sampling)) != first
    assert await outputs(engine, GenerateRequest(before, (5, 6), sampling)) == first


@pytest.mark.parametrize(
    ("ids", "bias", "says"),
    [
        ((VOCABULARY_SIZE,), {}, "between 0"),
        ((-1,), {}, "between 0"),
        ((1,), {VOCABULARY_SIZE: 1.0}, "between 0"),
        ((), {}, "no tokens"),
        ((1,) * (CONTEXT_TOKENS - 14), {}, "2049 positions, and the model has 2048"),
    ],
)
async def test_what_would_fail_others_is_refused_alone(
    engine: EmbeddedEngine, tiny_base: Path, ids: tuple[int, ...], bias: dict[int, float], says: str
) -> None:
    handle = await engine.load(tiny_base, None)
    bad = GenerateRequest(handle, ids, SamplingParams(logit_bias=bias))
    good = GenerateRequest(handle, (1, 2), SamplingParams(max_tokens=3))
    refused, fine = await asyncio.gather(outputs(engine, bad), outputs(engine, good), return_exceptions=True)
    assert isinstance(refused, ValueError)
    assert says in str(refused)
    assert isinstance(fine, list)
    assert len(fine) == 3


def run(runner: Runner, requests: dict[int, GenerateRequest], arrive: dict[int, int]) -> dict[int, list[EngineOutput]]:
    """Steps through requests of which number n arrives before step `arrive[n]`."""
    results: dict[int, list[EngineOutput]] = {number: [] for number in requests}
    events: list[Event] = []
    for step in range(10_000):
        for number, request in requests.items():
            if arrive[number] == step:
                events += runner.submit(number, request)
        if step > max(arrive.values()) and not runner.busy:
            break
        events += runner.step()
    for event in events:
        assert isinstance(event, Produced | Ended)
        if isinstance(event, Produced):
            results[event.number].append(event.output)
    return results


def scores(got: list[EngineOutput]) -> list[tuple[int, float | None]]:
    flat = []
    for output in got:
        listed = output.scores if isinstance(output, PromptScored) else (output.score,)
        flat += [(score.token_id, score.logprob) for score in listed]
    return flat


@pytest.mark.parametrize("seed", range(3))
def test_any_interleaving_equals_one_at_a_time(tiny_base: Path, adapters: list[Path], seed: int) -> None:
    chance = random.Random(seed)
    models = [None, *adapters[:3]]
    # little room everywhere: prompts go in chunks, most requests wait for a place in batch and cache
    small = Runner(max_running=3, step_tokens=7, cache_bytes=1)
    large = Runner()
    for runner in (small, large):
        for index, adapter in enumerate(models):
            runner.load(str(index), str(tiny_base), None if adapter is None else str(adapter))
    requests = {
        number: GenerateRequest(
            str(chance.randrange(len(models))),
            prompt(chance.choice([1, 3, 31, 32, 33, 80]), seed=number),
            SamplingParams(
                max_tokens=chance.randrange(0, 9),
                temperature=chance.choice([0.0, 0.7, 1.0]),
                top_p=chance.choice([0.3, 1.0]),
                frequency_penalty=chance.choice([0.0, 1.5]),
                seed=number,
            ),
            top_logprobs=chance.choice([0, 2]),
            score_prompt=chance.random() < 0.5,
        )
        for number in range(12)
    }
    arrive = {number: chance.randrange(15) for number in requests}
    mixed = run(small, requests, arrive)
    together = run(large, requests, dict.fromkeys(requests, 0))
    for number, request in requests.items():
        alone = scores(run(large, {number: request}, {number: 0})[number])
        for other in (scores(mixed[number]), scores(together[number])):
            assert [token_id for token_id, _ in other] == [token_id for token_id, _ in alone]
            assert [p or 0 for _, p in other] == pytest.approx([p or 0 for _, p in alone], abs=NATS)


def test_a_long_prompt_does_not_stall_who_generates(tiny_base: Path) -> None:
    runner = Runner(step_tokens=64)
    runner.load("base", str(tiny_base), None)
    runner.submit(1, GenerateRequest("base", prompt(4, 1), SamplingParams(max_tokens=200, temperature=0)))
    runner.step()
    runner.submit(2, GenerateRequest("base", prompt(1000, 2), SamplingParams(max_tokens=1)))
    for _ in range(15):
        assert [event.number for event in runner.step() if isinstance(event, Produced)] == [1]
    assert [event.number for event in runner.step() if isinstance(event, Produced)] == [1, 2]


def test_a_cancelled_sequence_gives_its_place_to_the_next(tiny_base: Path) -> None:
    runner = Runner(max_running=1, step_tokens=64)
    runner.load("base", str(tiny_base), None)
    for number in (1, 2, 3):
        runner.submit(number, GenerateRequest("base", (7,), SamplingParams(max_tokens=100)))
    assert {event.number for event in runner.step()} == {1}
    runner.cancel(1)
    runner.cancel(2)  # still waiting
    assert {event.number for event in runner.step()} == {3}
    runner.cancel(3)
    assert not runner.busy


def test_a_base_is_given_back_with_its_last_model(tiny_base: Path, adapters: list[Path]) -> None:
    runner = Runner()
    runner.load("base", str(tiny_base), None)
    runner.load("adapter", str(tiny_base), str(adapters[0]))
    runner.submit(1, GenerateRequest("adapter", (7,), SamplingParams(max_tokens=2)))
    runner.unload("base")
    runner.unload("adapter")
    assert len(runner.step()) == 1  # what runs keeps what it needs
    assert len(runner._bases) == 1
    runner.step()
    assert len(runner._bases) == 0


def test_what_came_of_a_step_before_it_failed_is_told(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    runner = Runner()
    runner.load("sound", str(tiny_base), None)
    runner.load("broken", str(other), None)
    for number, handle in enumerate(("sound", "broken")):
        runner.submit(number, GenerateRequest(handle, (7,), SamplingParams(max_tokens=1)))
    broken, logits = runner._models["broken"].base, LoadedBase.logits
    broken.native = None

    def fail(self: LoadedBase, hidden_BD: torch.Tensor) -> torch.Tensor:
        if self is broken:
            raise MemoryError
        return logits(self, hidden_BD)

    monkeypatch.setattr(LoadedBase, "logits", fail)
    with pytest.raises(StepFailed) as caught:
        runner.step()
    assert [event.number for event in caught.value.events] == [0]
    assert [event.number for event in runner.fail_running("broken")] == [1]


def test_a_failed_step_ends_its_sequences_and_only_them(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(max_running=1, step_tokens=64)
    runner.load("base", str(tiny_base), None)
    for number in (1, 2):
        runner.submit(number, GenerateRequest("base", (7,), SamplingParams(max_tokens=1)))
    runner.step()
    runner.submit(3, GenerateRequest("base", (7,), SamplingParams(max_tokens=1)))
    assert runner.fail_running("broken") == []  # 1 has ended, 2 and 3 still wait
    assert [event.number for event in runner.step()] == [2]
