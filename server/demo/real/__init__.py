"""The real model of ``prelude demo --real``: SmolLM2-135M-Instruct, and the soft prompts that were trained for it."""
