"""Find the most expensive body of each route: time on the server's event loop, CPU and memory.

    python -m scripts.worst_bodies [--path /v1/completions] [--only "a list of numbers"] [--megabytes 7.9]

Bodies are generated from the OpenAPI document: each field of each route, including nested fields, gets the longest,
widest, deepest and most malformed values that fit the size. A server on the embedded model answers them one by one.
It measures the longest time that one task blocked its event loop, as CPU time of the loop's thread (unaffected by
other processes) and as wall time. The exit status is 1 if a body blocked the loop for longer than the limit, by CPU
time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.api.json_budget import MOST_CONTAINERS, most_values
from server.api.operations import Operations
from server.app import ROUTERS, PreludeServer, bind, create_app, freeze_loaded_objects
from server.config import EngineSettings, HttpSettings, Settings, StoreSettings
from server.demo.tour import MODEL_DIRECTORY
from tests.support.processes import free_port, server_process

OPERATIONS = Operations(route for router in ROUTERS for route in router.routes)

PROBE_SECONDS = 0.002
NESTED = frozenset(
    {
        "a long string",
        "a string of half surrogates",
        "a string that holds a JSON list",
        "a list of numbers",
        "a list of strings",
        "a list of objects with fields",
        "an object of numbers",
        "a nest of 900 objects, wide below",
    }
)
"""The values that nested fields get; the top-level fields get every value."""

MAX_DEPTH = 4
"""Maximum depth of the nested fields taken from the schema."""

BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/classify": {"input": "x", "labels": ["a", "b"]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one body.

    Attributes:
        path: The route.
        description: The field and its value.
        status: The status of the answer.
        blocked_cpu: Longest CPU time of the event loop's thread between two probes, in seconds.
        blocked_wall: Longest wall time between two probes, in seconds.
        cpu: CPU time of the whole API process, in seconds.
        memory: Peak memory growth of the API process, in bytes.
    """

    path: str
    description: str
    status: int
    blocked_cpu: float
    blocked_wall: float
    cpu: float
    memory: int


class ProbedServer(PreludeServer):
    """Writes to a shared file how long its event loop was blocked: CPU seconds, wall seconds, number of probes."""

    board: mmap.mmap

    async def main_loop(self) -> None:
        """Serve, and probe the event loop every two milliseconds."""
        probe = asyncio.create_task(self._probe())
        try:
            await super().main_loop()
        finally:
            probe.cancel()

    async def _probe(self) -> None:
        while True:
            cpu, wall = time.thread_time(), time.perf_counter()
            await asyncio.sleep(PROBE_SECONDS)
            blocked = (time.thread_time() - cpu, time.perf_counter() - wall - PROBE_SECONDS)
            *longest, num_probes = struct.unpack("ddd", self.board[:24])
            self.board[:24] = struct.pack("ddd", *map(max, blocked, longest), num_probes + 1)


def serve(board: Path, port: int, store: str) -> None:
    """Run the probed server in this process."""
    settings = Settings(
        engine=EngineSettings(model=str(MODEL_DIRECTORY), num_threads=1, kv_cache_memory=64 << 20),
        served_model_name="base",
        store=StoreSettings(location=store),
        http=HttpSettings(port=port),
        log_level="ERROR",
    )
    with board.open("r+b") as file, bind(settings.http) as bound:
        server = ProbedServer(create_app(settings), settings)
        freeze_loaded_objects()
        server.board = mmap.mmap(file.fileno(), 24)
        server.run(sockets=[bound])


