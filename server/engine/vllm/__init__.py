"""vLLM as the second engine: the process, the KV connector, and what they share. Nothing else imports vllm."""
