"""The recipe by its commands, on three megabytes of the real corpus where that lies beside the checkout."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretraining.corpus import DOCUMENT_SEPARATOR, read_documents

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "corpus" / "sample.txt.xz"

pytestmark = pytest.mark.skipif(not SAMPLE.exists(), reason="the sample of the corpus is not here")


def _run(module: str, *arguments: object) -> str:
    # Large tensors come and go: giving their memory back each time costs as much as the arithmetic.
    keeping = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
    environment = {**os.environ, **keeping, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def _write(path: Path, documents: list[str]) -> Path:
    path.write_bytes(lzma.compress(DOCUMENT_SEPARATOR.join(documents).encode()))
    return path


def test_two_minutes_of_the_recipe(tmp_path: Path) -> None:
    documents = read_documents(SAMPLE)
    corpus, held_out = (
        _write(tmp_path / "train.txt.xz", documents[:-40]),
        _write(tmp_path / "valid.txt.xz", documents[-40:]),
    )
    tokenizer, data, small, large = (tmp_path / name for name in ("tokenizer.json", "train.bin", "small", "large"))

    _run("pretraining.tokenizer", "--out", tokenizer, corpus)
    _run("pretraining.pack", "--tokenizer", tokenizer, "--out", data, corpus)
    batch = ("--data", data, "--batch-tokens", 2048, "--micro-batch-tokens", 2048, "--row-tokens", 128)
    # A grown model goes on where the small one was annealed to: a high rate would first undo that.
    slowly = ("--muon-learning-rate", 0.002, "--adam-learning-rate", 0.0006, "--decay-share", 1)
    _run("pretraining.train", "tiny", *batch, "--tokens", 1.5e5, "--warmup-steps", 15, "--out", small)
    _run("pretraining.grow", small, "ada", "--batch-tokens", 2048, "--out", large)
    _run("pretraining.train", "ada", *batch, *slowly, "--tokens", 2e4, "--warmup-steps", 3, "--out", large)

    scores = {}
    for folder in (small, large):
        _run("pretraining.export", folder, tmp_path / "packed" / folder.name, "--tokenizer", tokenizer)
        line = _run("pretraining.evaluate", folder, "--corpus", held_out)
        scores[folder] = float(line.split(": ")[1].split()[0])
    assert scores[small] < 2.9  # untrained: about 3.6
    assert scores[large] < scores[small]
