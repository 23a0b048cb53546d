"""Every way to invoke one soft prompt. Arguments: base URL, the fields that name it, texts."""

import asyncio
import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI

base_url, named, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
address = {"base_url": base_url, "api_key": "none", "temperature": 0, "max_retries": 0, **named}
chat = ChatOpenAI(**address, stream_usage=True)


def usage(message: Any) -> dict[str, int]:
    """The token counts that both an answer and the sum of its chunks have."""
    return {key: message.usage_metadata[key] for key in ("input_tokens", "output_tokens", "total_tokens")}


def streamed(text: str) -> Any:
    """The sum of a stream's chunks."""
    chunks = list(chat.stream(text))
    return sum(chunks[1:], chunks[0])


async def streamed_async(text: str) -> str:
    """The text of a stream, read asynchronously."""
    return "".join([chunk.text async for chunk in chat.astream(text)])


async def with_async() -> tuple[list[str], list[str]]:
    """The asynchronous ways; one event loop, because the model keeps its connections."""
    batch = await chat.abatch(texts)
    return [answer.text for answer in batch], await asyncio.gather(*map(streamed_async, texts))


invoked = [chat.invoke([("human", text)]) for text in texts]
streams = [streamed(text) for text in texts]
async_batch, async_stream = asyncio.run(with_async())
scored = chat.bind(logprobs=True).invoke(texts[0])
results = {
    "invoke": [answer.text for answer in invoked],
    "batch": [answer.text for answer in chat.batch(texts)],
    "async_batch": async_batch,
    "stream": [message.text for message in streams],
    "async_stream": async_stream,
    "completions": OpenAI(**address, max_tokens=40).batch(texts),
    "usage": usage(invoked[0]),
    "streamed_usage": usage(streams[0]),
    "num_logprobs": len(scored.response_metadata["logprobs"]["content"]),
}
json.dump(results, sys.stdout)
