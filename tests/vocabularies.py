"""Small real tokenizers of every kind that public checkpoints come with, made by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "This film was delightful, and the acting moving.\n\n###\n\n positive",
    "Every scene was dull and far too long.\n\n###\n\n negative",
    "row 1: great food and a long walk home -> yes",
    "row 2: awful rain on a sad day -> no",
    "Her new book is a triumph: warm, funny, worth every minute.",
] * 4
VOCABULARY_SIZE = 512
BYTES = [f"<0x{byte:02X}>" for byte in range(0x100)]
METASPACE = "\u2581"

Json = dict[str, Any]


def gpt2(folder: Path) -> Path:
    """Byte-level, `<|endoftext|>`, nothing in front; the files beside it say nothing."""
    return _save(folder, _byte_level(["<|endoftext|>"]))


def neox(folder: Path) -> Path:
    """As Pythia: composes characters first, has tokens for runs of spaces, and a space in front of each text."""
    tokenizer = _byte_level(["<|endoftext|>"], prefix=True)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return _save(folder, tokenizer, config={"eos_token_id": 0})


def llama3(folder: Path) -> Path:
    """Byte-level with a beginning in the post-processor, and two ends."""
    marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = _byte_level(marks)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _template("<|begin_of_text|>", 0)]
    )
    return _save(folder, tokenizer, config={"eos_token_id": 1}, generation={"eos_token_id": [1, 2]})


def opt(folder: Path) -> Path:
    """Byte-level with one mark that begins and ends texts; that it begins them, only the options say."""
    options = {"add_bos_token": True, "bos_token": {"content": "</s>"}, "eos_token": {"content": "</s>"}}
    return _save(folder, _byte_level(["<pad>", "</s>"]), config={"eos_token_id": 1}, options=options)


def llama2(folder: Path) -> Path:
    """SentencePiece's BPE as it used to be converted: the normalizer puts the space in front."""
    tokenizer = _metaspace_bpe(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    tokenizer.decoder = _decoder(decoders.Strip(" ", 1, 0))
    tokenizer.post_processor = _template("<s>", 1)
    options = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    return _save(folder, tokenizer, config={"bos_token_id": 1, "eos_token_id": 2}, options=options)


def mistral(folder: Path) -> Path:
    """The same as it is converted now: the pre-tokenizer puts the space in front."""
    tokenizer = _metaspace_bpe(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = _decoder(decoders.Strip(" ", 1, 0))
    tokenizer.post_processor = _template("<s>", 1)
    return _save(folder, tokenizer, options={"eos_token": "</s>"})


def gemma(folder: Path) -> Path:
    """SentencePiece's BPE with no space in front, a beginning, and a mark that the model has no row for."""
    tokenizer = _metaspace_bpe(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.normalizer = normalizers.Replace(" ", METASPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = _decoder()
    tokenizer.post_processor = _template("<bos>", 2)
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image>"])
    return _save(folder, tokenizer, config={"vocab_size": rows, "eos_token_id": 1})


def unigram(folder: Path) -> Path:
    """SentencePiece's Unigram; nothing but a space in front."""
    return _save(folder, _unigram(), config={"eos_token_id": 2})


def unigram_with_bos(folder: Path) -> Path:
    """The same with a beginning."""
    tokenizer = _unigram()
    tokenizer.post_processor = _template("<s>", 1)
    return _save(folder, tokenizer, config={"eos_token_id": 2})


KINDS: dict[str, Callable[[Path], Path]] = {
    make.__name__: make for make in (gpt2, neox, llama3, opt, llama2, mistral, gemma, unigram, unigram_with_bos)
}


def _byte_level(marks: list[str], *, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace_bpe(marks: list[str]) -> Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=[*marks, *BYTES], show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(learner.to_str())
    learnt["pre_tokenizer"] = None
    return _with_bytes(learnt, marks, unk_token="<unk>", fuse_unk=True)


def _unigram() -> Tokenizer:
    marks = ["<unk>", "<s>", "</s>"]
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=[*marks, *BYTES], unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)
    tokenizer = _with_bytes(json.loads(learner.to_str()), marks)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(METASPACE)])
    return tokenizer


def _with_bytes(learnt: Json, marks: Iterable[str], **options: object) -> Tokenizer:
    """Bytes are ordinary tokens to fall back on; only for the trainer were they marks."""
    learnt["added_tokens"] = [token for token in learnt["added_tokens"] if token["content"] in marks]
    learnt["model"] |= {"byte_fallback": True, **options}
    return Tokenizer.from_str(json.dumps(learnt))


def _decoder(*more: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def _template(mark: str, index: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(f"{mark} $A", f"{mark} $A {mark} $B", [(mark, index)])


def _save(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    config: Json | None = None,
    generation: Json | None = None,
    options: Json | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.enable_truncation(64)  # as some are published; no text may be cut
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {"config.json": config or {}, "generation_config.json": generation, "tokenizer_config.json": options}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder
