"""Steps in bf16 and int8 against those of fp32, and against themselves: alone, beside others, in chunks, cached.

In both ways there are: by tiles, where the processor has them, and in fixed point.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import OWN, make_base
from tests.engine.models import make_adapter
from tunesmith.adapters import checkpoint
from tunesmith.decoder import loading
from tunesmith.engine import prompts, tiled
from tunesmith.engine.base import GenerateRequest, Precision, PromptScored, SamplingParams, TokenScore
from tunesmith.engine.blocks import BLOCK_TOKENS
from tunesmith.engine.deltas import PanelAdapter
from tunesmith.engine.messages import Produced
from tunesmith.engine.runner import LoadedBase, Runner
from tunesmith.runs.parity import BOUNDS

WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
VOCABULARY = 2_048
"""Fewer than the tokenizer has: here are ids alone."""
_LLAMA = OWN["llama"] | WIDE | {"vocab_size": VOCABULARY}
KINDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "biases": OWN["qwen2"] | WIDE | {"hidden_size": 128, "vocab_size": VOCABULARY},
    "wide heads": _LLAMA | {"num_key_value_heads": 1, "head_dim": 64},
    "odd vocabulary": OWN["mistral"] | WIDE | {"vocab_size": VOCABULARY + 7},
}
RANKS = (4, 16, 33)
precisions = pytest.mark.parametrize("precision", ["bfloat16", "int8"])
all_precisions = pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
Output = list[tuple[TokenScore, ...]]


@pytest.fixture(autouse=True, params=["tiles", "fixed point"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "tiles":
        request.getfixturevalue("tiles")
    else:
        monkeypatch.setattr(tiled, "covers", lambda _: False)
    yield request.param


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "llama", KINDS["llama"])


@pytest.fixture(scope="module")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    folder = tmp_path_factory.mktemp("adapters")
    return [None, *(make_adapter(base, folder / str(rank), seed=rank, rank=rank) for rank in RANKS)]


def _prompts(lengths: Sequence[int], seed: int = 5) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.choices(range(VOCABULARY), k=length)) for length in lengths]


def _overflowing(adapter: Path | None, folder: Path) -> None:
    """Writes the adapter with factors so large that what they give is no number."""
    assert adapter is not None
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({name: factor * 1e30 for name, factor in state.items()}, folder / "adapter_model.safetensors")


def _runner(
    base: Path,
    models: Sequence[Path | None],
    precision: Precision = "bfloat16",
    max_running: int = 64,
    step_tokens: int = 512,
    cache_bytes: int = 1 << 24,
) -> Runner:
    runner = Runner(precision=precision, max_running=max_running, step_tokens=step_tokens, cache_bytes=cache_bytes)
    for index, adapter in enumerate(models):
        runner.load(str(index), str(base), None if adapter is None else str(adapter))
    return runner


def _run(runner: Runner, asked: Sequence[tuple[int, tuple[int, ...]]], max_tokens: int, *, scored: bool) -> Output:
    """The scores of each request, prompt (where `scored`) and greedy completion, all asked at once."""
    return _run_some(runner, [(model, prompt, scored) for model, prompt in asked], max_tokens)


def _run_some(runner: Runner, asked: Sequence[tuple[int, tuple[int, ...], bool]], max_tokens: int = 4) -> Output:
    """The same, where each says whether its prompt is to be scored."""
    found: list[list[TokenScore]] = [[] for _ in asked]
    for number, (model, prompt, scored) in enumerate(asked):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        assert runner.submit(number, GenerateRequest(str(model), prompt, sampling, 2, score_prompt=scored)) == []
    while runner.busy:
        for event in runner.step():
            if isinstance(event, Produced):
                output = event.output
                found[event.number] += output.scores if isinstance(output, PromptScored) else [output.score]
    return [tuple(scores) for scores in found]


@precisions
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_fp32_but_for_rounding(tmp_path: Path, kind: str, precision: Precision) -> None:
    base = make_base(tmp_path / "base", KINDS[kind])
    models = [None, *(make_adapter(base, tmp_path / str(rank), seed=rank, rank=rank) for rank in RANKS)]
    asked = [(index % 4, prompt) for index, prompt in enumerate(_prompts([1, 5, 33, 64, 100, 31, 200, 2]))]

    exact = _run(_runner(base, models, "float32"), asked, 0, scored=True)
    found = _run(_runner(base, models, precision), asked, 0, scored=True)

    pairs = [
        (score.logprob, other.logprob)
        for mine, theirs in zip(found, exact, strict=True)
        for score, other in zip(mine, theirs, strict=True)
        if score.logprob is not None and other.logprob is not None
    ]
    assert len(pairs) > 400
    bound = BOUNDS[precision]
    assert all(abs(a - b) < bound.of(b) for a, b in pairs)
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < {"bfloat16": 0.02, "int8": 0.06}[precision]
    plain = _run(_runner(base, [None], precision), [(0, prompt) for _, prompt in asked], 0, scored=True)
    assert all(plain[i][1:] != found[i][1:] for i in range(1, 8) if asked[i][0])  # adapters do something


@all_precisions
@pytest.mark.parametrize("threads", [1, 2])
def test_an_answer_does_not_depend_on_what_else_is_computed(
    base: Path, models: list[Path | None], threads: int, precision: Precision
) -> None:
    asked = [(index % 4, prompt) for index, prompt in enumerate(_prompts([1 + 17 * i % 90 for i in range(24)]))]
    torch.set_num_threads(threads)
    try:
        together = _run(_runner(base, models, precision), asked, 12, scored=False)
    finally:
        torch.set_num_threads(1)

    runner = _runner(base, models, precision)  # the cache changes nothing: see below
    alone = [_run(runner, [one], 12, scored=False)[0] for one in asked]

    assert together == alone


@all_precisions
def test_what_follows_a_prompt_is_the_same_whether_the_prompt_is_scored_or_not(
    base: Path, models: list[Path | None], precision: Precision
) -> None:
    """Where it is not, the last layer is computed for the last token alone."""
    asked = [(index % 4, prompt) for index, prompt in enumerate(_prompts([1, 2, 31, 32, 33, 70, 100, 128]))]
    scored = _run(_runner(base, models, precision), asked, 3, scored=True)
    plain = _run(_runner(base, models, precision, step_tokens=64), asked, 3, scored=False)
    assert [scores[-3:] for scores in scored] == plain


@all_precisions
@pytest.mark.parametrize("threads", [1, 2])
def test_prompts_that_are_scored_and_others_go_together(
    base: Path, models: list[Path | None], threads: int, precision: Precision
) -> None:
    asked = [
        (index % 4, prompt, index % 3 == 0) for index, prompt in enumerate(_prompts([70, 5, 33, 1, 64, 100, 2, 90]))
    ]
    torch.set_num_threads(threads)
    try:
        together = _run_some(_runner(base, models, precision, step_tokens=130), asked)
    finally:
        torch.set_num_threads(1)
    assert together == [_run_some(_runner(base, models, precision), [one])[0] for one in asked]


@all_precisions
def test_chunks_and_the_cache_change_nothing(base: Path, models: list[Path | None], precision: Precision) -> None:
    start, *ends = _prompts([70, 9, 20, 40])
    asked = [(model, start + end) for model in (0, 3) for end in ends]
    whole = [_run(_runner(base, models, precision), [one], 5, scored=False)[0] for one in asked]

    chunked = _run(_runner(base, models, precision, max_running=3, step_tokens=7), asked, 5, scored=False)
    warm = _runner(base, models, precision)
    first = _run(warm, asked, 5, scored=False)
    computed = warm.tokens_computed
    again = _run(warm, asked, 5, scored=False)

    assert chunked == first == again == whole
    assert warm.tokens_computed - computed < computed


@all_precisions
def test_those_that_are_put_off_go_on_with_the_same_numbers(
    base: Path, models: list[Path | None], precision: Precision
) -> None:
    asked = [(index % 4, prompt) for index, prompt in enumerate(_prompts([30, 60, 33, 5, 90, 31]))]
    roomy, tight = _runner(base, models, precision), _runner(base, models, precision, cache_bytes=1)
    (loaded,) = tight._bases.values()
    per_sequence = -(-(90 + 60) // BLOCK_TOKENS)
    assert loaded.cache.pool.blocks < len(asked) * per_sequence

    expected = _run(roomy, asked, 60, scored=False)
    found = _run(tight, asked, 60, scored=False)

    assert found == expected
    assert tight.tokens_computed > roomy.tokens_computed  # some were put off


@precisions
def test_an_adapter_that_is_no_numbers_is_refused(
    base: Path, models: list[Path | None], tmp_path: Path, precision: Precision
) -> None:
    assert models[1] is not None
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((models[1] / name).read_bytes())
    state = load_file(broken / "adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, broken / "adapter_model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="finite"):
        _runner(base, [broken], precision)


@all_precisions
def test_what_overflowed_is_forgotten_by_whoever_gets_the_room(
    base: Path, models: list[Path | None], tmp_path: Path, precision: Precision
) -> None:
    _overflowing(models[1], tmp_path)
    spoilt, prompt = _prompts([30, 5])
    runner = _runner(base, [tmp_path, None], precision)

    _run(runner, [(0, spoilt)], 1, scored=True)
    after = _run(runner, [(1, prompt)], 3, scored=True)

    assert after == _run(_runner(base, [None], precision), [(0, prompt)], 3, scored=True)


@precisions
def test_what_overflows_stays_no_number(
    base: Path, models: list[Path | None], tmp_path: Path, precision: Precision
) -> None:
    """Whole numbers have no NaN: rounding a state that is none must not make a number of it."""
    _overflowing(models[1], tmp_path)
    asked = [(index % 2, prompt) for index, prompt in enumerate(_prompts([40, 40, 1, 2, 3]))]

    found = _run(_runner(base, [tmp_path, None], precision), asked, 1, scored=True)

    for (model, _), scores in zip(asked, found, strict=True):
        assert {math.isfinite(score.logprob) for score in scores if score.logprob is not None} == {model == 1}


@precisions
def test_it_goes_by_the_tiles_there_are(base: Path, tiny_base: Path, way: str, precision: Precision) -> None:
    for folder, tiles in ((base, way == "tiles"), (tiny_base, False)):  # the widths of that are no whole blocks
        runner = _runner(folder, [None], precision)
        (loaded,) = runner._bases.values()
        assert (loaded.tiled is not None) == tiles
        assert loaded.cache.dtype == (torch.bfloat16 if tiles else torch.float32)
        assert (loaded.panels is None) == tiles
        assert tiles or loaded.panels.head.bits == {"bfloat16": 16, "int8": 8}[precision]


def test_int8_is_refused_where_it_cannot_be(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"][1, 1] = torch.inf
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="finite"):
        Runner(precision="int8").load("0", str(tmp_path), None)

    monkeypatch.setattr(tiled, "covers", lambda _: False)
    monkeypatch.setattr(prompts, "library", lambda: None)
    with pytest.raises(ValueError, match="compiler"):
        Runner(precision="int8").load("0", str(base), None)


def test_weights_that_were_rounded_to_8_bits_are_not_rounded_again(base: Path, tmp_path: Path) -> None:
    """Where only the states are rounded, the same model is nearer to itself."""
    state = load_file(base / "model.safetensors")
    for name, weight in state.items():
        if weight.ndim == 2 and "embed" not in name:  # embeddings are looked up as they are
            scale = weight.abs().amax(1, keepdim=True) / 127
            state[name] = (weight / scale).round() * scale
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    asked = [(0, prompt) for prompt in _prompts([40, 60])]

    rounded = _run(_runner(tmp_path, [None], precision="int8"), asked, 0, scored=True)
    whole = _run(_runner(base, [None], precision="int8"), asked, 0, scored=True)

    for scores, others in zip(rounded, whole, strict=True):
        assert [score.logprob for score in scores[1:]] == pytest.approx(
            [score.logprob for score in others[1:]], abs=1e-3
        )


@pytest.mark.parametrize("way", ["fixed point"], indirect=True)  # by tiles there is no other form of them
def test_factors_of_adapters_have_8_bits_beside_any_rounded_weights(base: Path, tmp_path: Path) -> None:
    if prompts.library() is None:
        pytest.skip("there is no C++ compiler here")
    lora, _ = checkpoint.load(make_adapter(base, tmp_path / "adapter", seed=1), loading.load(base).config.layout)
    sizes: dict[Precision, int] = {}
    for precision in BOUNDS:
        loaded = LoadedBase.load(base, precision, "cpu", 1 << 20)
        adapter = loaded.adapter(lora)
        assert isinstance(adapter, PanelAdapter)
        sizes[precision] = adapter._packed.nbytes
    assert sizes["bfloat16"] == sizes["int8"] < sizes["float32"] / 2
