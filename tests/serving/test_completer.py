from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import BOX, Answering
from tunesmith.core.models import ModelRef
from tunesmith.engine.base import Capabilities, EngineOutput, GenerateRequest
from tunesmith.engine.scripted import ScriptedEngine
from tunesmith.errors import EngineUnavailable, InvalidRequest, NotFound, RateLimited
from tunesmith.serving.completer import (
    Choice,
    ChoiceDelta,
    Completer,
    Completion,
    CompletionRequest,
    Usage,
)
from tunesmith.serving.encoding import ENCODED_AT_ONCE
from tunesmith.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio
ALIEN = "\N{EXTRATERRESTRIAL ALIEN}"


async def stream(completer: Completer, request: CompletionRequest) -> tuple[list[ChoiceDelta], Usage]:
    async with aclosing(await completer.open(request)) as pieces:
        *deltas, usage = [piece async for piece in pieces]
    assert isinstance(usage, Usage)
    return [delta for delta in deltas if isinstance(delta, ChoiceDelta)], usage


async def test_an_answer_ends_with_the_text(answering: Answering, model: ModelRef) -> None:
    completer = answering({"hi ->": " there"})
    completion = await completer.complete(CompletionRequest(model, ("hi ->",), temperature=0))
    assert completion.choices == (Choice(0, " there", None, "stop"),)
    n_prompt, n_answer = len(BOX.encode("hi ->")), len(BOX.encode(" there"))
    assert completion.usage == Usage(n_prompt, n_answer + 1)  # the end of the text was generated too
    assert completion.usage.total_tokens == n_prompt + n_answer + 1