def values(size: int, most: int, most_containers: int) -> Iterator[tuple[str, str]]:
    """Pairs of a description and a JSON text.

    Args:
        size: Approximate size of each text, in bytes.
        most: Maximum number of values per text, for those made by repetition.
        most_containers: Maximum number of lists and objects in them.
    """

    def repeated(item: str, opening: str = "[", closing: str = "]") -> str:
        own, containers = 1 + sum(map(item.count, ",[{")), max(1, item.count("[") + item.count("{"))
        count = min(size // (len(item) + 1), most // own, most_containers // containers)
        return opening + ",".join([item] * count) + closing

    yield "a long string", '"' + "x" * size + '"'
    yield "a string of many words", '"' + "ab, " * (size // 4) + '"'
    yield "a string of escapes", '"' + "\\u0041" * (size // 6) + '"'
    yield "a string of half surrogates", '"' + "\\ud800" * (size // 6) + '"'
    yield "a string of quotes", '"' + '\\"' * (size // 2) + '"'
    yield "a string that holds a JSON list", '"' + "[" + "[]," * (size // 3) + "1]" + '"'
    yield (
        "a string that holds a JSON object",
        '"{' + '\\"a\\":' + "[" * 60 + "1" + ",1" * (size // 2) + "]" * 60 + '}"',
    )
    yield "a list of numbers", repeated("1")
    yield "a list of floats", repeated("1.5e3")
    yield "a list of strings", repeated('""')
    yield "a list of texts", repeated('"' + "x" * 200 + '"')
    yield "a list of lists", repeated("[]")
    yield "a list of lists of numbers", repeated("[1,2,3]")
    yield "a list of objects", repeated("{}")
    yield "a list of objects with fields", repeated('{"role":1,"content":[],"type":"x","function":{}}')
    yield "a list of messages", repeated('{"role":"user","content":"x"}')
    yield "a list of bad messages", repeated('{"role":"tool","tool_calls":[{}],"content":1}')
    yield "a list of parts", repeated('{"type":"text","text":"x"}')
    call = '{"id":"a","function":{"name":"f","arguments":"{\\"a\\":[1,1,1,1,1,1,1,1]}"}}'
    yield "a list of calls", repeated(call)
    yield (
        "a list of messages with calls",
        repeated('{"role":"assistant","tool_calls":[' + ",".join([call] * 128) + "]}"),
    )
    tool = '{"type":"function","function":{"name":"f%d","parameters":{"a":[' + ",".join(["{}"] * 20_000) + "]}}}"
    yield (
        "a list of tools",
        "[" + ",".join(tool % index for index in range(min(128, size // len(tool), max(1, most // 20_000)))) + "]",
    )
    yield (
        "an object of numbers",
        "{" + ",".join(f'"{index}":1' for index in range(min(size // 11, most, 2 * most_containers))) + "}",
    )
    yield (
        "an object of objects",
        "{" + ",".join(f'"k{index}":{{}}' for index in range(min(size // 13, most_containers))) + "}",
    )
    yield "the same key again and again", repeated('"a":1', "{", "}")
    yield "a deep list", "[" * (size // 2) + "]" * (size // 2)
    yield "a nest of 900 objects, wide below", '{"a":' * 900 + repeated("1") + "}" * 900
    yield "many nests", repeated("[" * 60 + "]" * 60)
    yield "a long number", "1" * size
    yield "a long fraction", "0." + "1" * size
    yield "a long exponent", "1e" + "1" * size


def fields(document: dict[str, Any], schema: dict[str, Any], depth: int = 0) -> Iterator[tuple[str, ...]]:
    """Paths of a schema's fields; the name ``[]`` stands for the items of a list."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from fields(document, document["components"]["schemas"][name], depth)
        return
    for kind in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(kind, ()):
            yield from fields(document, part, depth)
    if depth >= MAX_DEPTH:
        return
    for name, own in schema.get("properties", {}).items():
        yield (name,)
        for inner in fields(document, own, depth + 1):
            yield (name, *inner)
    if isinstance(schema.get("items"), dict):
        for inner in fields(document, schema["items"], depth + 1):
            yield ("[]", *inner)


def bodies(document: dict[str, Any], path: str, size: int) -> Iterator[tuple[str, str]]:
    """Pairs of a description and a body, for all bodies of a route."""
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    paths = dict.fromkeys(fields(document, content["schema"]))
    known = dict(values(size, 10**9, 10**9))
    most = most_values(OPERATIONS.match("POST", path).operation)
    for description, value in values(size, most - 100, MOST_CONTAINERS - 100):
        if value != known[description]:
            known[f"{description}, as many values as are accepted"] = value
    for description, value in known.items():
        yield f"the body is {description}", value
    for found in [("unknown",), *paths]:
        base = dict(BASES[path])
        marker: Any = "@@"
        for name in reversed(found[1:]):
            marker = [marker] if name == "[]" else {**_beside(name), name: marker}
        base[found[0]] = marker
        before, _, after = json.dumps(base).partition('"@@"')
        for description, value in known.items():
            if len(found) == 1 or description.partition(", as many")[0] in NESTED:
                yield f"`{'.'.join(found)}` is {description}", before + value + after


def _beside(name: str) -> dict[str, Any]:
    """Other fields that an object needs so that the server reads the field ``name``."""
    if name in ("tool_calls", "content", "role"):
        return {"role": "assistant"}
    if name in ("json_schema", "schema"):
        return {"type": "json_schema", "name": "x"}
    if name in ("function", "arguments", "parameters"):
        return {"type": "function", "id": "x", "name": "x"}
    return {}


def measure(
    client: httpx.Client, process: psutil.Process, board: mmap.mmap, path: str, description: str, body: str
) -> Cost:
    """Send one body, and measure its cost."""
    data = body.encode()
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    before, cpu = process.memory_info().rss, sum(process.cpu_times()[:2])
    board[:24] = bytes(24)
    response = client.post(path, content=data, headers={"content-type": "application/json"})
    board[16:24] = bytes(8)
    while struct.unpack("d", board[16:24])[0] < 2:  # until a probe that began after the answer has ended
        time.sleep(PROBE_SECONDS)
    blocked_cpu, blocked_wall, _ = struct.unpack("ddd", board[:24])
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    spent = sum(process.cpu_times()[:2]) - cpu
    return Cost(path, description, response.status_code, blocked_cpu, blocked_wall, spent, max(0, peak - before))


def run(paths: list[str], size: int, seconds: float, only: list[str]) -> list[Cost]:
    """Start a server and send the bodies of each route, for at most ``seconds`` per route.

    ``size`` is in bytes. If ``only`` is not empty, a body is sent if its description contains one of the texts in it.
    """
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as folder:
        board_path = Path(folder) / "board"
        board_path.write_bytes(bytes(mmap.PAGESIZE))
        url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "scripts.worst_bodies", "--serve", str(board_path), "--port", str(port)]
        command += ["--store", f"{folder}/store"]
        with (
            server_process(command, f"{url}/ready", env={**os.environ, "OMP_NUM_THREADS": "1"}) as server,
            board_path.open("r+b") as file,
            mmap.mmap(file.fileno(), 24) as board,
            httpx.Client(base_url=url, timeout=120) as client,
        ):
            document = client.get("/openapi.json").json()
            process = psutil.Process(server.pid)
            for path in paths:
                deadline = time.monotonic() + seconds
                for description, body in bodies(document, path, size):
                    if only and not any(words in description for words in only):
                        continue
                    costs.append(measure(client, process, board, path, description, body))
                    if time.monotonic() > deadline:
                        print(f"{path}: out of time at {description}", file=sys.stderr)
                        break
    return costs


def report(costs: list[Cost], *, count: int) -> str:
    """A Markdown table of the ``count`` bodies of each route that blocked the event loop the longest."""
    lines = ["| route | body | status | loop, CPU ms | loop, wall ms | CPU ms | memory MB |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for path in dict.fromkeys(cost.path for cost in costs):
        worst = sorted((cost for cost in costs if cost.path == path), key=lambda cost: cost.blocked_cpu)[-count:]
        for cost in reversed(worst):
            numbers = (cost.blocked_cpu * 1000, cost.blocked_wall * 1000, cost.cpu * 1000, cost.memory / 1e6)
            cells = [f"`{path}`", cost.description, str(cost.status), *(f"{number:.0f}" for number in numbers)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the most expensive bodies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="append", choices=list(BASES), help="only this route")
    parser.add_argument("--megabytes", type=float, default=7.9)
    parser.add_argument("--limit-ms", type=float, default=100.0)
    parser.add_argument("--count", type=int, default=3, help="number of bodies in the table per route")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time limit per route")
    parser.add_argument(
        "--only", action="append", default=[], help="only bodies whose description contains this text"
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.port, arguments.store)
        return
    costs = run(arguments.path or list(BASES), int(arguments.megabytes * 1e6), arguments.seconds, arguments.only)
    over = [cost for cost in costs if cost.blocked_cpu * 1000 > arguments.limit_ms]
    print(report(costs, count=arguments.count))
    print(f"\n{len(costs)} bodies, {len(over)} over {arguments.limit_ms:g} ms, statuses", end=" ")
    print({status: sum(cost.status == status for cost in costs) for status in {cost.status for cost in costs}})
    raise SystemExit(1 if over else 0)


if __name__ == "__main__":
    main()
