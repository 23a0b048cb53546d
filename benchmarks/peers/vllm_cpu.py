"""vLLM in a comparison: runs in vLLM's environment, driven over pipes by ``benchmarks.ways.vllm_way``.

    python vllm_cpu.py MODEL DTYPE WORK.json

Prints ``peer: ready``. Then, for each line of standard input, runs the work once and prints ``peer: TOKENS SECONDS``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="2")

from vllm import LLM, SamplingParams


def main() -> None:
    """Run the work for each line of standard input."""
    model, dtype, work = sys.argv[1:]
    task = json.loads(Path(work).read_text())
    llm = LLM(
        model=model,
        dtype=dtype,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=len(task["prompts"]),
    )
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    params = SamplingParams(max_tokens=task["new_tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
    print("peer: ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        print(f"peer: {sum(len(output.outputs[0].token_ids) for output in outputs)} {seconds}", flush=True)


if __name__ == "__main__":
    main()
