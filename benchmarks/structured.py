"""Measure the cost of constraints: a batch of 64 texts, of which none, 8 or all must match a JSON schema.

    python -m benchmarks.structured

The texts have 32 to 128 tokens and 64 new tokens each. The model has the 135M shape and random weights (vocabulary
49,152); its tokenizer is trained by the benchmark. The JSON is a list of objects that does not end within 64 tokens.
The three ways alternate several times, after one warm-up that compiles the schema; the figures are medians of the
ratios per round. The benchmark also times the computation and expansion of the 64 masks of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.ways import Way, default_dtype, machine, measure, medians, ratio, timed
from benchmarks.workload import VOCABULARY, Text, build_model, make_texts
from server.config import EngineSettings
from server.engine.constraints import Constraint, ConstraintKind
from server.engine.llm_engine import LLMEngine
from server.engine.sampling.grammars import GrammarCompiler, TokenMasks, load_tokenizer
from server.engine.types import GenerateRequest, SamplingParams

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["refund", "delivery", "other"]},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}},
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": False,
    },
}
CONSTRAINT = Constraint(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(SCHEMA))


def build_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer with the model's vocabulary size on Python's standard library."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("*/*.py")
    )
    # Some test files are deliberately invalid UTF-8.
    core.train_from_iterator((path.read_text(errors="ignore") for path in sources), trainer)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def make_way(engine: LLMEngine, texts: list[Text], new_tokens: int, num_constrained: int) -> Way:
    """Run all texts in one batch; the constrained ones are spread evenly."""
    every = len(texts) // num_constrained if num_constrained else len(texts) + 1

    def run() -> int:
        for index, text in enumerate(texts):
            is_constrained = num_constrained > 0 and index % every == 0
            params = SamplingParams(
                max_tokens=new_tokens, temperature=0.0, constraint=CONSTRAINT if is_constrained else None
            )
            refused = engine.add(
                GenerateRequest(request_id=str(index), prompt_token_ids=text.token_ids, params=params)
            )
            if refused:
                raise RuntimeError(refused[0].failure)
        count = 0
        while engine.num_unfinished:
            for output in engine.step():
                if output.failure is not None:
                    raise RuntimeError(output.failure)
                count += len(output.token_ids)
        return count

    return timed(run)


def mask_seconds(model_folder: Path, rows: int, steps: int) -> float:
    """Median seconds of one step's masks, over random texts that the grammar allows."""
    compiler = GrammarCompiler(
        lambda: load_tokenizer(str(model_folder), None), vocab_size=VOCABULARY, eos_token_ids=()
    )
    compiler.matcher(CONSTRAINT)
    while not compiler.take_compiled():
        time.sleep(0.01)
    matchers = [matcher for matcher in (compiler.matcher(CONSTRAINT) for _ in range(rows)) if matcher is not None]
    masks, seconds = TokenMasks(), []
    torch.manual_seed(0)
    for _ in range(steps):
        started = time.perf_counter()
        allowed = masks.allowed(matchers, VOCABULARY, torch.device("cpu"))
        seconds.append(time.perf_counter() - started)
        tokens = torch.multinomial(allowed.float(), 1)[:, 0].tolist()
        for matcher, token in zip(matchers, tokens, strict=True):
            matcher.advance(token)
    compiler.close()
    return statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=default_dtype())
    arguments = parser.parse_args()
    texts = make_texts(arguments.requests, num_prompts=1, shortest=32, longest=128)
    counts = (0, arguments.requests // 8, arguments.requests)
    with tempfile.TemporaryDirectory() as name:
        model_folder = build_model(Path(name), layers=arguments.layers)
        build_tokenizer(model_folder)
        # With prefix caching, every round after the first would find its texts computed.
        engine = LLMEngine(
            EngineSettings(model=str(model_folder), dtype=arguments.dtype, enable_prefix_caching=False)
        )
        ways = {str(count): make_way(engine, texts, arguments.new_tokens, count) for count in counts}
        speeds = measure(ways, arguments.rounds)
        engine.close()
        masks = mask_seconds(model_folder, arguments.requests, 200)
    figures = {
        "machine": machine(),
        "dtype": arguments.dtype,
        "median_tokens_per_second": medians(speeds),
        "share_of_the_unconstrained_speed": {key: ratio(speeds, key, "0") for key in speeds if key != "0"},
        "milliseconds_of_all_masks_of_a_step": round(1000 * masks, 2),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
