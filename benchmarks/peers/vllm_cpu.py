"""vLLM in a comparison: runs in vLLM's environment, driven over pipes by ``benchmarks.peers.vllm_process``.

    python -m benchmarks.peers.vllm_cpu MODEL DTYPE MAX_NUM_SEQS [MAX_LORAS MAX_LORA_RANK]

Replies with facts for the figures. Then performs the task in each file that standard input names, and replies with
its result (``benchmarks.peers.protocol``). A task has a ``kind``:

- ``generate``: ``new_tokens`` tokens for each of ``prompts``, with the adapters of ``adapters`` (number and folder of
  each prompt's), if given; the result is the number of tokens and the seconds;
- ``token_times``: the arguments of ``measure_token_times``; the result is the fields of ``TokenTimes``. It needs
  ``VLLM_ENABLE_V1_MULTIPROCESSING=0``: otherwise another process computes steps without waiting for calls.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")

import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from benchmarks.peers.protocol import reply_line
from benchmarks.peers.token_times import measure_token_times

MAX_MODEL_LEN = 2048


class VllmStepper:
    """vLLM's engine, stepped by the caller."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine

    def add(self, request_id: str, token_ids: list[int], max_tokens: int) -> None:
        """Add a request that ends after ``max_tokens`` tokens."""
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": token_ids}, params)

    def step(self) -> list[str]:
        """Compute one step; returns the ids of the requests that got a token."""
        return [output.request_id for output in self._engine.step() if output.outputs[0].token_ids]

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._engine.abort_request([request_id])


def generate(
    llm: Any, prompts: list[list[int]], new_tokens: int, adapters: list[tuple[int, str]] | None = None
) -> tuple[int, float]:
    """The number of new tokens and the seconds."""
    options: dict[str, Any] = {"use_tqdm": False}
    if adapters is not None:
        options["lora_request"] = [LoRARequest(f"adapter{number}", 1 + number, path) for number, path in adapters]
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    started = time.perf_counter()
    outputs = llm.generate(inputs, params, **options)
    seconds = time.perf_counter() - started
    return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


def perform(llm: Any, kind: str, **arguments: Any) -> object:
    """The result of one task."""
    if kind == "generate":
        return generate(llm, **arguments)
    if kind == "token_times":
        return dataclasses.asdict(measure_token_times(VllmStepper(llm), **arguments))
    raise ValueError(f"unknown kind of task: {kind}")


def main() -> None:
    """Perform the task of each file that standard input names."""
    model, dtype, max_num_seqs, *lora = sys.argv[1:]
    options = {}
    if lora:
        options = {"enable_lora": True, "max_loras": int(lora[0]), "max_lora_rank": int(lora[1])}
    llm = LLM(
        model=model,
        dtype=dtype,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=int(max_num_seqs),
        **options,
    )
    facts = {
        "version": vllm.__version__,
        "max_num_batched_tokens": llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens,
    }
    print(reply_line(facts), flush=True)
    for line in sys.stdin:
        print(reply_line(perform(llm, **json.loads(Path(line.strip()).read_text()))), flush=True)


if __name__ == "__main__":
    main()
