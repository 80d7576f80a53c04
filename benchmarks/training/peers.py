"""The peers' side: TRL's SFTTrainer and transformers' Trainer, both with PEFT, at the settings worth trying.

    python -m benchmarks.training.peers

Runs in an environment of its own (`requirements.txt`); knows nothing of tunesmith. Tasks come from `compare`; see
`forks`. Loss on completion tokens alone, whoever trains. On a GPU a batch goes in parts of as many tokens as ours.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from benchmarks.training import forks
from benchmarks.training.clock import Clock
from benchmarks.training.forks import Result, Task
from benchmarks.training.shapes import ALPHA, CONTEXT_TOKENS, LINEARS, RANK, Tokens, read_tokens

MICRO_BATCH_TOKENS = {"cpu": 4_096, "cuda": 16_384}
"""A batch of more tokens than this is accumulated from parts of about as many: memory stays within this machine's."""

SETTINGS: dict[str, dict[str, Any]] = {
    "TRL defaults": {},
    "TRL fp32": {"bf16": False, "gradient_checkpointing": False},
    "TRL bf16 packing": {"bf16": True, "gradient_checkpointing": False, "packing": True},
    "TRL bf16 by length": {
        "bf16": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
    "HF fp32": {"bf16": False},
    "HF fp32 by length": {"bf16": False, "train_sampling_strategy": "group_by_length"},
    "HF bf16 by length": {"bf16": True, "train_sampling_strategy": "group_by_length"},
}
"""Options beyond the defaults. TRL's are bf16 autocast with gradient checkpointing."""


def perform(task: Task) -> Result:
    """Steps of one trainer at one setting."""
    return measure(**task)


def measure(setting: str, base: str, tokens: str, batch: int, budget_s: float, threads: int, device: str) -> Result:
    """Trains until the budget is spent."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    rows = read_tokens(Path(tokens))
    watch = _Watch(Clock(budget_s, device))
    with tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as scratch:
        trainer = _trainer(setting, base, rows, batch, scratch, device)
        trainer.add_callback(watch)
        trainer.data_collator = watch.counted(trainer.data_collator)
        trainer.train()
    parts = trainer.args.gradient_accumulation_steps
    return watch.clock.result([sum(watch.tokens[at : at + parts]) for at in range(0, len(watch.tokens), parts)])


def _trainer(setting: str, base: str, rows: Sequence[Tokens], batch: int, scratch: str, device: str) -> Trainer:
    options, packing = SETTINGS[setting], SETTINGS[setting].get("packing", False)
    mean = sum(len(row.token_ids) for row in rows) / len(rows)
    parts = max(1, round(batch * mean / (CONTEXT_TOKENS if packing else MICRO_BATCH_TOKENS[device])))
    common = {
        "output_dir": scratch,
        "use_cpu": device == "cpu",
        "num_train_epochs": 1_000,
        "per_device_train_batch_size": 1 if packing else -(-batch // parts),
        "gradient_accumulation_steps": parts,
        "learning_rate": 1e-4,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{base}/tokenizer.json")
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    # On a GPU frozen weights are best left in 16 bits; on these processors autocast from fp32 was faster.
    rounded = device != "cpu" and options.get("bf16", True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if rounded else torch.float32)
    if setting.startswith("TRL"):
        from trl import SFTConfig, SFTTrainer  # here: the others can do without

        # A packed row holds as many tokens as the others' batch, or as their micro-batch.
        length = round(batch * mean / parts) if packing else CONTEXT_TOKENS
        return SFTTrainer(
            model=model,
            args=SFTConfig(**common, **options, max_length=length, completion_only_loss=True),
            train_dataset=_dataset(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
    return Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(**common, **options),
        train_dataset=[_marked(row, "labels") for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )


def _dataset(rows: Sequence[Tokens]) -> Any:
    import datasets  # which comes with TRL

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list([_marked(row, "completion_mask") for row in rows])


def _marked(row: Tokens, kind: str) -> dict[str, list[int]]:
    completion = row.token_ids[row.completion_start :]
    if kind == "labels":
        return {"input_ids": row.token_ids, kind: [-100] * row.completion_start + completion}
    return {"input_ids": row.token_ids, kind: [0] * row.completion_start + [1] * len(completion)}


class _Watch(transformers.TrainerCallback):
    """Times steps, and counts the real tokens of each batch as it is made."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokens: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.clock.tick()

    def counted(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`collate`, counting: without a mask there is no padding."""

        def collated(features: Any) -> Any:
            batch = collate(features)
            mask = batch.get("attention_mask")
            self.tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
            return batch

        return collated


if __name__ == "__main__":
    forks.serve(perform)
