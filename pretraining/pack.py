"""Tokenises corpus shards into one flat file of 16-bit token ids, each document followed by `<|endoftext|>`.

python -m pretraining.pack --tokenizer build/tokenizer.json --out build/train.bin CORPUS/train-0*.txt.xz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pretraining.corpus import read_documents
from pretraining.tokenizer import END_OF_TEXT

DOCUMENTS_PER_CALL = 2_000


def pack(corpus: list[Path], tokenizer: Tokenizer, out: Path) -> int:
    """Writes the token file, documents in corpus order; returns the number of tokens."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:
        for path in corpus:
            documents = read_documents(path)
            for start in range(0, len(documents), DOCUMENTS_PER_CALL):
                for encoding in tokenizer.encode_batch_fast(documents[start : start + DOCUMENTS_PER_CALL]):
                    ids = np.array([*encoding.ids, end], dtype=np.uint16)
                    file.write(ids.tobytes())
                    tokens += len(ids)
    return tokens


def main() -> None:
    """Command line: corpus files and a tokenizer in, one token file out."""
    parser = argparse.ArgumentParser(description="Tokenise corpus shards into one flat file of 16-bit token ids.")
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokens = pack(arguments.corpus, Tokenizer.from_file(str(arguments.tokenizer)), arguments.out)
    print(f"{arguments.out}: {tokens:,} tokens")


if __name__ == "__main__":
    main()
