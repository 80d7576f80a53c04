from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import TOKENIZER
from tunesmith.core.models import ModelRef
from tunesmith.engine.scripted import ScriptedEngine
from tunesmith.serving.completer import Completer
from tunesmith.tokenizer import Tokenizer

BOX = Tokenizer.from_folder(TOKENIZER.parent)

Answering = Callable[[dict[str, str]], Completer]


@pytest.fixture
def model(tiny_base: Path) -> ModelRef:
    return ModelRef("ada", "ada", tiny_base, None, 2049)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(BOX.vocabulary_size)


@pytest.fixture
def completer(engine: ScriptedEngine) -> Completer:
    return Completer(engine, max_resident_adapters=4, new_seed=lambda: 1)


@pytest.fixture
def answering() -> Answering:
    """A completer whose model answers prompts as told (greedily), then ends the text."""

    def make(answers: dict[str, str]) -> Completer:
        ids = {tuple(BOX.prompt_ids(prompt)): tuple(BOX.encode(answer)) for prompt, answer in answers.items()}
        engine = ScriptedEngine(BOX.vocabulary_size, answers=ids)
        return Completer(engine, max_resident_adapters=4, new_seed=lambda: 1)

    return make
