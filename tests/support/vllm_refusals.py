"""Settings and models that engine vllm refuses before it loads a model; run by vLLM's interpreter.

    python -m tests.support.vllm_refusals FOLDER

prints the outcomes as JSON. FOLDER holds the folders of four models: ``llama``, ``latent`` with latent attention,
``falcon_multi_query`` and ``falcon_grouped``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from server.config import EngineSettings
from server.engine.vllm.configuration import model_info, vllm_config_of
from server.errors import EngineStartError

SETTINGS: dict[str, dict[str, object]] = {
    "batched_tokens": {"max_num_batched_tokens": 8, "max_num_seqs": 16},
    "own_argument": {"engine_args": '{"kv_transfer_config": {}}'},
    "no_json": {"engine_args": "{"},
    "no_object": {"engine_args": "[1]"},
    "pipeline_parallel": {"pipeline_parallel_size": 2},
    "device": {"device": "cuda"},
}


def refusal(settings: EngineSettings) -> str:
    """Why settings are refused; empty if they are not."""
    try:
        vllm_config_of(settings, {})
    except EngineStartError as error:
        return error.message
    return ""


def main() -> None:
    """Print a refusal for each of SETTINGS, and a description of each model."""
    folder = Path(sys.argv[1])
    found: dict[str, object] = {
        name: refusal(EngineSettings(model=str(folder / "llama"), engine="vllm", **fields))  # type: ignore[arg-type]
        for name, fields in SETTINGS.items()
    }
    for name in ("llama", "latent", "falcon_multi_query", "falcon_grouped"):
        settings = EngineSettings(model=str(folder / name), engine="vllm", dtype="float32")
        model = model_info(settings, vllm_config_of(settings, {}), {})
        found[f"model_of_{name}"] = msgspec.to_builtins(model)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
