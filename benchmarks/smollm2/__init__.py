"""A day of a registry with a real model: SmolLM2-135M-Instruct, and news of Reuters R8."""
