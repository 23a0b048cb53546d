"""Compare a cluster's ingress with the same replicas, asked directly.

    prelude cluster up --config cluster.yaml
    python -m benchmarks.cluster_ingress --config cluster.yaml

Clients stream completions of the base, each one after the other. The ingress chooses the replica. Directly, clients
take the replicas in turn, and sign each request as the ingress would. The two ways alternate. The last lines
are the ratio of the throughputs and the difference of the median times to first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp

from server.api.keys.secret_file import read_secret
from server.api.keys.signed_callers import INGRESS_HEADER, CallerKind, CallerSigner
from server.cluster.config import ClusterConfig, read_config
from server.cluster.replica.arguments import secrets_of

PATH = "/v1/completions"


@dataclass
class Outcome:
    """What one way gave.

    Attributes:
        tokens: Number of events with a token.
        seconds: Wall time.
        first: Seconds until the first token, of each request.
    """

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)


class Direct:
    """Asks the replicas in turn.

    Args:
        urls: Where they listen.
        signer: Signs as the ingress does.
    """

    def __init__(self, urls: list[str], signer: CallerSigner) -> None:
        self._urls = cycle(urls)
        self._signer = signer

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        for url in self._urls:
            request_id = uuid.uuid4().hex
            signed = self._signer.sign(
                CallerKind.CLUSTER, "", method="POST", target=PATH.encode(), request_id=request_id
            )
            yield url, {INGRESS_HEADER: signed, "x-request-id": request_id}


async def run_way(
    http: aiohttp.ClientSession, way: Iterator[tuple[str, Mapping[str, str]]], bodies: list[list[bytes]]
) -> Outcome:
    """Send the requests of all clients."""
    found = Outcome()

    async def client(own: list[bytes]) -> None:
        for body in own:
            url, headers = next(way)
            began = time.perf_counter()
            is_first = True
            headers = {**headers, "content-type": "application/json"}
            async with http.post(url + PATH, data=body, headers=headers) as reply:
                reply.raise_for_status()
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        if is_first:
                            found.first.append(time.perf_counter() - began)
                            is_first = False
                        found.tokens += 1

    began = time.perf_counter()
    await asyncio.gather(*map(client, bodies))
    found.seconds = time.perf_counter() - began
    return found


def make_bodies(base: str, clients: int, each: int, tokens: int, seed: int) -> list[list[bytes]]:
    """The requests of each client; no two texts begin alike."""
    rng = random.Random(seed)

    def body() -> bytes:
        prompt = f"{rng.getrandbits(64):x} " + "words of a text " * rng.randint(4, 12)
        fields = {"model": base, "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        return json.dumps(fields).encode()

    return [[body() for _ in range(each)] for _ in range(clients)]


async def replicas_of(http: aiohttp.ClientSession, door: str, key: Mapping[str, str]) -> Any:
    """The first base with its replicas, once the ingress knows one."""
    while True:
        async with http.get(f"{door}/v1/cluster", headers=key) as reply:
            reply.raise_for_status()
            base = (await reply.json())["bases"][0]
        if base["replicas"]:
            return base
        await asyncio.sleep(1)


async def compare(config: ClusterConfig, arguments: argparse.Namespace) -> None:
    """Run the ways in turn, and print what they gave."""
    door = f"http://{config.host}:{config.port}"
    signer = CallerSigner(read_secret(secrets_of(config).ingress, "ingress secret"))
    key = {} if arguments.api_key is None else {"authorization": f"Bearer {arguments.api_key}"}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        base = await replicas_of(http, door, key)
        urls = [replica["url"] for replica in base["replicas"]]
        print(f"{base['name']}: {len(urls)} replicas, {arguments.clients} clients, {arguments.rounds} rounds")
        outcomes: dict[str, list[Outcome]] = {"directly": [], "by the ingress": []}
        for number in range(arguments.rounds + 1):
            for name, found in outcomes.items():
                bodies = make_bodies(
                    base["name"],
                    arguments.clients,
                    arguments.each,
                    arguments.tokens,
                    2 * number + (name == "directly"),
                )
                way = iter(Direct(urls, signer)) if name == "directly" else cycle([(door, key)])
                outcome = await run_way(http, way, bodies)
                if number:  # the first round warms up
                    found.append(outcome)
    rates, firsts = {}, {}
    for name, found in outcomes.items():
        rates[name] = statistics.median(one.tokens / one.seconds for one in found)
        firsts[name] = statistics.median(first for one in found for first in one.first)
        print(f"{name:16} {rates[name]:9.0f} tokens/s   first token {1000 * firsts[name]:7.1f} ms at the median")
    print(f"throughput by the ingress / directly: {rates['by the ingress'] / rates['directly']:.3f}")
    print(f"first token later by: {1000 * (firsts['by the ingress'] - firsts['directly']):.1f} ms at the median")


def main() -> None:
    """Compare the two ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("cluster.yaml"))
    parser.add_argument("--api-key", help="a key with all scopes, if the cluster has keys")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=8, help="requests of each client in a round")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    asyncio.run(compare(read_config(arguments.config), arguments))


if __name__ == "__main__":
    main()
