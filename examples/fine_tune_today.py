"""Fine-tuning with today's openai library: upload, job, its events as they come, one answer.

Usage: python examples/fine_tune_today.py train.jsonl "What a lovely day ->"
(needs OPENAI_BASE_URL and OPENAI_API_KEY, as `tunesmith serve` prints them)
"""

import sys
import time
from pathlib import Path

from openai import OpenAI

path, prompt = sys.argv[1:]
client = OpenAI()
file = client.files.create(file=Path(path), purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model="ada",
    training_file=file.id,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
)
shown: set[str] = set()
while True:
    job = client.fine_tuning.jobs.retrieve(job.id)  # before the events: of a job that has ended these are all
    for event in reversed(list(client.fine_tuning.jobs.list_events(job.id))):
        if event.id not in shown:
            shown.add(event.id)
            print(event.message)
    if job.status in ("succeeded", "failed", "cancelled"):
        break
    time.sleep(1)
if job.fine_tuned_model is None:
    sys.exit(f"The job has {job.status}.")
answer = client.completions.create(model=job.fine_tuned_model, prompt=prompt, max_tokens=1, temperature=0)
print(prompt + answer.choices[0].text)
