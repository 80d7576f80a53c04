"""Engines that are called and not asked over HTTP: transformers' generate, its continuous batching, CTranslate2.

    python -m benchmarks.serving.engines

Runs in the environment of the peers; tasks come from `compare`, see `benchmarks.training.forks`. A task is one case of
one engine at one precision.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.cases import CASES, Case
from benchmarks.training import forks
from benchmarks.training.shapes import VOCABULARY_SIZE

Generate = Callable[[Sequence[Sequence[int]], int, bool], None]
"""(prompts, new tokens, whether log-probabilities are wanted)"""


def perform(task: forks.Task) -> forks.Result:
    """The rate of a case."""
    torch.set_num_threads(1)
    engine, precision = task["engine"], task["precision"]
    base = Path(task["base"])
    generate = {"generate": _generate, "batching": _batching, "ctranslate2": _ctranslate2}[engine](base, precision)
    chance = random.Random(task["seed"])
    generate(_prompts(chance, 2, 32), 2, False)
    case = next(case for case in CASES if case.name == task["case"])
    return {"rate": case.rate(partial(_seconds, generate, chance))}


def _prompts(chance: random.Random, count: int, length: int) -> list[list[int]]:
    return [[chance.randrange(3, VOCABULARY_SIZE) for _ in range(length)] for _ in range(count)]


def _seconds(generate: Generate, chance: random.Random, case: Case, requests: int, new: int) -> float:
    """Of processor time, for `requests`, as many at once as there are clients."""
    prompts = _prompts(chance, requests, case.prompt_tokens)
    begun = time.process_time()
    for first in range(0, requests, case.clients):
        generate(prompts[first : first + case.clients], new, case.logprobs)
    return time.process_time() - begun


def _generate(base: Path, precision: str) -> Generate:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, precision)).eval()

    def generate(prompts: Sequence[Sequence[int]], new: int, logprobs: bool) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=logprobs,
            )
            if logprobs:
                found.scores[0].float().log_softmax(-1).topk(5)

    return generate


def _batching(base: Path, precision: str) -> Generate:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, precision), attn_implementation="sdpa"
    ).eval()

    # Left to itself it takes most of the machine's memory for its cache.
    batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=2_048)

    def generate(prompts: Sequence[Sequence[int]], new: int, _: bool) -> None:  # it gives no log-probabilities
        config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch(
            list(map(list, prompts)), generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
        assert all(len(one.generated_tokens) == new for one in found.values())

    return generate


def _ctranslate2(base: Path, precision: str) -> Generate:
    import ctranslate2
    from transformers import AutoTokenizer

    converted = base.with_name("ctranslate2")
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(str(base)).convert(str(converted))
        config = json.loads((converted / "config.json").read_text())
        named = {key: "<|endoftext|>" if value is None else value for key, value in config.items()}
        (converted / "config.json").write_text(json.dumps(named))  # it cannot read a token that there is not
    generator = ctranslate2.Generator(str(converted), compute_type=precision, intra_threads=1, inter_threads=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)

    def generate(prompts: Sequence[Sequence[int]], new: int, logprobs: bool) -> None:
        found = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(list(prompt)) for prompt in prompts],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            return_scores=logprobs,
            include_prompt_in_result=False,
        )
        assert all(len(one.sequences_ids[0]) == new for one in found)

    return generate


if __name__ == "__main__":
    forks.serve(perform)
