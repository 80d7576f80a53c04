#!/bin/sh
# The wire itself: upload a training file, fine-tune ada on it, follow the job, ask the tuned model.
# Usage: examples/curl.sh train.jsonl      (needs OPENAI_BASE_URL and OPENAI_API_KEY, as `tunesmith serve` prints them)
set -eu
training_file=${1:?give a JSONL file of {\"prompt\", \"completion\"} rows}
field() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }
ask() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer $OPENAI_API_KEY" "$@"; }

file=$(ask "$OPENAI_BASE_URL/files" -F purpose=fine-tune -F "file=@$training_file" | field '["id"]')
job=$(ask "$OPENAI_BASE_URL/fine-tunes" -H 'Content-Type: application/json' \
  -d "{\"training_file\": \"$file\", \"model\": \"ada\"}" | field '["id"]')
ask --no-buffer "$OPENAI_BASE_URL/fine-tunes/$job/events?stream=true"

model=$(ask "$OPENAI_BASE_URL/fine-tunes/$job" | field '["fine_tuned_model"]')
ask "$OPENAI_BASE_URL/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$model\", \"prompt\": \"What a lovely day ->\", \"max_tokens\": 1, \"temperature\": 0, \"logprobs\": 2}"
echo