async def test_one_token_of_a_class_ends_with_length(answering: Answering, model: ModelRef) -> None:
    completer = answering({"great ->": " positive"})
    request = CompletionRequest(model, ("great ->",), max_tokens=1, temperature=0, logprobs=2)
    (choice,) = (await completer.complete(request)).choices
    assert (choice.text, choice.finish_reason) == (" positive", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == (len("great ->"),)
    (top,) = choice.logprobs.top_logprobs
    assert top is not None
    assert len(top) == 2
    assert top[" positive"] == choice.logprobs.token_logprobs[0]


async def test_a_sampled_token_outside_the_best_is_added_to_them(completer: Completer, model: ModelRef) -> None:
    rare = 4242
    for logprobs in range(4):
        request = CompletionRequest(model, ("x",), max_tokens=1, logit_bias={rare: 100.0}, logprobs=logprobs)
        table = (await completer.complete(request)).choices[0].logprobs
        assert table is not None
        assert table.tokens == (BOX.token_text(rare),)
        (top,) = table.top_logprobs
        assert top is not None
        assert len(top) == logprobs + 1
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert top[BOX.token_text(rare)] == table.token_logprobs[0]


async def test_echo_repeats_the_prompt_and_scores_it(completer: Completer, model: ModelRef) -> None:
    request = CompletionRequest(model, ("The film was good.",), max_tokens=4, temperature=0, logprobs=1, echo=True)
    (echoed,) = (await completer.complete(request)).choices
    (plain,) = (await completer.complete(replace(request, echo=False))).choices
    assert echoed.text == "The film was good." + plain.text
    table, tail = echoed.logprobs, plain.logprobs
    assert table is not None
    assert tail is not None
    assert "".join(table.tokens) == echoed.text
    assert (table.token_logprobs[0], table.top_logprobs[0], table.text_offset[0]) == (None, None, 0)
    assert None not in table.token_logprobs[1:]
    n = len(tail.tokens)
    assert table.tokens[-n:] == tail.tokens
    assert table.text_offset[-n:] == tail.text_offset
    assert table.token_logprobs[-n:] == tail.token_logprobs
    assert tail.text_offset[0] == len("The film was good.")


async def test_echo_scores_what_was_generated_alike(completer: Completer, model: ModelRef) -> None:
    request = CompletionRequest(model, ("one",), max_tokens=5, seed=3, logprobs=2)
    table = (await completer.complete(request)).choices[0].logprobs
    assert table is not None
    sequence = (*BOX.encode("one"), *(i for token in table.tokens for i in BOX.encode(token)))
    scoring = CompletionRequest(model, (sequence,), max_tokens=0, echo=True, logprobs=2)
    (scored,) = (await completer.complete(scoring)).choices
    assert scored.finish_reason == "length"
    assert scored.logprobs is not None
    if len(scored.logprobs.tokens) == len(table.tokens) + 1:  # the pieces re-encode to the same tokens
        assert scored.logprobs.token_logprobs[1:] == pytest.approx(table.token_logprobs)


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_scoring_alone_generates_nothing(completer: Completer, model: ModelRef, logprobs: int | None) -> None:
    request = CompletionRequest(model, ("a b", ""), max_tokens=0, echo=True, logprobs=logprobs)
    completion = await completer.complete(request)
    assert [(c.text, c.finish_reason) for c in completion.choices] == [("a b", "length"), ("<|endoftext|>", "length")]
    assert completion.usage == Usage(len(BOX.encode("a b")) + 1, 0)
    without_echo = await completer.complete(replace(request, echo=False))
    assert [(c.text, c.finish_reason) for c in without_echo.choices] == [("", "length")] * 2


async def test_choices_of_several_prompts_are_numbered_prompt_first(completer: Completer, model: ModelRef) -> None:
    request = CompletionRequest(model, ("a", "b"), n=3, max_tokens=6, seed=5, logprobs=0)
    both = (await completer.complete(request)).choices
    assert [choice.index for choice in both] == list(range(6))
    assert len({choice.text for choice in both}) == 6
    (alone,) = (await completer.complete(replace(request, prompts=("a",), n=1))).choices
    assert alone == both[0]  # company changes nothing
    assert both[4].logprobs is not None
    assert both[4].logprobs.text_offset[0] == 1


async def test_best_of_keeps_the_likeliest_first(completer: Completer, model: ModelRef) -> None:
    request = CompletionRequest(model, ("a", "b"), n=8, max_tokens=5, seed=5, logprobs=0)
    everything = await completer.complete(request)
    best = await completer.complete(replace(request, n=2, best_of=8))

    def mean(choice: Choice) -> float:
        assert choice.logprobs is not None
        values = [value for value in choice.logprobs.token_logprobs if value is not None]
        return sum(values) / len(values)

    for p in range(2):
        ranked = sorted(everything.choices[8 * p : 8 * p + 8], key=mean, reverse=True)[:2]
        assert [c.text for c in best.choices[2 * p : 2 * p + 2]] == [c.text for c in ranked]
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert best.usage.completion_tokens == 2 * 8 * 5  # those not shown were generated too
    unscored = await completer.complete(replace(request, n=2, best_of=8, logprobs=None))
    assert [(c.text, c.logprobs) for c in unscored.choices] == [(c.text, None) for c in best.choices]


async def test_the_seed_decides_and_a_new_one_is_asked_once(engine: ScriptedEngine, model: ModelRef) -> None:
    seeds = iter([10, 11])
    completer = Completer(engine, max_resident_adapters=1, new_seed=lambda: next(seeds))
    request = CompletionRequest(model, ("a", "b"), n=2)
    first, second = await completer.complete(request), await completer.complete(request)
    assert first != second
    again = await completer.complete(replace(request, seed=10))
    assert again == first
    assert next(seeds, None) is None


ANSWER = f"caf\u00e9 {ALIEN}e\u0301 {ALIEN}## done\n"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.sampled_from([ALIEN, "#", "##", "e\u0301", "\u0301 ", "done", "zzz", "\n", " "]), max_size=4),
    echo=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
    max_tokens=st.integers(1, 30),
    n=st.integers(1, 2),
)
async def test_streamed_and_plain_agree_whatever_is_asked(
    answering: Answering,
    model: ModelRef,
    stops: list[str],
    echo: bool,
    logprobs: int | None,
    max_tokens: int,
    n: int,
) -> None:
    prompt = f"{ALIEN} ->"
    completer = answering({prompt: ANSWER})
    request = CompletionRequest(model, (prompt,), max_tokens, 0.0, n=n, stop=tuple(stops), echo=echo, logprobs=logprobs)
    plain = await completer.complete(request)
    deltas, usage = await stream(completer, request)
    assert usage == plain.usage
    for choice in plain.choices:
        mine = [delta for delta in deltas if delta.index == choice.index]
        assert Choice.join(mine) == choice
        assert [delta.finish_reason for delta in mine[:-1]] == [None] * (len(mine) - 1)
        body = choice.text.removeprefix(prompt) if echo else choice.text
        whole = BOX.decode(BOX.encode(ANSWER)[:max_tokens])
        cuts = [whole.index(stop) for stop in stops if stop in whole]
        assert body == whole[: min(cuts)] if cuts else whole
        assert choice.finish_reason == ("stop" if cuts or max_tokens > len(BOX.encode(ANSWER)) else "length")
        if choice.logprobs is not None:
            check_table(prompt, choice, echo)


