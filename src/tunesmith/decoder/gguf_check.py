"""Whether a GGUF file says what its model says: read back, and by llama.cpp itself where its server is installed.

Looked at are the likeliest next tokens after a few texts. Reading back shows that every weight is in the file and what
rounding does; llama.cpp shows that it is laid out and described as llama.cpp reads it, its tokenizer too.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.decoder import gguf_file
from tunesmith.decoder.gguf_file import Precision
from tunesmith.decoder.llama import Llama
from tunesmith.tokenizer import TRIALS, Tokenizer

TEXTS = (
    *TRIALS,
    "Once upon a time there was a small lighthouse on an island, and in it lived a keeper who wrote down the weather "
    "every evening: wind from the west, 12 knots; rain since noon. Nobody ever asked him for his notes, until one day",
)
LIKELIEST = 5
BOUND_NATS = {Precision.F32: 1e-3, Precision.BF16: 0.3, Precision.Q8_0: 1.0}
"""A file whose log-probabilities are further from the model's is not given out: more than rounding is wrong with it."""
SERVER = "llama-server"
START_S = 600.0
"""Within which it has loaded the file."""
LOOK_S = 0.05
OPTIONS = "-c 1024 -np 1 -ctk f32 -ctv f32 --no-warmup"
PRECISE = {"LLAMA_ARG_FLASH_ATTN": "off"}
"""Attention in fp32: the fused one is fp16, and 0.0006 nats off. As a variable, older versions take it too."""


class NotTheSame(Exception):
    """What is wrong with a file; a sentence."""


@dataclass(frozen=True, slots=True)
class Checked:
    """How far a file's log-probabilities are from those of its model, in nats."""

    read_back: float
    by_llama_cpp: float | None
    """None where it is not installed."""

    def __str__(self) -> str:
        told = f"Read back, the file's log-probabilities differ by at most {self.read_back:.5f} nats from the model's; "
        if self.by_llama_cpp is None:
            return f"{told}llama.cpp was not asked, as no {SERVER} is on PATH."
        return f"{told}those that llama.cpp computes from it by {self.by_llama_cpp:.5f}, of the same tokens."


@torch.inference_mode()
def check(path: Path, model: Llama, tokenizer: Tokenizer, precision: Precision) -> Checked:
    """Holds a file that was written of `model` against it. Raises NotTheSame."""
    rows = [tokenizer.prompt_ids(text)[: model.config.context_tokens - 1] for text in TEXTS]
    expected = [_logprobs(model, row) for row in rows]
    again = gguf_file.read(path, model)
    worst = max(
        float((_logprobs(again, row) - said).gather(1, said.topk(LIKELIEST).indices).abs().max())
        for row, said in zip(rows, expected, strict=True)
    )
    _hold(worst, precision, "read back from the file")
    program = shutil.which(SERVER)
    if program is None:
        return Checked(worst, None)
    with asked(program, path) as http:
        for text, row in zip(TEXTS, rows, strict=True):
            _hold_tokens(http, text, row, tokenizer)
        shown = tokenizer.encode("a")[0]
        by_llama_cpp = max(_distance(http, row, said, shown) for row, said in zip(rows, expected, strict=True))
    _hold(by_llama_cpp, precision, "that llama.cpp computes from the file")
    return Checked(worst, by_llama_cpp)


def _hold(nats: float, precision: Precision, which: str) -> None:
    if not nats <= BOUND_NATS[precision]:
        raise NotTheSame(
            f"the log-probabilities {which} differ from the model's by {nats:.4f} nats; at {precision} no more than "
            f"{BOUND_NATS[precision]} is rounding"
        )


def _logprobs(model: Llama, row: Sequence[int]) -> Tensor:
    """Of the token after each of a row, [T, V]."""
    hidden_ND = model.hidden(torch.tensor(row), torch.arange(len(row)), _causal)
    return model.logits(hidden_ND).log_softmax(-1)


def _causal(
    layer: int,  # noqa: ARG001 (rows are looked at whole: nothing is kept by layer)
    q_NHd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    *,
    window: int | None = None,  # noqa: ARG001 (models of the Llama family have none)
) -> Tensor:
    """`Attend` for one row."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHd, k_NKd, v_NKd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _hold_tokens(http: httpx.Client, text: str, row: Sequence[int], tokenizer: Tokenizer) -> None:
    answer = http.post("tokenize", json={"content": text, "add_special": True}).raise_for_status()
    found = answer.json()["tokens"][: len(row)]
    if found != list(row):
        raise NotTheSame(
            f"llama.cpp reads {text!r} as {tokenizer.prompt_text(found)!r} in {len(found)} tokens, its own tokenizer "
            f"in {len(row)}"
        )


def _distance(http: httpx.Client, row: Sequence[int], said_TV: Tensor, shown: int) -> float:
    """The largest difference after half of a row, and after all of it.

    `shown`: a token of whole characters, which is drawn: of any other llama.cpp shows no log-probabilities.
    """
    worst = 0.0
    for length in {len(row) // 2 or 1, len(row)}:
        body = {"prompt": row[:length], "n_predict": 1, "n_probs": LIKELIEST, "logit_bias": [[shown, 1e3]]}
        answer = http.post("completion", json=body).raise_for_status()
        for found in answer.json()["completion_probabilities"][0]["top_logprobs"]:
            worst = max(worst, abs(found["logprob"] - float(said_TV[length - 1, found["id"]])))
    return worst


@contextmanager
def asked(program: str, path: Path) -> Iterator[httpx.Client]:
    """llama.cpp's server over one model, on a socket of its own; keys and values in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        address, log = Path(folder) / "llama.sock", Path(folder) / "log"
        command = [program, "-m", str(path), "--host", str(address), *OPTIONS.split()]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=os.environ | PRECISE, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        try:
            transport = httpx.HTTPTransport(uds=str(address))
            with httpx.Client(transport=transport, base_url="http://llama", timeout=START_S) as http:
                give_up = time.monotonic() + START_S
                while not _is_loaded(http, address):
                    if process.poll() is not None or time.monotonic() > give_up:
                        said = log.read_text(errors="replace").splitlines()
                        raise NotTheSame(f"{program} does not load the file: {' '.join(said[-3:])[-300:]}")
                    time.sleep(LOOK_S)
                yield http
        finally:
            process.kill()
            process.wait()


def _is_loaded(http: httpx.Client, address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as knock:
        try:
            knock.connect(str(address))
        except OSError:  # it does not listen yet
            return False
    return http.get("health").status_code == httpx.codes.OK
