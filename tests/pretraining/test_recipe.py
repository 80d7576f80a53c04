"""The whole recipe on a few kilobytes: corpus -> tokenizer -> packed tokens -> weights -> bits per byte -> box."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pretraining import pack, tokenizer, train
from pretraining.corpus import DOCUMENT_SEPARATOR, read_documents
from pretraining.evaluate import bits_per_byte
from tunesmith.core import box
from tunesmith.decoder.llama import load

torch.set_num_threads(1)

BOX_TOKENIZER = box.BOX / "ada" / "tokenizer.json"
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
    recipe = train.Recipe(
        tokens=40 * 512, batch_tokens=512, micro_batch_tokens=256, row_tokens=64, long_row_tokens=128, warmup_steps=5
    )

    train.train("tiny", data, tmp_path / "whole", recipe, "cpu", checkpoint_every_steps=1_000)
    stopped_at = _train_until_first_checkpoint(data, tmp_path / "parts", recipe)
    train.train("tiny", data, tmp_path / "parts", recipe, "cpu", checkpoint_every_steps=1_000)

    whole, parts = (tmp_path / part / "model.safetensors" for part in ("whole", "parts"))
    assert 0 < stopped_at < recipe.steps
    assert whole.read_bytes() == parts.read_bytes()

    box_tokenizer = Tokenizer.from_file(str(BOX_TOKENIZER))
    documents = read_documents(corpus)[:2]
    trained = bits_per_byte(load(whole.parent), box_tokenizer, documents)
    untrained = train.random_llama(load(whole.parent).config, torch.Generator().manual_seed(0))
    assert trained < 0.6 * bits_per_byte(untrained, box_tokenizer, documents)

    (whole.parent / "tokenizer.json").write_bytes(BOX_TOKENIZER.read_bytes())
    box.pack(whole.parent, tmp_path / "packed")
    packed = bits_per_byte(load(box.unpack(tmp_path / "packed", tmp_path / "home")), box_tokenizer, documents)
    assert abs(packed - trained) < 0.02


def _train_until_first_checkpoint(data: Path, out: Path, recipe: train.Recipe) -> int:
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
            train.train("tiny", data, out, recipe, "cpu", checkpoint_every_steps=7)
    finally:
        train.save = original
    return 14


def test_head_loss_and_its_gradients_equal_plain_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator).requires_grad_()
    head = torch.randn(50, 16, generator=generator).requires_grad_()
    target = torch.randint(0, 50, (300,), generator=generator)
    (3 * train.HeadLoss.apply(hidden, head, target)).backward()
    ours = hidden.grad, head.grad
    hidden.grad = head.grad = None
    (3 * torch.nn.functional.cross_entropy(hidden @ head.T, target, reduction="sum")).backward()
    for mine, plain in zip(ours, (hidden.grad, head.grad), strict=True):
        assert torch.allclose(mine, plain, rtol=1e-4, atol=1e-4)
