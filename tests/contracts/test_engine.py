"""What `engine/base.py` promises, asked of every engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.engine.models import make_adapter
from tests.tiny import VOCABULARY_SIZE
from tunesmith.engine.base import Engine, EngineOutput, GenerateRequest, PromptScored, SampledToken, SamplingParams
from tunesmith.engine.embedded import EmbeddedEngine
from tunesmith.engine.remote import RemoteEngine
from tunesmith.engine.scripted import ScriptedEngine
from tunesmith.errors import EngineUnavailable

pytestmark = pytest.mark.anyio

ENGINES: dict[str, Callable[[], Engine]] = {
    "scripted": lambda: ScriptedEngine(VOCABULARY_SIZE),
    "embedded": lambda: EmbeddedEngine(threads=1),
    "remote": lambda: RemoteEngine(threads=1),
}
PROMPT = (17, 400, 23, 5)
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@dataclass
class Subject:
    """An engine with a base and two adapters loaded."""

    engine: Engine
    base_dir: Path
    adapter_dirs: tuple[Path, Path]
    base: str
    adapters: tuple[str, str]

    async def outputs(self, request: GenerateRequest) -> list[EngineOutput]:
        return [output async for output in self.engine.generate(request)]

    async def tokens(self, request: GenerateRequest) -> list[SampledToken]:
        return [output for output in await self.outputs(request) if isinstance(output, SampledToken)]

    async def ids(self, sampling: SamplingParams, handle: str | None = None) -> list[int]:
        request = GenerateRequest(self.base if handle is None else handle, PROMPT, sampling)
        return [token.score.token_id for token in await self.tokens(request)]


@pytest.fixture(scope="session")
def adapter_dirs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return make_adapter(tiny_base, folder / "one", seed=1), make_adapter(tiny_base, folder / "two", seed=2)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for the module, so that an engine process is started once."""
    return "asyncio"


@pytest.fixture(scope="module", params=ENGINES)
async def subject(
    request: pytest.FixtureRequest, tiny_base: Path, adapter_dirs: tuple[Path, Path]
) -> AsyncIterator[Subject]:
    engine = ENGINES[request.param]()
    base = await engine.load(tiny_base, None)
    one, two = [await engine.load(tiny_base, folder) for folder in adapter_dirs]
    yield Subject(engine, tiny_base, adapter_dirs, base, (one, two))
    await engine.close()
    await engine.close()  # idempotent
    with pytest.raises(EngineUnavailable):
        await anext(aiter(engine.generate(GenerateRequest(base, PROMPT, GREEDY))))


async def test_loading_again_gives_the_same_handle(subject: Subject) -> None:
    assert await subject.engine.load(subject.base_dir, None) == subject.base
    assert await subject.engine.load(subject.base_dir, subject.adapter_dirs[0]) == subject.adapters[0]
    assert len({subject.base, *subject.adapters}) == 3


async def test_folders_without_a_model_are_refused(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        await subject.engine.load(tmp_path, None)
    with pytest.raises(ValueError, match=str(tmp_path)):
        await subject.engine.load(subject.base_dir, tmp_path)


async def test_max_tokens_ends_a_sequence_with_length(subject: Subject) -> None:
    tokens = await subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY))
    assert [token.finish for token in tokens] == [None] * 5 + ["length"]


async def test_outputs_that_go_together_are_the_same(subject: Subject) -> None:
    for sampling in (GREEDY, replace(GREEDY, max_tokens=600)):  # more than go in one piece
        request = GenerateRequest(subject.base, PROMPT, sampling, top_logprobs=1)
        assert await subject.tokens(replace(request, together=True)) == await subject.tokens(request)


async def test_a_stop_token_ends_a_sequence_with_stop(subject: Subject) -> None:
    full = await subject.ids(GREEDY)
    third = full[2]
    end = full.index(third)
    tokens = await subject.tokens(GenerateRequest(subject.base, PROMPT, replace(GREEDY, stop_token_ids=(third,))))
    assert [token.score.token_id for token in tokens] == full[: end + 1]
    assert [token.finish for token in tokens] == [None] * end + ["stop"]


async def test_without_logprobs_none_are_reported(subject: Subject) -> None:
    for token in await subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY)):
        assert token.score.logprob is None
        assert token.score.top == ()


async def test_logprobs_are_a_distribution_best_first(subject: Subject) -> None:
    tokens = await subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY, top_logprobs=5))
    for token in tokens:
        values = [logprob for _, logprob in token.score.top]
        assert len({token_id for token_id, _ in token.score.top}) == 5
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-6
        assert token.score.top[0] == (token.score.token_id, token.score.logprob)  # greedy takes the best


async def test_zero_top_logprobs_report_only_the_token(subject: Subject) -> None:
    five = await subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY, top_logprobs=5))
    zero = await subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY, top_logprobs=0))
    assert [token.score.top for token in zero] == [()] * 6
    assert [t.score.logprob for t in zero] == pytest.approx([t.score.logprob for t in five], abs=1e-4)


