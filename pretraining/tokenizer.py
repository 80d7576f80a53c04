"""Trains the byte-level BPE of the models in the box: 16,384 entries, GPT-2 pre-tokenisation.

    python -m pretraining.tokenizer --out build/tokenizer.json CORPUS/train-00.txt.xz CORPUS/train-01.txt.xz

Class names have to be single tokens, because classification reads one token: every word of `CLASS_WORDS` and every
number from ` 0` to ` 999` becomes one entry. Where the corpus did not earn a word its entry, merges are appended at
the lowest rank that join its pieces, so no other word is split differently unless it contains the same pieces.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretraining.corpus import iterate_documents

VOCABULARY_SIZE = 16_384
END_OF_TEXT = "<|endoftext|>"
CLASS_NAMES = """
    yes no positive negative neutral true false spam ham baseball hockey good bad correct incorrect supported
    unsupported relevant irrelevant question answer sports politics business technology science entertainment
    world health urgent normal high medium low happy sad angry joy fear anger surprise love sadness toxic safe
    unsafe compliant noncompliant refund billing shipping support sales other none unknown mixed male female
    news fact opinion A B C D E F
"""
CLASS_WORDS = [*(f" {number}" for number in range(1000)), *(f" {name}" for name in CLASS_NAMES.split())]


def train(corpus: list[Path]) -> Tokenizer:
    """A tokenizer learned from the corpus, with exactly `VOCABULARY_SIZE` entries and every class word in one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iterate_documents(corpus), trainer)
    return with_class_words(tokenizer, CLASS_WORDS)


def with_class_words(tokenizer: Tokenizer, words: list[str]) -> Tokenizer:
    """The same tokenizer with every word of `words` in one entry and the vocabulary no larger than before.

    The rarest learned merges give way. Raises ValueError if `words` do not fit.
    """
    full: dict[str, Any] = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    learned = [tuple(merge) for merge in full["model"]["merges"]]
    keep = len(learned)
    while True:
        trial = _append_words(full, learned[:keep], words)
        excess = trial.get_vocab_size() - size
        if excess <= 0:
            return trial
        keep -= excess
        if keep < 0:
            raise ValueError(f"{len(words)} class words do not fit a vocabulary of {size} entries")


def _append_words(full: dict[str, Any], merges: list[tuple[str, ...]], words: list[str]) -> Tokenizer:
    alphabet = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = list(merges)
    while True:
        entries = dict.fromkeys([*alphabet, *("".join(merge) for merge in merges)])
        model = full["model"] | {"vocab": {entry: i for i, entry in enumerate(entries)}, "merges": merges}
        tokenizer = Tokenizer.from_str(json.dumps(full | {"model": model}))
        pieces = [encoding.tokens for encoding in tokenizer.encode_batch(words)]
        missing = dict.fromkeys((p[0], p[1]) for p in pieces if len(p) > 1)
        if not missing:
            return tokenizer
        merges.extend(missing)


def main() -> None:
    """Command line: corpus files in, one `tokenizer.json` out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = train(arguments.corpus)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out), pretty=False)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} entries")


if __name__ == "__main__":
    main()