def check_table(prompt: str, choice: Choice, echo: bool) -> None:
    table = choice.logprobs
    assert table is not None
    assert len({len(table.tokens), len(table.token_logprobs), len(table.top_logprobs), len(table.text_offset)}) == 1
    whole = choice.text if echo else prompt + choice.text
    for token, offset in zip(table.tokens, table.text_offset, strict=True):
        assert offset < len(whole)  # every row gave a part of the text
        if not token.startswith("bytes:"):
            common = whole[offset : offset + len(token)]
            assert token.startswith(common)
    if table.tokens:
        assert table.text_offset[0] == (0 if echo else len(prompt))
        shown = whole[table.text_offset[0] :]
        pieces = [t for t in table.tokens if not t.startswith("bytes:")]
        if len(pieces) == len(table.tokens):
            assert "".join(pieces).startswith(shown)


async def test_pieces_come_before_the_end(answering: Answering, model: ModelRef) -> None:
    completer = answering({"x": " one two three"})
    deltas, _ = await stream(completer, CompletionRequest(model, ("x",), temperature=0))
    assert [d.text for d in deltas] == [" one", " two", " three", ""]
    assert [d.finish_reason for d in deltas] == [None, None, None, "stop"]


async def test_token_prompts_are_taken_as_they_are(completer: Completer, model: ModelRef) -> None:
    ids = tuple(BOX.encode("The film"))
    asked = CompletionRequest(model, (ids, "The film"), max_tokens=3, temperature=0, logprobs=0)
    by_ids, by_text = (await completer.complete(asked)).choices
    assert replace(by_ids, index=1) == by_text
    nothing = await completer.complete(CompletionRequest(model, ((), ""), max_tokens=3, temperature=0))
    assert nothing.choices[0].text == nothing.choices[1].text
    assert nothing.usage.prompt_tokens == 2


