"""openai-python's files and batches, unmodified, against a live server."""

from __future__ import annotations

import io
import json

import openai
import pytest

from tests.support.live_server import LiveServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


def test_a_batch_of_openai_python(live: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        rows = [
            {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            for number in range(5)
        ]
        data = "\n".join(map(json.dumps, rows)).encode()
        file = client.files.create(file=("rows.jsonl", io.BytesIO(data)), purpose="batch")
        assert (file.object, file.purpose, file.bytes) == ("file", "batch", len(data))
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
        )
        wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 30.0)
        batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed) == (5, 5)
        assert batch.output_file_id is not None
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert sorted(answer["custom_id"] for answer in answers) == [row["custom_id"] for row in rows]
        assert {answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers} == {
            "hello world"
        }
        assert [one.id for one in client.batches.list()] == [batch.id]
        assert client.batches.cancel(batch.id).status == "completed"
        assert {one.id for one in client.files.list()} == {file.id, batch.output_file_id}
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
