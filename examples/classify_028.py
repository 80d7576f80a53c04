"""A classifier with openai==0.28.1: fine-tune on labelled rows, read the metrics, ask for class probabilities.

Usage: python examples/classify_028.py train.jsonl valid.jsonl " positive"
(needs OPENAI_API_BASE and OPENAI_API_KEY, as `tunesmith serve` prints them)
"""

import csv
import io
import math
import sys
from pathlib import Path

import openai

train, valid, positive_class = sys.argv[1:]


def upload(path):
    """The id of an uploaded training file."""
    with Path(path).open("rb") as file:
        return openai.File.create(file=file, purpose="fine-tune", user_provided_filename=path).id


job = openai.FineTune.create(
    training_file=upload(train),
    validation_file=upload(valid),
    model="ada",
    suffix="classifier",
    compute_classification_metrics=True,
    classification_positive_class=positive_class,
)
for event in openai.FineTune.stream_events(job.id):
    print(event.message)
job = openai.FineTune.retrieve(job.id)
if job.status != "succeeded":
    sys.exit(f"The job ended as {job.status}.")

results = csv.DictReader(io.StringIO(openai.File.download(job.result_files[0].id).decode()))
measured = [row for row in results if row["classification/accuracy"]]
print(f"accuracy {measured[-1]['classification/accuracy']}, AUROC {measured[-1]['classification/auroc']}")

answer = openai.Completion.create(
    model=job.fine_tuned_model, prompt="What a lovely day ->", max_tokens=1, temperature=0, logprobs=2
)
for text, logprob in answer.choices[0].logprobs.top_logprobs[0].items():
    print(f"{text!r}: {math.exp(logprob):.3f}")
