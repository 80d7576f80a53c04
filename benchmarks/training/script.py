"""What one writes today to tune a model with TRL and PEFT and to ask it; the peer of `headline`.

    python -m benchmarks.training.script '{"base": ..., ...}'

Runs in the peers' environment; knows nothing of tunesmith. The last line it prints is JSON: seconds of each stage, and
the accuracy on the held-out rows, unless training was cut.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import json  # noqa: E402 (importing is a stage of its own)
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import datasets  # noqa: E402
import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

IMPORTED = time.perf_counter()


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves, loads, answers."""
    torch.set_num_threads(task["threads"])
    folder = Path(task["folder"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{task['base']}/tokenizer.json")
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    trainer = SFTTrainer(
        model=task["base"],
        args=SFTConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            num_train_epochs=task["epochs"],
            max_steps=task["most_steps"] or -1,
            per_device_train_batch_size=task["batch"],
            learning_rate=task["learning_rate"],
            warmup_steps=0.03,
            lr_scheduler_type="linear",
            bf16=True,
            gradient_checkpointing=False,
            train_sampling_strategy="group_by_length",
            completion_only_loss=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=_dataset(folder / "train.jsonl", tokenizer),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=task["rank"], lora_alpha=task["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    prepared, prepared_cpu = time.perf_counter(), time.process_time()
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    trained, trained_cpu = time.perf_counter(), time.process_time()
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    right = _is_right(model, tokenizer, held_out[0])
    answered = time.perf_counter()
    if not task["most_steps"]:
        right += sum(_is_right(model, tokenizer, row) for row in held_out[1:])
    rows = sum(1 for _ in (folder / "train.jsonl").open())
    return {
        "import_s": IMPORTED - BEGAN,
        "prepare_s": prepared - IMPORTED,
        "train_s": trained - prepared,
        "train_cpu_s": trained_cpu - prepared_cpu,
        "answer_s": answered - trained,
        "steps": trainer.state.global_step,
        "all_steps": -(-rows // task["batch"]) * task["epochs"],
        "accuracy": None if task["most_steps"] else right / len(held_out),
    }


def _dataset(path: Path, tokenizer: PreTrainedTokenizerFast) -> datasets.Dataset:
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt, completion = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        mask = [0] * len(prompt) + [1] * len(completion)
        rows.append({"input_ids": prompt + completion, "completion_mask": mask})
    return datasets.Dataset.from_list(rows)


@torch.inference_mode()
def _is_right(model: Any, tokenizer: PreTrainedTokenizerFast, row: dict[str, str]) -> bool:
    logits = model(**tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)).logits
    return bool(tokenizer.decode(logits[0, -1].argmax()) == row["completion"])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
