"""Every parameter of a completion against transformers and PEFT, in any company, streamed and plain."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.models import make_adapter
from tests.serving.conftest import BOX
from tests.serving.plain import PlainChoice, answer, distributions, shaped
from tunesmith.core.models import ModelRef
from tunesmith.engine.embedded import EmbeddedEngine
from tunesmith.serving.completer import Choice, ChoiceDelta, Completer, Completion, CompletionRequest, Usage

pytestmark = [
    pytest.mark.anyio,
    # PEFT asks transformers by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
NATS = 1e-4
ALIEN = "\N{EXTRATERRESTRIAL ALIEN}"


@dataclass(frozen=True)
class Subject:
    """A model here, and the same in transformers and PEFT."""

    ref: ModelRef
    theirs: Any


@pytest.fixture(scope="module")
def subjects(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    folder = tmp_path_factory.mktemp("golden")

    def theirs() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()

    found = [Subject(ModelRef("ada", "ada", tiny_base, None, 2049), theirs())]
    for seed, rank in ((21, 3), (22, 8)):
        adapter = make_adapter(tiny_base, folder / str(seed), seed=seed, rank=rank)
        ref = ModelRef(f"ada:ft-{seed}", "ada", tiny_base, adapter, 2049)
        found.append(Subject(ref, PeftModel.from_pretrained(theirs(), adapter).eval()))
    return found


@pytest.fixture
async def completer() -> AsyncIterator[Completer]:
    engine = EmbeddedEngine(threads=1)
    yield Completer(engine, max_resident_adapters=8, new_seed=lambda: 1)
    await engine.close()


async def streamed(completer: Completer, request: CompletionRequest) -> Completion:
    """A stream put together again."""
    pieces: dict[int, list[ChoiceDelta]] = {}
    usage = Usage(0, 0)
    async with aclosing(await completer.open(request)) as stream:
        async for piece in stream:
            if isinstance(piece, Usage):
                usage = piece
            else:
                pieces.setdefault(piece.index, []).append(piece)
    return Completion(tuple(Choice.join(pieces[index]) for index in sorted(pieces)), usage)


async def hang_up(completer: Completer, request: CompletionRequest) -> None:
    """Asks, reads one piece and goes away."""
    async with aclosing(await completer.open(request)) as stream:
        await anext(stream)


def check(choice: Choice, expected: PlainChoice) -> None:
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    if expected.rows is None:
        assert choice.logprobs is None
        return
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == tuple(row.token for row in expected.rows)
    assert choice.logprobs.text_offset == tuple(row.offset for row in expected.rows)
    for mine, row in zip(choice.logprobs.rows, expected.rows, strict=True):
        assert (mine.logprob is None) == (row.logprob is None)
        if row.logprob is not None:
            assert mine.logprob == pytest.approx(row.logprob, abs=NATS)
        assert [logprob for _, logprob in mine.top] == pytest.approx(row.best, abs=NATS)


def close(one: Completion, other: Completion) -> bool:
    """Whether two answers are the same but for rounding."""
    if one.usage != other.usage or len(one.choices) != len(other.choices):
        return False
    for mine, theirs in zip(one.choices, other.choices, strict=True):
        if (mine.text, mine.finish_reason, mine.index) != (theirs.text, theirs.finish_reason, theirs.index):
            return False
        if mine.logprobs is not None and theirs.logprobs is not None:
            pairs = zip(mine.logprobs.token_logprobs, theirs.logprobs.token_logprobs, strict=True)
            if any((a is None) != (b is None) or abs((a or 0) - (b or 0)) > NATS for a, b in pairs):
                return False
    return True


def any_request(chance: random.Random, model: ModelRef) -> CompletionRequest:
    """Every field at random, in values that act on each other."""

    def prompt() -> str | tuple[int, ...]:
        if chance.random() < 0.5:
            return chance.choice(["The plot was", f"caf\u00e9 {ALIEN} ->", "", "a" * 200])
        return tuple(chance.choices(range(1, BOX.vocabulary_size), k=chance.randint(1, 40)))

    n = chance.randint(1, 3)
    stops = ["e", "a", " t", "in", "\n", ALIEN, "th", "s "]
    # A few tokens that are likely enough to come again, so that penalties and stops have something to act on.
    favoured = chance.sample([0, 260, 300, 301, 999, 4000, 5000], k=chance.choice([0, 0, 3, 6]))
    return CompletionRequest(
        model,
        tuple(prompt() for _ in range(chance.randint(1, 2))),
        max_tokens=chance.choice([0, 1, 4, 8, 8]),
        temperature=chance.choice([0, 0.4, 1, 1.8]),
        top_p=chance.choice([1, 1, 0.9, 0.3, 0]),
        n=n,
        best_of=chance.choice([None, None, n, 4]),
        echo=chance.random() < 0.4,
        logprobs=chance.choice([None, 0, 3, 5]),
        stop=tuple(chance.sample(stops, k=chance.choice([0, 0, 1, 4]))),
        presence_penalty=chance.choice([0, 0, 2, -2]),
        frequency_penalty=chance.choice([0, 0, 1.5, -1]),
        logit_bias={token_id: chance.choice([-100, 8, 10]) for token_id in favoured},
        seed=chance.randrange(2**63),
    )


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 24))])
async def test_every_parameter(completer: Completer, subjects: list[Subject], seed: int) -> None:
    chance = random.Random(seed)
    asked = [(subject, any_request(chance, subject.ref)) for subject in chance.choices(subjects, k=10)]
    # All at once, each the company of the others; some hang up.
    work = [
        asyncio.gather(
            completer.complete(request),
            completer.complete(request) if request.ranked else streamed(completer, request),
            hang_up(completer, replace(request, best_of=None, max_tokens=20)),
        )
        for _, request in asked
    ]
    for (subject, request), (plain, other, _) in zip(asked, await asyncio.gather(*work), strict=True):
        expected, prompt_tokens, completion_tokens = answer(subject.theirs, BOX, request)
        assert plain.usage == Usage(prompt_tokens, completion_tokens)
        assert [choice.index for choice in plain.choices] == list(range(len(expected)))
        for choice, wanted in zip(plain.choices, expected, strict=True):
            check(choice, wanted)
        assert close(other, plain)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)])
async def test_samples_follow_the_distribution(
    completer: Completer, subjects: list[Subject], temperature: float, top_p: float
) -> None:
    """Without the help of chance that is known: frequencies against probabilities."""
    subject = subjects[1]
    biases = {token_id: 12.0 - rank / 2 for rank, token_id in enumerate([260, 300, 999, 4000, 5000])}
    request = CompletionRequest(subject.ref, ("The plot",), 1, temperature, top_p, n=128, logit_bias=biases, logprobs=0)
    drawn: Counter[str] = Counter()
    for seed in range(8):
        done = await completer.complete(replace(request, seed=seed))
        drawn.update(choice.logprobs.tokens[0] for choice in done.choices if choice.logprobs is not None)
    weights = shaped(distributions(subject.theirs, [BOX.prompt_ids("The plot")])[0], request, [])
    chosen = {BOX.token_text(token_id): float(weights[token_id]) for token_id in biases}
    total = drawn.total()
    for token, probability in [*chosen.items(), ("others", 1 - sum(chosen.values()))]:
        count = drawn[token] if token in chosen else total - sum(drawn[name] for name in chosen)
        # Four standard deviations, and three draws for what is all but impossible.
        assert abs(count - total * probability) <= 4 * np.sqrt(total * probability * (1 - probability)) + 3
        assert probability > 0 or count == 0


@pytest.mark.parametrize("seed", range(3))
async def test_any_mix_equals_one_at_a_time(completer: Completer, subjects: list[Subject], seed: int) -> None:
    chance = random.Random(seed)
    beginnings = ["Be brief. " * 12, "The story so far: " * 9]  # longer than a block of the cache: found there again
    requests = [
        CompletionRequest(
            chance.choice(subjects).ref,
            tuple(f"{chance.choice(beginnings)}{chance.randrange(3)}" for _ in range(chance.randint(1, 2))),
            max_tokens=chance.choice([0, 1, 1, 5, 12]),
            temperature=chance.choice([0.0, 1.0]),
            n=chance.randint(1, 3),
            echo=chance.random() < 0.3,
            logprobs=chance.choice([None, 0, 2]),
            stop=chance.choice([(), ("e",)]),
            frequency_penalty=chance.choice([0.0, 0.5]),
            seed=number,
            payer=chance.choice("ab"),
        )
        for number in range(24)
    ]

    async def ask(request: CompletionRequest, how: int, pause: int) -> Completion | None:
        for _ in range(pause):
            await asyncio.sleep(0)
        if how == 0:
            return await streamed(completer, request)
        if how == 1:
            await hang_up(completer, request)
            return None
        return await completer.complete(request)

    together = await asyncio.gather(*(ask(r, chance.randrange(4), chance.randrange(200)) for r in requests))
    for request, mixed in zip(requests, together, strict=True):
        engine = EmbeddedEngine(threads=1) if request.seed == 0 else None  # one of them with an empty cache, too
        alone = completer if engine is None else Completer(engine, max_resident_adapters=8, new_seed=lambda: 1)
        assert mixed is None or close(mixed, await alone.complete(request))
        if engine is not None:
            await engine.close()


async def test_a_scored_text_has_the_numbers_it_was_generated_with(
    completer: Completer, subjects: list[Subject]
) -> None:
    """Plain, at once with the same, after a hit in the cache, and scored: one log-probability for one token."""
    for subject in subjects:
        ids = tuple(BOX.prompt_ids("The plot was dull and the music loud. " * 6))
        request = CompletionRequest(subject.ref, (ids,), 9, 0.7, n=2, seed=3, logprobs=0, logit_bias={0: -100})
        first, *again = [await completer.complete(request) for _ in range(2)]
        again += await asyncio.gather(*(completer.complete(request) for _ in range(3)))
        assert all(close(first, other) for other in again)
        for choice in first.choices:
            assert choice.logprobs is not None
            generated = [_id_of(row.content) for row in choice.logprobs.rows]
            scoring = CompletionRequest(subject.ref, ((*ids, *generated),), 0, echo=True, logprobs=0)
            table = (await completer.complete(scoring)).choices[0].logprobs
            assert table is not None
            scored = list(itertools.islice(table.token_logprobs, len(ids), None))
            assert scored == pytest.approx(list(choice.logprobs.token_logprobs), abs=NATS)


def _id_of(content: bytes) -> int:
    return next(token_id for token_id in range(BOX.vocabulary_size) if BOX.token_bytes(token_id) == content)