async def test_a_prompt_cut_within_a_character_is_continued(answering: Answering, model: ModelRef) -> None:
    ids = tuple(BOX.encode(ALIEN))
    engine = ScriptedEngine(BOX.vocabulary_size, answers={ids[:1]: ids[1:]})
    completer = Completer(engine, max_resident_adapters=1, new_seed=lambda: 1)
    request = CompletionRequest(model, (ids[:1],), temperature=0, echo=True, logprobs=0)
    (choice,) = (await completer.complete(request)).choices
    assert choice.text == ALIEN
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == (0,) * len(ids)
    assert choice.logprobs.tokens[0] == BOX.token_text(ids[0])


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"max_tokens": -1}, "max_tokens", "at least 0; -1"),
        ({"temperature": 2.1}, "temperature", "between 0 and 2; 2.1"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"top_p": 1.5}, "top_p", "between 0 and 1"),
        ({"n": 0}, "n", "between 1 and 128"),
        ({"n": 129}, "n", "129"),
        ({"best_of": 21}, "best_of", "between 1 and 20"),
        ({"n": 3, "best_of": 2}, "best_of", "'n' (currently 3) to be at most 'best_of' (currently 2)"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20; 21"),
        ({"stop": ("a",) * 5}, "stop", "at most 4"),
        ({"stop": ("",)}, "stop", "empty string"),
        ({"presence_penalty": -2.5}, "presence_penalty", "between -2 and 2"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "between -2 and 2"),
        ({"logit_bias": {16_384: 1.0}}, "logit_bias", "0 to 16383"),
        ({"logit_bias": {1: 101.0}}, "logit_bias", "between -100 and 100"),
        ({"prompts": ()}, "prompt", "empty list"),
        ({"prompts": ("fine", (1, 2, 16_384))}, "prompt", "16384 at position 2"),
        ({"prompts": ((-1,),)}, "prompt", "-1 at position 0"),
        ({"prompts": ("\ud83d",)}, "prompt", "surrogate"),
    ],
)
async def test_values_outside_the_rules_are_refused_by_name(
    completer: Completer, model: ModelRef, changes: dict[str, Any], param: str, says: str
) -> None:
    request = replace(CompletionRequest(model, ("x",)), **changes)
    with pytest.raises(InvalidRequest) as refused:
        await completer.open(request)
    assert refused.value.param == param
    assert says in refused.value.message


async def test_the_context_bounds_prompt_and_completion(completer: Completer, model: ModelRef) -> None:
    prompt = (5,) * 2040
    with pytest.raises(InvalidRequest) as refused:
        await completer.open(CompletionRequest(model, ("x", prompt), max_tokens=10))
    assert refused.value.message == (
        "This model's maximum context length is 2049 tokens, however you requested 2050 tokens (2040 in your prompt; "
        "10 for the completion). Please reduce your prompt; or completion length."
    )
    assert (refused.value.param, refused.value.code) == (None, None)
    completion = await completer.complete(CompletionRequest(model, (prompt,), max_tokens=9))
    assert completion.usage.total_tokens <= 2049


