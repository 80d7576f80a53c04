"""Compiled steps of generation against those of torch, for every kind of model, adapter and batch that they cover."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import OWN, make_base
from tests.engine.models import make_adapter
from tests.tiny import VOCABULARY_SIZE, make_tiny_base
from tunesmith import compiled
from tunesmith.decoder import llama
from tunesmith.engine import prompts as prompts_module
from tunesmith.engine import tiled
from tunesmith.engine.base import GenerateRequest, Precision, SamplingParams, TokenScore
from tunesmith.engine.messages import Produced
from tunesmith.engine.native import covers
from tunesmith.engine.runner import LoadedBase, Runner

NATS = 2e-5
pytestmark = pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C++ compiler")


def answers(
    base: Path, adapters: list[Path | None], *, native: bool, prompts: list[tuple[int, ...]], max_tokens: int = 40
) -> list[list[TokenScore]]:
    """Greedy completions with log-probabilities: prompt i by adapter i, all in one batch."""
    runner = Runner()
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(prompts_module, "library", lambda: None)
        for index, adapter in enumerate(adapters):
            runner.load(str(index), str(base), None if adapter is None else str(adapter))
    assert all((model.base.native is not None) == native for model in runner._models.values())
    asked = {number: (str(number % len(adapters)), prompt) for number, prompt in enumerate(prompts)}
    return generated(runner, asked, max_tokens=max_tokens)


def generated(
    runner: Runner, asked: dict[int, tuple[str, tuple[int, ...]]], *, max_tokens: int
) -> list[list[TokenScore]]:
    """What comes greedily after each prompt from a model, all asked at once."""
    found: dict[int, list[TokenScore]] = {number: [] for number in asked}
    for number, (handle, prompt) in asked.items():
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        assert runner.submit(number, GenerateRequest(handle, prompt, sampling, 3)) == []
    while runner.busy:
        for event in runner.step():
            assert isinstance(event, Produced)
            found[event.number].append(event.output.score)  # type: ignore[union-attr]
    return list(found.values())


def check_equal(base: Path, adapters: list[Path | None], prompts: list[tuple[int, ...]]) -> None:
    ours, theirs = (answers(base, adapters, native=native, prompts=prompts) for native in (True, False))
    for mine, expected in zip(ours, theirs, strict=True):
        assert [score.token_id for score in mine] == [score.token_id for score in expected]
        for score, other in zip(mine, expected, strict=True):
            assert score.logprob == pytest.approx(other.logprob, abs=NATS)
            assert [value for _, value in score.top] == pytest.approx([value for _, value in other.top], abs=NATS)


def prompts_of(lengths: list[int], vocabulary: int = VOCABULARY_SIZE) -> list[tuple[int, ...]]:
    chance = random.Random(5)
    return [tuple(chance.choices(range(vocabulary), k=length)) for length in lengths]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_sequences_and_adapters(tiny_base: Path, tmp_path: Path, rows: int, threads: int) -> None:
    ranks = [4, 1, 7, 32]
    adapters: list[Path | None] = [None]
    adapters += [make_adapter(tiny_base, tmp_path / str(rank), seed=rank, rank=rank) for rank in ranks]
    torch.set_num_threads(threads)
    try:
        check_equal(tiny_base, adapters, prompts_of([1 + 13 * i for i in range(rows)]))
    finally:
        torch.set_num_threads(1)


def test_a_sequence_gets_the_same_bits_alone_and_in_company(tiny_base: Path) -> None:
    prompts = prompts_of([3, 40, 90, 1, 17, 33, 64, 5])
    together = answers(tiny_base, [None], native=True, prompts=prompts)
    for prompt, beside in zip(prompts, together, strict=True):
        (alone,) = answers(tiny_base, [None], native=True, prompts=[prompt])
        assert [(score.token_id, score.logprob, score.top) for score in alone] == [
            (score.token_id, score.logprob, score.top) for score in beside
        ]


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_so_it_does_with_the_vectors_of_other_processors(
    tiled_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int, precision: Precision
) -> None:
    monkeypatch.setattr(tiled, "covers", lambda _: False)
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, f"-DTUNESMITH_LANES={lanes}"))
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    adapters = [None, *(make_adapter(tiled_base, tmp_path / str(rank), seed=rank, rank=rank) for rank in (3, 16))]
    prompts = prompts_of([3, 40, 90, 1, 17, 33, 64, 5])

    def run(asked: Sequence[int], **settings: int) -> list[list[TokenScore]]:
        runner = Runner(precision=precision, **settings)
        for index, adapter in enumerate(adapters):
            runner.load(str(index), str(tiled_base), None if adapter is None else str(adapter))
        return generated(runner, {number: (str(number % 3), prompts[number]) for number in asked}, max_tokens=12)

    together = run(range(8))

    assert run(range(8), max_running=3, step_tokens=7) == together
    assert [run([number])[0] for number in range(8)] == together


def test_what_is_no_numbers_spoils_nobody_who_comes_after(tiled_base: Path, tmp_path: Path) -> None:
    """A block of the cache goes to the next sequence as it is, and only what that has written may count."""
    adapter = make_adapter(tiled_base, tmp_path / "broken", seed=1, rank=4)
    state = load_file(adapter / "adapter_model.safetensors")
    overflowing = {name: factor * 1e30 for name, factor in state.items()}
    save_file(overflowing, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    runner = Runner(cache_bytes=1)
    for name, folder in (("broken", adapter), ("sound", None)):
        runner.load(name, str(tiled_base), None if folder is None else str(folder))
    blocks = runner._models["sound"].base.cache.pool.blocks
    *prompts, short = prompts_of([64] * (blocks // 2 + 1) + [33])  # all of every block, and one position of the second

    broken = [generated(runner, {0: ("broken", prompt)}, max_tokens=1)[0][0] for prompt in prompts]
    (sound,) = generated(runner, {0: ("sound", short)}, max_tokens=5)

    assert all(score.logprob != score.logprob for score in broken)
    assert [sound] == answers(tiled_base, [None], native=True, prompts=[short], max_tokens=5)


@pytest.mark.parametrize("kind", sorted(OWN))
def test_every_kind_of_model_of_the_family(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / kind, OWN[kind])
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, rank=3)
    vocabulary = llama.load(base).config.vocabulary_size
    check_equal(base, [None, adapter], prompts_of([5, 40, 90], vocabulary))


def test_widths_that_fill_no_vector(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "odd", width=48, layers=3)
    check_equal(base, [None, make_adapter(base, tmp_path / "adapter", seed=1, rank=5)], prompts_of([3, 64]))


def test_weights_that_are_no_numbers_stay_so(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    runner = Runner()
    runner.load("a", str(base), None)
    loaded = next(iter(runner._bases.values()))
    assert loaded.panels is not None
    loaded.panels.layers[1]["down"].data.view(torch.float32)[5] = torch.nan
    sampling = SamplingParams(max_tokens=3, temperature=0)
    runner.submit(1, GenerateRequest("a", (5, 6), sampling, 0))
    scores = [event.output.score for _ in range(3) for event in runner.step()]  # type: ignore[union-attr]
    assert all(score.logprob != score.logprob for score in scores)


def test_without_a_compiler_torch_does_it(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.compiled.shutil.which", lambda name: None)
    compiled.load.cache_clear()
    try:
        base = LoadedBase.load(tiny_base, "float32", "cpu", 1 << 20)
        assert base.native is None
    finally:
        monkeypatch.undo()
        compiled.load.cache_clear()
    assert not covers(llama.load(tiny_base, torch.bfloat16))


def test_what_does_not_compile_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {")
    assert compiled.load(source) is None
    assert "did not compile broken.cpp" in caplog.text
    assert list((tmp_path / "cache" / "tunesmith").iterdir()) == []
    source = tmp_path / "whole.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    library = compiled.load(source)
    assert library is not None
    assert library.answer() == 42
    assert [path.suffix for path in (tmp_path / "cache" / "tunesmith").iterdir()] == [".so"]
