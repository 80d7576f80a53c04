"""Run by the interpreter of today's openai: fine-tuning jobs from upload to answer; prints what the test checks."""

import json
import time
from pathlib import Path

import openai

client = openai.OpenAI(max_retries=0)
jobs = client.fine_tuning.jobs
train, valid = [client.files.create(file=Path(name), purpose="fine-tune").id for name in ("train.jsonl", "valid.jsonl")]
method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}
asked = {"model": "ada", "training_file": train, "method": method}
job = jobs.create(**asked, validation_file=valid, suffix="today", metadata={"team": "blue"})
report = {"created": [job.object, job.id[:6], job.model, job.metadata, job.error]}
report["n_epochs"] = [job.hyperparameters.n_epochs, job.method.supervised.hyperparameters.n_epochs]
statuses = [job.status]
while statuses[-1] not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.2)
    statuses.append(jobs.retrieve(job.id).status)
job = jobs.retrieve(job.id)
events = list(jobs.list_events(job.id, limit=7))
steps = [event for event in events if event.type == "metrics"]
checkpoints = list(jobs.checkpoints.list(job.id))
results = client.files.content(job.result_files[0]).text
long = client.files.create(file=Path("long.jsonl"), purpose="fine-tune").id
try:
    jobs.create(**asked | {"method": {"type": "dpo"}})
    wrong_method = None
except openai.BadRequestError as error:
    wrong_method = [error.status_code, error.param]
report |= {
    "statuses": statuses,
    "found": len([one for one in jobs.list(metadata={"team": "blue"}) if one.id == job.id]),
    "events": [event.message for event in events],
    "steps": len(steps),
    "losses": len([event for event in steps if event.data["training_loss"] > 0]),
    "checkpoints": [
        [
            one.step_number,
            one.metrics.full_valid_loss > 0 and one.fine_tuned_model_checkpoint.endswith(f"-{one.step_number}"),
        ]
        for one in checkpoints
    ],
    "trained_tokens": job.trained_tokens,
    "results": results.startswith("step,"),
    "answer": client.completions.create(model=job.fine_tuned_model, prompt="Dull.", max_tokens=2).choices[0].text,
    "cancelled": jobs.cancel(jobs.create(model="ada", training_file=long).id).status,
    "wrong_method": wrong_method,
}
print(json.dumps(report))