async def test_texts_that_cannot_fit_cost_the_tokenizer_little(
    completer: Completer, model: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode_many = Tokenizer.encode_many

    def counted(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        encoded.append(sum(map(len, texts)))
        return encode_many(tokenizer, texts)

    await completer.complete(CompletionRequest(model, ("x",), max_tokens=0))  # the tokenizer is read, and tried
    monkeypatch.setattr(Tokenizer, "encode_many", counted)
    with pytest.raises(InvalidRequest, match="requested at least 58839 tokens"):
        await completer.open(CompletionRequest(model, ("x" * 1_000_000,)))
    assert encoded == []
    with pytest.raises(InvalidRequest, match="however you requested 5017 tokens"):
        await completer.open(CompletionRequest(model, ("a b " * 2_500,) * 1_000))
    assert encoded == [10_000 * ENCODED_AT_ONCE]
    await (await completer.open(CompletionRequest(model, ("x",) * (ENCODED_AT_ONCE + 1)))).aclose()
    assert encoded[1:] == [ENCODED_AT_ONCE, 1]


@pytest.mark.parametrize(
    ("capabilities", "changes", "param"),
    [
        (Capabilities(logit_bias=False), {"logit_bias": {1: 1.0}}, "logit_bias"),
        (Capabilities(penalties=False), {"presence_penalty": 1.0}, "presence_penalty"),
        (Capabilities(penalties=False), {"frequency_penalty": 1.0}, "frequency_penalty"),
        (Capabilities(seed=False), {"seed": 1}, "seed"),
        (Capabilities(prompt_logprobs=False), {"echo": True, "logprobs": 0}, "echo"),
        (Capabilities(max_top_logprobs=3), {"logprobs": 4}, "logprobs"),
    ],
)
async def test_what_the_engine_cannot_do_is_refused_by_name(
    model: ModelRef, capabilities: Capabilities, changes: dict[str, Any], param: str
) -> None:
    engine = ScriptedEngine(BOX.vocabulary_size, capabilities=capabilities)
    completer = Completer(engine, max_resident_adapters=1, new_seed=lambda: 1)
    with pytest.raises(InvalidRequest) as refused:
        await completer.open(replace(CompletionRequest(model, ("x",)), **changes))
    assert refused.value.param == param
    await completer.complete(CompletionRequest(model, ("x",), echo=True))  # the rest is served


async def test_a_model_whose_files_are_gone_is_not_found(
    completer: Completer, model: ModelRef, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotFound) as missing:
        await completer.open(CompletionRequest(replace(model, name="ada:ft-x", adapter_dir=tmp_path), ("x",)))
    assert missing.value.code == "model_not_found"
    assert "`ada:ft-x`" in missing.value.message
    assert str(tmp_path) in caplog.text


async def test_past_the_bound_requests_must_wait_and_then_go_on(engine: ScriptedEngine, model: ModelRef) -> None:
    completer = Completer(engine, max_resident_adapters=1, max_sequences=5, new_seed=lambda: 1)
    three, two = (CompletionRequest(model, ("a",) * count, max_tokens=50) for count in (3, 2))
    first = await completer.open(three)
    await completer.complete(two)
    with pytest.raises(RateLimited) as caught:
        await completer.complete(three)
    assert caught.value.retry_after_s > 0
    with pytest.raises(InvalidRequest):
        await completer.complete(replace(two, prompts=("a" * 100_000, "b")))  # gives its room back
    await first.aclose()
    await first.aclose()
    await completer.complete(three)
    dropped = await completer.open(replace(two, n=2))
    del dropped
    gc.collect()
    await completer.complete(three)


async def test_more_than_the_server_ever_takes_is_refused_for_good(engine: ScriptedEngine, model: ModelRef) -> None:
    completer = Completer(engine, max_resident_adapters=1, max_sequences=5, new_seed=lambda: 1)
    with pytest.raises(InvalidRequest, match=r"asks for 6 sequences .* at most 5") as refused:
        await completer.open(CompletionRequest(model, ("a",) * 3, n=2))
    assert refused.value.param == "prompt"


async def test_one_key_leaves_room_for_another(engine: ScriptedEngine, model: ModelRef) -> None:
    completer = Completer(engine, max_resident_adapters=1, max_sequences=16, new_seed=lambda: 1)
    greedy = CompletionRequest(model, ("a",), max_tokens=50, payer="greedy")
    held = [await completer.open(greedy) for _ in range(14)]
    with pytest.raises(RateLimited):
        await completer.open(greedy)
    await completer.complete(replace(greedy, payer="another", n=2))
    for stream in held:
        await stream.aclose()
    await completer.complete(replace(greedy, n=16))  # nobody else is there


async def test_closing_a_stream_ends_its_sequences(
    engine: ScriptedEngine, completer: Completer, model: ModelRef
) -> None:
    request = CompletionRequest(model, ("a", "b"), n=4, max_tokens=2000)
    pieces = await completer.open(request)
    await anext(pieces)
    assert engine.running == 8
    await pieces.aclose()
    assert engine.running == 0
    await pieces.aclose()


async def test_a_cancelled_request_ends_its_sequences(
    engine: ScriptedEngine, completer: Completer, model: ModelRef
) -> None:
    task = asyncio.create_task(completer.complete(CompletionRequest(model, ("a",), n=4, max_tokens=2000)))
    while engine.running < 4:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.running == 0


class FailingEngine(ScriptedEngine):
    """Dies at the third token of any sequence that asks for more."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineOutput, None]:
        count = 0
        async for output in super().generate(request):
            count += 1
            if count == 3:
                raise EngineUnavailable("The engine died.")
            yield output


async def test_the_end_of_the_engine_ends_the_stream(model: ModelRef) -> None:
    completer = Completer(FailingEngine(BOX.vocabulary_size), max_resident_adapters=1, new_seed=lambda: 1)
    request = CompletionRequest(model, ("a",), n=2, max_tokens=5)
    with pytest.raises(EngineUnavailable):
        await completer.complete(request)
    completion: Completion = await completer.complete(replace(request, max_tokens=2))
    assert len(completion.choices) == 2
