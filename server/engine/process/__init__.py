"""The engine in a separate process, and its asyncio front."""
