"""Calling a tuned model with today's openai library, streamed.

Usage: python examples/complete_today.py ada:ft-personal-2026-11-22-10-31-07 "What a lovely day ->"
(needs OPENAI_BASE_URL and OPENAI_API_KEY, as `tunesmith serve` prints them)
"""

import sys

from openai import OpenAI

model, prompt = sys.argv[1:]
for chunk in OpenAI().completions.create(model=model, prompt=prompt, max_tokens=32, stop=["\n"], stream=True):
    print(chunk.choices[0].text, end="", flush=True)
print()
