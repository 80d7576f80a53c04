"""Run by the interpreter of today's openai: models, files and completions; prints what the test checks, as JSON."""

import json
import sys
from pathlib import Path

import openai

model = sys.argv[1]
client = openai.OpenAI(max_retries=0)
asked = {"model": model, "prompt": "The plot was dull.\n\n###\n\n", "max_tokens": 2, "temperature": 0}
plain = client.completions.create(**asked, logprobs=2)
streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
with Path("valid.jsonl").open("rb") as valid:
    file = client.files.create(file=valid, purpose="fine-tune")
try:
    client.models.retrieve("no-such-model")
    wrong_model = None
except openai.NotFoundError as error:
    wrong_model = [error.code, error.param, error.request_id is not None]
report = {
    "plain": plain.choices[0].text,
    "streamed": streamed,
    "completion_tokens": plain.usage.completion_tokens,
    "logprobs": len(plain.choices[0].logprobs.token_logprobs),
    "listed": model in [listed.id for listed in client.models.list()],
    "file": [file.id, file.filename, file.purpose],
    "files": [listed.id for listed in client.files.list()],
    "content": client.files.content(file.id).read() == Path("valid.jsonl").read_bytes(),
    "deleted": client.files.delete(file.id).deleted,
    "wrong_model": wrong_model,
}
print(json.dumps(report))
