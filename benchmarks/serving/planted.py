"""Adapters that give answers known beforehand, made without training, in PEFT's format.

All of an adapter stands at one place: the last product of the last layer. Its factors are solved for, so that after
each prompt, and after each token of its answer, the answer's next token is pushed up and nothing else changes. So the
answer is known, and its log-probabilities follow from one forward of the base alone.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from tunesmith.tokenizer import Tokenizer

ANSWER_WORDS = 2
"""Tokens of each answer before the end of the text."""
PUSH = 30.0
"""How much of an answer's direction is added to a hidden state: far more than there is."""
CLEARLY = 1.0
"""By so many nats an answer's token is likelier than the next."""
WORDS = 500


@dataclass(frozen=True)
class Answer:
    """What one adapter says to one prompt."""

    ids: tuple[int, ...]
    """The end of the text is the last."""
    text: str
    logprobs: tuple[float, ...]
    """Of each of `ids`."""


class Planter:
    """Makes adapters of one base; all know the same prompts, and each has answers of its own."""

    def __init__(self, base_dir: Path, prompts: Sequence[str]) -> None:
        self.prompts = tuple(prompts)
        self._model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
        self._tokenizer = Tokenizer.from_folder(base_dir)
        self._last = len(self._model.model.layers) - 1
        # Words by themselves: whole, and told apart by a reader of a failed run.
        words = (i for i in range(self._tokenizer.vocabulary_size) if _is_word(self._tokenizer.token_text(i)))
        with torch.inference_mode():
            self._words = list(itertools.islice(filter(self._said, words), WORDS))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Of one of the prompts."""
        return self._tokenizer.prompt_ids(prompt)

    @torch.inference_mode()
    def plant(self, folder: Path, seed: int) -> dict[str, Answer]:
        """Writes an adapter to `folder`; what it says to each prompt."""
        chance = random.Random(seed)
        end = self._tokenizer.end_of_text_id
        answers = {prompt: (*chance.sample(self._words, ANSWER_WORDS), end) for prompt in self.prompts}
        inner, hidden = zip(*(self._states(prompt, ids) for prompt, ids in answers.items()), strict=True)
        inner_RI, hidden_RD = torch.cat(inner), torch.cat(hidden)
        targets_R = torch.tensor([token_id for ids in answers.values() for token_id in ids])
        a_RI = torch.linalg.pinv(inner_RI).T  # a_RI @ inner_RI.T is the identity
        b_DR = PUSH * normalize(self._model.lm_head.weight[targets_R], dim=-1).T.contiguous()
        said_RV = self._model.lm_head(self._model.model.norm(hidden_RD + inner_RI @ a_RI.T @ b_DR.T)).log_softmax(-1)
        assert said_RV.argmax(-1).equal(targets_R), "an answer was not the likeliest: take another seed"
        self._save(folder, a_RI.contiguous(), b_DR)
        logprobs = said_RV.gather(1, targets_R[:, None])[:, 0].view(len(answers), -1).tolist()
        return {
            prompt: Answer(ids, self._tokenizer.decode(ids[:-1]), tuple(row))
            for (prompt, ids), row in zip(answers.items(), logprobs, strict=True)
        }

    def _said(self, target: int) -> bool:
        """Whether a token is clearly the likeliest where its own embedding is pushed: not all are."""
        pushed_D = self._model.model.norm(self._model.lm_head.weight[target] * PUSH)
        first, second = self._model.lm_head(pushed_D).topk(2).values
        return bool(self._model.lm_head(pushed_D)[target] == first and first - second > CLEARLY)

    def _states(self, prompt: str, answer: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What goes into the last product, and the hidden state without the adapter, where the answer is predicted."""
        seen: dict[str, Tensor] = {}
        layers = self._model.model
        hooks = [
            layers.layers[self._last].mlp.down_proj.register_forward_pre_hook(
                lambda _, inputs: seen.__setitem__("inner", inputs[0][0])
            ),
            layers.norm.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("hidden", inputs[0][0])),
        ]
        try:
            self._model(torch.tensor([[*self.prompt_ids(prompt), *answer[:-1]]]))
        finally:
            for hook in hooks:
                hook.remove()
        return seen["inner"][-len(answer) :], seen["hidden"][-len(answer) :]

    def _save(self, folder: Path, a_RI: Tensor, b_DR: Tensor) -> None:
        folder.mkdir(parents=True)
        place = f"model.layers.{self._last}.mlp.down_proj"
        weights = {f"base_model.model.{place}.lora_A.weight": a_RI, f"base_model.model.{place}.lora_B.weight": b_DR}
        save_file(weights, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": len(a_RI), "lora_alpha": len(a_RI), "target_modules": place, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))


def _is_word(text: str) -> bool:
    return text.isascii() and text[:1] == " " and text[1:].isalpha()


def package(folder: Path) -> bytes:
    """The folder as the zip that a model is imported from."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as opened:
        for path in sorted(folder.iterdir()):
            opened.write(path, path.name)
    return out.getvalue()
