"""Structured answers of one soft prompt. Arguments: base URL, the fields that name it, a text."""

import json
import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    """The sentiment of a review."""

    label: Literal["positive", "negative"]


base_url, named, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
results = {}
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(OpenAI(base_url=base_url, api_key="none", max_retries=0), mode=mode)
    ask = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_retries": 0, **named}
    results[mode.value] = client.chat.completions.create(response_model=Verdict, **ask).label
    *_, last = client.chat.completions.create_partial(response_model=Verdict, **ask)
    results[f"{mode.value} streamed"] = last.label
json.dump(results, sys.stdout)
