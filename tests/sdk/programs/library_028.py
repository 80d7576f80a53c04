"""Run by openai==0.28.1's interpreter: the whole flow as a library; prints what the test checks, as JSON."""

import json
from pathlib import Path

import openai

PROMPT = "The plot was dull.\n\n###\n\n"


def failure(call=openai.Completion.create, *named, **request):
    try:
        call(*named, **request)
    except openai.error.OpenAIError as error:
        return [type(error).__name__, error.http_status, error.json_body["error"]["code"]]
    return None


with Path("train.jsonl").open("rb") as train, Path("valid.jsonl").open("rb") as valid:
    training = openai.File.create(file=train, purpose="fine-tune", user_provided_filename="train.jsonl")
    validation = openai.File.create(file=valid, purpose="fine-tune", user_provided_filename="valid.jsonl")
job = openai.FineTune.create(
    training_file=training.id,
    validation_file=validation.id,
    model="ada",
    suffix="Custom model  name",
    n_epochs=1,
    batch_size=8,
    compute_classification_metrics=True,
    classification_positive_class=" positive",
)
messages = [event["message"] for event in openai.FineTune.stream_events(job.id)]
assert messages[-1] == "Fine-tune succeeded", messages
job = openai.FineTune.retrieve(job.id)
content = openai.File.download(job.result_files[0].id).decode()

asked = {"model": job.fine_tuned_model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
plain = openai.Completion.create(**asked, logprobs=2).choices[0]
streamed = "".join(chunk.choices[0].text for chunk in openai.Completion.create(**asked, stream=True))

engine = openai.Engine.modify("ada", replicas=1)
written = {"context": PROMPT, "length": 3, "temperature": 0}
generated = engine.generate(**written, logprobs=1)["data"][0]
generate_streamed = "".join(
    text for part in engine.generate(**written, stream=True) for text in part["data"][0]["text"]
)
echoed = openai.Completion.create(
    engine="ada", prompt=PROMPT, max_tokens=3, temperature=0, echo=True, logprobs=1
).choices[0]

report = {
    "engine": [engine.id, engine.ready, engine.ready_replicas],
    "generated": "".join(generated["text"]),
    "generated_offsets": generated["text_offset"],
    "generate_streamed": generate_streamed,
    "echoed": echoed.text,
    "echoed_offsets": echoed.logprobs.text_offset,
    "no_replicas": failure(openai.Engine.modify, "ada", replicas=0),
    "model": job.fine_tuned_model,
    "plain": plain.text,
    "streamed": streamed,
    "text_offset": plain.logprobs.text_offset,
    "tops": len(plain.logprobs.top_logprobs[0]),
    "rows": len(content.strip().splitlines()),
    "wrong_key": failure(model="ada", prompt="x", api_key="sk-" + "0" * 48),
    "wrong_model": failure(model="no-such-model", prompt="x"),
    "too_long": failure(model="ada", prompt="x", max_tokens=5000),
}
openai.Model.delete(job.fine_tuned_model)
print(json.dumps(report))
