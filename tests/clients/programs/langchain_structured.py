"""Structured answers of one soft prompt. Arguments: base URL, the fields that name it, a text."""

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    """The sentiment of a review."""

    label: Literal["positive", "negative"]


base_url, named, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
chat = ChatOpenAI(base_url=base_url, api_key="none", temperature=0, max_retries=0, **named)
results = {
    method: chat.with_structured_output(Verdict, method=method).invoke(text).label
    for method in ("json_schema", "function_calling")
}
results["tool_calls"] = chat.bind_tools([Verdict], tool_choice="Verdict").invoke(text).tool_calls
json.dump(results, sys.stdout)
