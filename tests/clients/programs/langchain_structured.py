"""Structured answers of one soft prompt. Arguments: base URL, the fields that name it, a text."""

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    """What a review says."""

    label: Literal["positive", "negative"]


base_url, named, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
chat = ChatOpenAI(base_url=base_url, api_key="none", temperature=0, max_retries=0, **named)
told = {
    method: chat.with_structured_output(Verdict, method=method).invoke(text).label
    for method in ("json_schema", "function_calling")
}
told["tool_calls"] = chat.bind_tools([Verdict], tool_choice="Verdict").invoke(text).tool_calls
json.dump(told, sys.stdout)
