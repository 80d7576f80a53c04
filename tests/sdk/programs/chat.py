"""Run by the interpreter of today's openai: chat, plain and streamed, in turn and at once; prints what is checked."""

import asyncio
import json
import sys

import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk

model = sys.argv[1]
client = openai.OpenAI(max_retries=0)
asked = {
    "model": model,
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The plot was dull."}],
    "max_completion_tokens": 12,
    "seed": 5,
    "logprobs": True,
    "top_logprobs": 3,
}
shapes = []
plain = client.chat.completions.create(**asked, n=2)
ChatCompletion.model_validate(plain.model_dump(), strict=False)
again = client.chat.completions.create(**(asked | {"messages": [*asked["messages"], plain.choices[0].message]}))

streamed = [""] * 2
finished = {}
usage = None
for chunk in client.chat.completions.create(**asked, n=2, stream=True, stream_options={"include_usage": True}):
    ChatCompletionChunk.model_validate(chunk.model_dump())
    usage = chunk.usage
    for choice in chunk.choices:
        streamed[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            finished[choice.index] = choice.finish_reason

with client.chat.completions.stream(**asked) as stream:  # the client's own reader of streams
    for _ in stream:
        pass
    helped = stream.current_completion_snapshot


async def at_once() -> list[str]:
    async with openai.AsyncOpenAI(max_retries=0) as many:
        answers = [many.chat.completions.create(**asked) for _ in range(8)]
        texts = [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]
        pieces = [
            piece.choices[0].delta.content or ""
            async for piece in await many.chat.completions.create(**asked, stream=True)
        ]
        return [*texts, "".join(pieces)]


def refusal(**fields: object) -> list[object]:
    try:
        client.chat.completions.create(**(asked | fields))
    except openai.APIStatusError as error:
        return [error.status_code, error.param, error.code]
    return []


report = {
    "plain": [choice.message.content for choice in plain.choices],
    "finished": [choice.finish_reason for choice in plain.choices],
    "roles": [choice.message.role for choice in plain.choices],
    "logprobs": [len(row.top_logprobs) for row in plain.choices[0].logprobs.content],
    "bytes": bytes(byte for row in plain.choices[0].logprobs.content for byte in row.bytes).decode(errors="replace"),
    "head": [plain.object, plain.id[:9], plain.model, plain.system_fingerprint[:3], plain.usage.completion_tokens],
    "turn": [again.choices[0].message.role, again.usage.prompt_tokens > plain.usage.prompt_tokens],
    "streamed": streamed,
    "stream_finished": [finished[index] for index in range(2)],
    "stream_usage": usage == plain.usage,
    "helped": helped.choices[0].message.content,
    "at_once": asyncio.run(at_once()),
    "tools": refusal(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    "schema": refusal(response_format={"type": "json_object"}),
    "wrong_model": refusal(model="no-such-model"),
    "too_long": refusal(max_completion_tokens=5000),
}
print(json.dumps(report))
