"""The measurements of serving, small: every answer right while models come and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving import adapters
from benchmarks.serving.asking import drive
from benchmarks.serving.planted import Planter
from tests.e2e.harness import Server, put_base


@pytest.fixture(scope="module")
def planter(tiny_base: Path) -> Planter:
    return Planter(tiny_base, adapters.PROMPTS)


def test_no_model_gives_the_answer_of_another(tiny_base: Path, tmp_path: Path, planter: Planter) -> None:
    home = tmp_path / "home"
    put_base(home, "ada", tiny_base)
    with Server(home, {"TUNESMITH_MAX_RESIDENT_ADAPTERS": "3"}) as server:
        answers = adapters.plant(server, planter, tmp_path, 8)
        outcomes = drive(server, 16, adapters.questions(planter, answers, 150, seed=3))
    assert len(outcomes) == 150
    assert {outcome.kind for outcome in outcomes} == {kind for kind, _ in adapters.KINDS}
    assert [outcome.fault for outcome in outcomes if outcome.fault is not None] == []
