"""Steps in bf16 by tiles against those of fp32, and against themselves: alone, beside others, in chunks, cached."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import OWN, make_base
from tests.engine.models import make_adapter
from tests.tiles import needs_tiles
from tests.tiny import VOCABULARY_SIZE
from tunesmith.engine.base import GenerateRequest, PromptScored, SamplingParams, TokenScore
from tunesmith.engine.messages import Produced
from tunesmith.engine.runner import Runner

pytestmark = needs_tiles

WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
KINDS: dict[str, dict[str, Any]] = {
    "llama": OWN["llama"] | WIDE,
    "biases": OWN["qwen2"] | WIDE | {"hidden_size": 128},
    "wide heads": OWN["llama"] | WIDE | {"num_key_value_heads": 1, "head_dim": 64},
    "odd vocabulary": OWN["mistral"] | WIDE | {"vocab_size": VOCABULARY_SIZE + 7},
}
RANKS = (4, 16, 33)
Output = list[tuple[TokenScore, ...]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "llama", KINDS["llama"])


@pytest.fixture(scope="module")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    folder = tmp_path_factory.mktemp("adapters")
    return [None, *(make_adapter(base, folder / str(rank), seed=rank, rank=rank) for rank in RANKS)]


def _prompts(lengths: Sequence[int], seed: int = 5) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.choices(range(VOCABULARY_SIZE), k=length)) for length in lengths]


def _runner(
    base: Path,
    models: Sequence[Path | None],
    dtype: torch.dtype = torch.bfloat16,
    max_running: int = 64,
    step_tokens: int = 512,
) -> Runner:
    runner = Runner(dtype=dtype, max_running=max_running, step_tokens=step_tokens)
    for index, adapter in enumerate(models):
        runner.load(str(index), str(base), None if adapter is None else str(adapter))
    assert all((loaded.tiled is not None) == (dtype == torch.bfloat16) for loaded in runner._bases.values())
    return runner


def _run(runner: Runner, asked: Sequence[tuple[int, tuple[int, ...]]], max_tokens: int, *, scored: bool) -> Output:
    """The scores of each request, prompt (where `scored`) and greedy completion, all asked at once."""
    found: list[list[TokenScore]] = [[] for _ in asked]
    for number, (model, prompt) in enumerate(asked):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        assert runner.submit(number, GenerateRequest(str(model), prompt, sampling, 2, score_prompt=scored)) == []
    while runner.busy:
        for event in runner.step():
            if isinstance(event, Produced):
                output = event.output
                found[event.number] += output.scores if isinstance(output, PromptScored) else [output.score]
    return [tuple(scores) for scores in found]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_fp32_but_for_rounding(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", KINDS[kind])
    models = [None, *(make_adapter(base, tmp_path / str(rank), seed=rank, rank=rank) for rank in RANKS)]
    asked = [(index % 4, prompt) for index, prompt in enumerate(_prompts([1, 5, 33, 64, 100, 31, 200, 2]))]

    exact = _run(_runner(base, models, torch.float32), asked, 0, scored=True)
    found = _run(_runner(base, models), asked, 0, scored=True)

    pairs = [
        (score.logprob, other.logprob)
        for mine, theirs in zip(found, exact, strict=True)
        for score, other in zip(mine, theirs, strict=True)
        if score.logprob is not None and other.logprob is not None
    ]
    assert len(pairs) > 400
    assert max(abs(a - b) for a, b in pairs) < 0.1
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 0.02
    plain = _run(_runner(base, [None]), [(0, prompt) for _, prompt in asked], 0, scored=True)
    assert all(plain[i][1:] != found[i][1:] for i in range(1, 8) if asked[i][0])  # adapters do something


@pytest.mark.parametrize("threads", [1, 2])
def test_an_answer_does_not_depend_on_what_else_is_computed(
    base: Path, models: list[Path | None], threads: int
) -> None:
    asked = [(index % 4, prompt) for index, prompt in enumerate(_prompts([1 + 17 * i % 90 for i in range(24)]))]
    torch.set_num_threads(threads)
    try:
        together = _run(_runner(base, models), asked, 12, scored=False)
    finally:
        torch.set_num_threads(1)

    alone = [_run(_runner(base, models), [one], 12, scored=False)[0] for one in asked]

    assert together == alone


def test_chunks_and_the_cache_change_nothing(base: Path, models: list[Path | None]) -> None:
    start, *ends = _prompts([70, 9, 20, 40])
    asked = [(model, start + end) for model in (0, 3) for end in ends]
    whole = [_run(_runner(base, models), [one], 5, scored=False)[0] for one in asked]

    chunked = _run(_runner(base, models, max_running=3, step_tokens=7), asked, 5, scored=False)
    warm = _runner(base, models)
    first = _run(warm, asked, 5, scored=False)
    computed = warm.tokens_computed
    again = _run(warm, asked, 5, scored=False)

    assert chunked == first == again == whole
    assert warm.tokens_computed - computed < computed


def test_an_adapter_that_is_no_numbers_is_refused(base: Path, models: list[Path | None], tmp_path: Path) -> None:
    assert models[1] is not None
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((models[1] / name).read_bytes())
    state = load_file(broken / "adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, broken / "adapter_model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="finite"):
        _runner(base, [broken])


def test_what_has_no_whole_blocks_stays_in_fp32(tiny_base: Path) -> None:
    runner = Runner(dtype=torch.bfloat16)
    runner.load("0", str(tiny_base), None)
    (loaded,) = runner._bases.values()

    assert loaded.tiled is None
    assert loaded.cache.dtype == torch.float32