async def test_a_scored_prompt_comes_first_and_agrees_with_generation(subject: Subject) -> None:
    generated = await subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY, top_logprobs=2))
    ids = tuple(token.score.token_id for token in generated)
    request = GenerateRequest(
        subject.base, PROMPT + ids, SamplingParams(max_tokens=1), top_logprobs=2, score_prompt=True
    )
    scored, sampled = await subject.outputs(request)
    assert isinstance(scored, PromptScored)
    assert isinstance(sampled, SampledToken)
    assert tuple(score.token_id for score in scored.scores) == PROMPT + ids
    assert (scored.scores[0].logprob, scored.scores[0].top) == (None, ())
    for echoed, token in zip(scored.scores[len(PROMPT) :], generated, strict=True):
        assert echoed.logprob == pytest.approx(token.score.logprob, abs=1e-4)
        assert [i for i, _ in echoed.top] == [i for i, _ in token.score.top]


async def test_no_tokens_asked_scores_the_prompt_alone(subject: Subject) -> None:
    request = GenerateRequest(subject.base, PROMPT, SamplingParams(max_tokens=0), top_logprobs=1, score_prompt=True)
    (scored,) = await subject.outputs(request)
    assert isinstance(scored, PromptScored)
    assert len(scored.scores) == len(PROMPT)
    assert await subject.outputs(GenerateRequest(subject.base, PROMPT, SamplingParams(max_tokens=0))) == []


async def test_a_prompt_of_one_token_is_enough(subject: Subject) -> None:
    request = GenerateRequest(subject.base, (0,), replace(GREEDY, max_tokens=2), top_logprobs=1, score_prompt=True)
    scored, *tokens = await subject.outputs(request)
    assert isinstance(scored, PromptScored)
    assert len(scored.scores) == 1
    assert len(tokens) == 2


async def test_the_seed_decides(subject: Subject) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1, seed=7)
    first, again, other = [await subject.ids(s) for s in (sampling, sampling, replace(sampling, seed=8))]
    assert first == again
    assert first != other


async def test_company_in_the_batch_changes_nothing(subject: Subject) -> None:
    requests = [
        GenerateRequest(handle, PROMPT[: 1 + i % 4], SamplingParams(max_tokens=3 + i, seed=i), top_logprobs=1)
        for i, handle in enumerate([subject.base, *subject.adapters] * 3)
    ]
    alone = [await subject.tokens(request) for request in requests]
    together = await asyncio.gather(*(subject.tokens(request) for request in requests))
    for mine, mixed in zip(alone, together, strict=True):
        assert [t.score.token_id for t in mine] == [t.score.token_id for t in mixed]
        assert [t.score.logprob for t in mine] == pytest.approx([t.score.logprob for t in mixed], abs=1e-4)


async def test_models_differ(subject: Subject) -> None:
    answers = [await subject.ids(GREEDY, handle) for handle in (subject.base, *subject.adapters)]
    assert len(set(map(tuple, answers))) == 3


async def test_bias_moves_the_choice_but_not_the_scores(subject: Subject) -> None:
    (plain,) = await subject.tokens(GenerateRequest(subject.base, PROMPT, replace(GREEDY, max_tokens=1), 2))
    best = plain.score.token_id
    banned = replace(GREEDY, max_tokens=1, logit_bias={best: -100.0})
    (token,) = await subject.tokens(GenerateRequest(subject.base, PROMPT, banned, 2))
    assert token.score.token_id == plain.score.top[1][0]
    assert token.score.logprob == pytest.approx(plain.score.top[1][1], abs=1e-4)
    for temperature in (0.0, 1.0):
        forced = replace(GREEDY, temperature=temperature, logit_bias={4242: 100.0})
        assert await subject.ids(forced) == [4242] * 6


async def rivals(subject: Subject, gap: float) -> dict[int, float]:
    """Biases with which greedy takes the first token first, then prefers it to the second by `gap`."""
    second = 17  # stands in the prompt, which must not count
    for first in range(1000, 1100):
        before = await lead(subject, PROMPT, first, second)
        after = await lead(subject, (*PROMPT, first), first, second)
        if before - after + gap > 0.2:
            return {first: 50.0, second: 50.0 + after - gap}
    raise AssertionError("no pair of tokens is of use")


async def lead(subject: Subject, prompt: tuple[int, ...], first: int, second: int) -> float:
    """By how much one token is likelier after a prompt than another."""
    scores = []
    for token_id in (first, second):
        request = GenerateRequest(
            subject.base, (*prompt, token_id), SamplingParams(max_tokens=0), top_logprobs=0, score_prompt=True
        )
        (output,) = await subject.outputs(request)
        assert isinstance(output, PromptScored)
        scores.append(output.scores[-1].logprob or 0.0)
    return scores[0] - scores[1]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize(("gap", "value"), [(1.0, 2.0), (-1.0, -2.0)])
