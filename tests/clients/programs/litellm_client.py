"""LiteLLM's Python functions for one soft prompt. Arguments: base URL, the fields that name it, texts."""

import json
import sys
from typing import Any

import litellm

base_url, named, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
address = {"api_base": base_url, "api_key": "none", "temperature": 0, "max_tokens": 40, "max_retries": 0}
address |= {key: value for key, value in named.items() if key != "model"}


def chat(text: str, **more: Any) -> Any:
    """Ask with one message."""
    messages = [{"role": "user", "content": text}]
    return litellm.completion(model=f"openai/{named['model']}", messages=messages, **address, **more)


def completion(text: str) -> Any:
    """Complete a text."""
    return litellm.text_completion(model=f"text-completion-openai/{named['model']}", prompt=text, **address)


results = {
    "chat": [chat(text).choices[0].message.content for text in texts],
    "chat_stream": [
        "".join(chunk.choices[0].delta.content or "" for chunk in chat(text, stream=True)) for text in texts
    ],
    "completions": [completion(text).choices[0].text for text in texts],
}
json.dump(results, sys.stdout)
