"""Completions with the tokenizers of every kind: what is shown is the text, whatever stands before it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.vocabularies import KINDS, llama2, llama3
from tunesmith.core.models import ModelRef
from tunesmith.engine.embedded import EmbeddedEngine
from tunesmith.engine.scripted import ScriptedEngine
from tunesmith.errors import InvalidRequest
from tunesmith.serving.completer import Choice, Completer, CompletionRequest, Usage
from tunesmith.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

PROMPTS = ("This film was dull ->", " two\n", "caf\u00e9", "\u2581", "<s>x")
ANSWER = " positive caf\u00e9 \U0001f47d\n"


def serving(folder: Path) -> tuple[Tokenizer, Completer, ModelRef]:
    """A completer whose model answers each prompt with ANSWER, then ends the text."""
    tokenizer = Tokenizer.from_folder(folder)
    answers = {tuple(tokenizer.prompt_ids(prompt)): tuple(tokenizer.encode(ANSWER)) for prompt in ("", *PROMPTS)}
    engine = ScriptedEngine(tokenizer.vocabulary_size, answers=answers, end_of_text_id=tokenizer.ending_ids[-1])
    completer = Completer(engine, max_resident_adapters=1, new_seed=lambda: 1)
    return tokenizer, completer, ModelRef("ada", "ada", folder, None, 200)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_table_is_the_text_with_and_without_echo(tmp_path: Path, kind: str) -> None:
    tokenizer, completer, model = serving(KINDS[kind](tmp_path))
    request = CompletionRequest(model, PROMPTS, 40, 0.0, logprobs=2)
    plain = await completer.complete(request)
    echoed = await completer.complete(CompletionRequest(model, PROMPTS, 40, 0.0, logprobs=2, echo=True))
    for prompt, choice, whole in zip(PROMPTS, plain.choices, echoed.choices, strict=True):
        assert (choice.text, choice.finish_reason) == (ANSWER, "stop")
        assert (whole.text, whole.finish_reason) == (prompt + ANSWER, "stop")
        check_table(choice, prompt)
        check_table(whole, "")
        assert whole.logprobs is not None
        assert choice.logprobs is not None
        assert (whole.logprobs.token_logprobs[0], whole.logprobs.top_logprobs[0]) == (None, None)
        assert None not in whole.logprobs.token_logprobs[1:]
        answered = len(choice.logprobs.tokens)
        assert whole.logprobs.tokens[-answered:] == choice.logprobs.tokens
        assert whole.logprobs.text_offset[-answered:] == choice.logprobs.text_offset
        assert whole.logprobs.token_logprobs[-answered:] == choice.logprobs.token_logprobs
    ids = [tokenizer.prompt_ids(prompt) for prompt in PROMPTS]
    generated = (len(tokenizer.encode(ANSWER)) + 1) * len(PROMPTS)
    assert (
        plain.usage == echoed.usage == Usage(sum(map(len, ids)), generated)
    )  # what begins a text was read, and counts
    assert (
        await completer.complete(CompletionRequest(model, tuple(map(tuple, ids)), 40, 0.0, logprobs=2, echo=True))
        == echoed
    )


def check_table(choice: Choice, before: str) -> None:
    """Every token stands where its offset says, and they leave nothing out."""
    table = choice.logprobs
    assert table is not None
    shown = "".join(token for token in table.tokens if not token.startswith("bytes:"))
    if not any(token.startswith("bytes:") for token in table.tokens):
        assert shown == choice.text
    for token, offset in zip(table.tokens, table.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset - len(before) :].startswith(token)
    for token, logprob, top in zip(table.tokens, table.token_logprobs, table.top_logprobs, strict=True):
        assert (top is None) == (logprob is None)
        assert top is None or top[token] == logprob


async def test_an_empty_prompt_is_what_begins_a_text_and_shows_nothing(tmp_path: Path) -> None:
    _, completer, model = serving(llama2(tmp_path))
    request = CompletionRequest(model, ("",), 40, 0.0, logprobs=0, echo=True)
    completion = await completer.complete(request)
    assert completion.choices[0].text == ANSWER
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.text_offset[0] == 0
    assert completion.usage.prompt_tokens == 1


async def test_every_end_that_the_checkpoint_names_ends_an_answer(tmp_path: Path) -> None:
    folder = llama3(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    for end in tokenizer.ending_ids:
        engine = ScriptedEngine(
            tokenizer.vocabulary_size,
            answers={tuple(tokenizer.prompt_ids("x")): tuple(tokenizer.encode(" yes"))},
            end_of_text_id=end,
        )
        completer = Completer(engine, max_resident_adapters=1, new_seed=lambda: 1)
        request = CompletionRequest(ModelRef("ada", "ada", folder, None, 200), ("x",), temperature=0)
        (choice,) = (await completer.complete(request)).choices
        assert (choice.text, choice.finish_reason) == (" yes", "stop")


async def test_a_base_that_cannot_be_run_is_refused_with_the_reason(tmp_path: Path, tiny_base: Path) -> None:
    engine = EmbeddedEngine(threads=1)
    try:
        completer = Completer(engine, max_resident_adapters=1, new_seed=lambda: 1)
        for name, spoilt, reason in (
            ("words", "tokenizer.json", "the tokenizer's decoder is none"),
            ("weights", "model.safetensors", "header"),
        ):
            base = Path(shutil.copytree(tiny_base, tmp_path / name))
            (base / spoilt).write_text("{}")
            with pytest.raises(
                InvalidRequest, match=rf"The model `ada` cannot be run on this server: .*{reason}"
            ) as error:
                await completer.open(CompletionRequest(ModelRef("ada", "ada", base, None, 200), ("x",)))
            assert error.value.param == "model"
            assert str(tmp_path) not in error.value.message
        # What is advertised and what the engine takes should agree; where they do not, the user hears the numbers.
        model = ModelRef("ada", "ada", tiny_base, None, 9_999)
        with pytest.raises(InvalidRequest, match=r"need 3\d\d\d positions, and the model has 2048"):
            await completer.complete(CompletionRequest(model, ("x",), max_tokens=3_000))
    finally:
        await engine.close()