async def test_penalties_turn_the_choice_at_the_second_time(
    subject: Subject, penalty: str, gap: float, value: float
) -> None:
    biases = await rivals(subject, gap)
    first, second = biases
    plain = replace(GREEDY, max_tokens=2, logit_bias=biases)
    assert await subject.ids(plain) == ([first, first] if gap > 0 else [first, second])
    turned = await subject.ids(replace(plain, **{penalty: value}))
    assert turned == ([first, second] if gap > 0 else [first, first])


async def test_only_the_frequency_penalty_grows(subject: Subject) -> None:
    forced = replace(GREEDY, max_tokens=45, logit_bias={4242: 60.0})
    assert set(await subject.ids(replace(forced, presence_penalty=2.0))) == {4242}
    penalised = await subject.ids(replace(forced, frequency_penalty=2.0))  # 60 - 2 * 44 is below all others
    assert penalised[:20] == [4242] * 20
    assert set(penalised) > {4242}


async def test_a_small_nucleus_takes_the_best(subject: Subject) -> None:
    assert await subject.ids(replace(GREEDY, temperature=1.0, top_p=0.0)) == await subject.ids(GREEDY)
    biases = await rivals(subject, 1.0)
    first, second = biases
    odds = await lead(subject, PROMPT, first, second) + biases[first] - biases[second]
    share = 1 / (1 + math.exp(-odds))  # of the first token; with the second that is all of the mass

    async def drawn(top_p: float) -> set[int]:
        wanted = SamplingParams(max_tokens=1, top_p=top_p, logit_bias=biases)
        return {(await subject.ids(replace(wanted, seed=seed)))[0] for seed in range(100)}

    assert await drawn(share - 0.01) == {first}
    assert await drawn(share + 0.01) == {first, second}


async def test_samples_follow_the_distribution(subject: Subject) -> None:
    bias = {4242: 50.0, 17: 50.0}
    (scored,) = await subject.tokens(GenerateRequest(subject.base, PROMPT, replace(GREEDY, max_tokens=1), 0))
    assert scored.score.logprob is not None
    singles = [SamplingParams(max_tokens=1, temperature=2.0, seed=seed, logit_bias=bias) for seed in range(200)]
    drawn = [(await subject.ids(sampling))[0] for sampling in singles]
    assert set(drawn) == {4242, 17}
    probe = GenerateRequest(subject.base, (*PROMPT, 4242), SamplingParams(max_tokens=0), 0, score_prompt=True)
    other = replace(probe, prompt_ids=(*PROMPT, 17))
    scores = []
    for request in (probe, other):
        (output,) = await subject.outputs(request)
        assert isinstance(output, PromptScored)
        assert output.scores[-1].logprob is not None
        scores.append(output.scores[-1].logprob)
    share = 1 / (1 + math.exp((scores[1] - scores[0]) / 2.0))
    assert drawn.count(4242) / 200 == pytest.approx(share, abs=0.15)  # four standard deviations


async def test_an_unknown_handle_is_a_key_error(subject: Subject) -> None:
    with pytest.raises(KeyError):
        await subject.ids(GREEDY, "no such model")


async def test_unloading_is_idempotent_and_loading_brings_back(subject: Subject) -> None:
    before = await subject.ids(GREEDY, subject.adapters[0])
    await subject.engine.unload(subject.adapters[0])
    await subject.engine.unload(subject.adapters[0])
    with pytest.raises(KeyError):
        await subject.ids(GREEDY, subject.adapters[0])
    assert await subject.engine.load(subject.base_dir, subject.adapter_dirs[0]) == subject.adapters[0]
    assert await subject.ids(GREEDY, subject.adapters[0]) == before


async def test_unloading_leaves_running_requests_alone(subject: Subject) -> None:
    request = GenerateRequest(subject.adapters[1], PROMPT, replace(GREEDY, max_tokens=30))
    whole = await subject.tokens(request)
    outputs = subject.engine.generate(request)
    first = await anext(aiter(outputs))
    await subject.engine.unload(subject.adapters[1])
    assert [first] + [output async for output in outputs] == whole
    await subject.engine.load(subject.base_dir, subject.adapter_dirs[1])


async def test_a_closed_iterator_leaves_the_others_running(subject: Subject) -> None:
    async def first_two() -> list[EngineOutput]:
        request = GenerateRequest(subject.base, PROMPT, replace(GREEDY, max_tokens=2000))
        async with aclosing(subject.engine.generate(request)) as outputs:  # type: ignore[type-var]
            return [await anext(outputs), await anext(outputs)]

    whole = await subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY))
    cut = await asyncio.gather(
        *(first_two() for _ in range(20)), subject.tokens(GenerateRequest(subject.base, PROMPT, GREEDY))
    )
    assert cut == [whole[:2]] * 20 + [whole]


async def test_capabilities_are_constant(subject: Subject) -> None:
    assert subject.engine.capabilities == subject.engine.capabilities
    assert subject.engine.capabilities.max_top_logprobs >= 5
