"""The whole recipe on a few kilobytes: corpus -> tokenizer -> packed tokens -> weights -> bits per byte -> box."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pretraining import family, pack, shapes, tokenizer, train
from pretraining.corpus import DOCUMENT_SEPARATOR, read_documents
from pretraining.evaluate import bits_per_byte
from pretraining.grow import tokens_read
from pretraining.optimizer import Optimizer
from pretraining.recipe import Recipe
from tunesmith.core import box
from tunesmith.decoder.llama import load

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
BOX_TOKENIZER = box.BOX / box.TOKENIZER
SENTENCES = [f"Item {n}: the {c} of number {n % 7} is {n % 3} and not {n % 5}." for n, c in enumerate("abcdefgh" * 40)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "shard.txt.xz"
    documents = ["\n\n".join(SENTENCES[start : start + 20]) for start in range(0, len(SENTENCES), 20)]
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write(DOCUMENT_SEPARATOR.join(documents))
    return path


@pytest.fixture(scope="module")
def data(corpus: Path) -> Path:
    out = corpus.parent / "train.bin"
    pack.pack([corpus], Tokenizer.from_file(str(BOX_TOKENIZER)), out)
    return out


def test_packed_tokens_decode_to_the_corpus(corpus: Path, data: Path) -> None:
    ids = np.fromfile(data, dtype=np.uint16).tolist()
    text = Tokenizer.from_file(str(BOX_TOKENIZER)).decode(ids, skip_special_tokens=False)
    assert text.removesuffix(tokenizer.END_OF_TEXT).split(tokenizer.END_OF_TEXT) == read_documents(corpus)


def test_class_words_get_single_tokens_and_the_vocabulary_keeps_its_size(corpus: Path) -> None:
    small = Tokenizer(tokenizer.models.BPE())
    small.pre_tokenizer = tokenizer.pre_tokenizers.ByteLevel(add_prefix_space=False)
    small.decoder = tokenizer.decoders.ByteLevel()
    trainer = tokenizer.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[tokenizer.END_OF_TEXT],
        initial_alphabet=sorted(tokenizer.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    small.train_from_iterator(SENTENCES, trainer)
    words = [" positive", " negative", " 999"]
    grown = tokenizer.with_class_words(small, words)
    assert grown.get_vocab_size() <= small.get_vocab_size()
    assert [len(grown.encode(word).ids) for word in words] == [1, 1, 1]
    assert all(grown.decode(grown.encode(text).ids) == text for text in [*SENTENCES[:5], "déjà 🌍\x00 vu"])
    with pytest.raises(ValueError, match="do not fit"):
        tokenizer.with_class_words(small, [f" {n}" for n in range(900)])


def test_the_box_tokenizer_keeps_its_promises() -> None:
    box_tokenizer = Tokenizer.from_file(str(BOX_TOKENIZER))
    assert box_tokenizer.get_vocab_size() == tokenizer.VOCABULARY_SIZE
    assert all(len(encoding.ids) == 1 for encoding in box_tokenizer.encode_batch(tokenizer.CLASS_WORDS))
    assert box_tokenizer.encode(tokenizer.END_OF_TEXT).ids == [0]
    for text in ("", " ", "a\r\n\tb", "naïve 🏳️‍🌈 ‮x", "\x00\x01", "١٢٣ 12345", "ﷺ"):
        assert box_tokenizer.decode(box_tokenizer.encode(text).ids) == text


def test_a_run_learns_resumes_to_the_same_bytes_and_goes_into_the_box(corpus: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        tokens=40 * 512, batch_tokens=512, micro_batch_tokens=256, row_tokens=64, long_row_tokens=128, warmup_steps=5
    )

    train.train("tiny", data, tmp_path / "whole", recipe, train.Run())
    stopped_at = _train_until_first_checkpoint(data, tmp_path / "parts", recipe)
    train.train("tiny", data, tmp_path / "parts", recipe, train.Run())

    whole, parts = (tmp_path / part / "model.safetensors" for part in ("whole", "parts"))
    assert 0 < stopped_at < recipe.steps
    assert whole.read_bytes() == parts.read_bytes()

    box_tokenizer = Tokenizer.from_file(str(BOX_TOKENIZER))
    documents = read_documents(corpus)[:2]
    trained = bits_per_byte(load(whole.parent), box_tokenizer, documents)
    untrained = shapes.random_llama(load(whole.parent).config, torch.Generator().manual_seed(0))
    assert trained < 0.6 * bits_per_byte(untrained, box_tokenizer, documents)

    (whole.parent / "tokenizer.json").write_bytes(BOX_TOKENIZER.read_bytes())
    box.pack(whole.parent, tmp_path / "packed")
    packed = bits_per_byte(load(box.unpack(tmp_path / "packed", tmp_path / "home")), box_tokenizer, documents)
    assert abs(packed - trained) < 0.02


def _train_until_first_checkpoint(data: Path, out: Path, recipe: Recipe) -> int:
    """Trains into `out` and is stopped by a full disk, so to speak, after the second checkpoint."""

    class Stopped(Exception):
        pass

    saved = 0

    def save_then_stop(*arguments: object) -> None:
        nonlocal saved
        original(*arguments)  # type: ignore[arg-type]
        saved += 1
        if saved == 2:
            raise Stopped

    original, train.save = train.save, save_then_stop  # type: ignore[assignment]
    try:
        with pytest.raises(Stopped):
            train.train("tiny", data, out, recipe, train.Run(checkpoint_every_steps=7))
    finally:
        train.save = original
    return 14


def test_two_processes_share_a_run(data: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--tokens", 3 * 512, "--batch-tokens", 512, "--micro-batch-tokens", 256)
    options += ("--row-tokens", 64, "--long-share", 0, "--warmup-steps", 1, "--threads", 1)
    for name, launcher in (
        ("one", ()),
        ("two", ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m")),
    ):
        command = [sys.executable, "-m", *launcher, "pretraining.train", "tiny", *options, "--out", tmp_path / name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True)
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    for alone, shared in zip(one.parameters(), two.parameters(), strict=True):
        # Directions cross the processes in bf16, and Adam makes a whole step of a gradient that is rounding alone.
        assert (alone - shared).abs().mean() < 3e-4
        assert alone.std() > 0


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SETTLED", 1)
    monkeypatch.setattr(train, "MEASURED", 2)


SMALL = Recipe(
    tokens=train.NEVER, batch_tokens=256, micro_batch_tokens=128, row_tokens=64, long_row_tokens=128, warmup_steps=2
)


def test_a_family_is_trained_in_the_time_there_is(
    corpus: Path, data: Path, tmp_path: Path, quickly: None, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = read_documents(corpus)[:1]
    chosen = family.Family(data, BOX_TOKENIZER, tmp_path, SMALL, "cpu", False, documents)
    shares = {"tiny": 1.0, "ada": 3.0}
    family.train_family(chosen, shares, minutes=0.1)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["name"] for line in told] == ["tiny", "ada"]
    hot = tokens_read(tmp_path / "tiny" / "hot", 256)
    # The larger one goes on from where the smaller one was hot, and that one then read on while its rate fell.
    assert 0 < hot < told[0]["tokens"]
    assert told[1]["tokens"] > hot
    assert all(0 < line["bits_per_byte"] < 20 for line in told)
    assert not (tmp_path / "ada" / "hot").exists()
    unpacked = load(box.unpack(tmp_path / "packed" / "ada", tmp_path / "home"))
    assert unpacked.config == shapes.SHAPES["ada"]

    before = [(tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in shares]
    family.train_family(chosen, shares, minutes=0.1)  # what is there stays
    assert before == [(tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in shares]
    weights = (tmp_path / "ada" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "packed" / "ada")  # as if it had been stopped before the end
    family.train_family(chosen, shares, minutes=0.1)
    assert (tmp_path / "ada" / "model.safetensors").read_bytes() == weights
    assert load(box.unpack(tmp_path / "packed" / "ada", tmp_path / "home")).config == shapes.SHAPES["ada"]


def test_tokens_that_fit_into_a_time_stay_when_a_run_goes_on(data: Path, tmp_path: Path, quickly: None) -> None:
    pace = train.Pace(started=time.monotonic() - 20, first_step=0, first_s=5, seconds=0.5)
    assert pace.tokens(10, SMALL, 60) == pytest.approx((10 + 0.9 * 35 / 0.5) * 256, abs=2 * 256)
    assert pace.tokens(10, SMALL, 0) == 12 * 256

    train.train("tiny", data, tmp_path, SMALL, train.Run(minutes=0.05))
    optimizer = Optimizer.over([tensor.clone() for tensor in load(tmp_path).parameters()])
    reached = train.resume(tmp_path, optimizer)
    assert reached.tokens == reached.step * 256
    train.save(tmp_path, optimizer, replace(reached, step=reached.step - 1))
    train.train("tiny", data, tmp_path, SMALL, train.Run(minutes=60))
    assert train.resume(tmp_path, optimizer) == reached


@pytest.mark.parametrize("sizes", [(256, 96, 32, 64), (250, 125, 25, 25), (256, 128, 48, 64), (256, 32, 32, 64)])
def test_batches_are_whole_rows(sizes: tuple[int, int, int, int]) -> None:
    batch, micro, row, long_row = sizes
    with pytest.raises(ValueError, match="not made of whole parts") if sizes != (250, 125, 25, 25) else nullcontext():
        Recipe(tokens=1, batch_tokens=batch, micro_batch_tokens=micro, row_tokens=row, long_row_tokens=long_row)
