"""The text of one choice: which tokens are shown, their offsets, and where the text ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from server.api.generation.bodies import GenerationBody
from server.api.inference.logprobs import ScoredToken, TokenScorer
from server.api.services import Tokenizer
from server.engine.detokenizer import IncrementalDetokenizer, decided_length
from server.engine.types import Logprobs


class AnswerText:
    """Decodes one choice, with its prompt if the request echoes it.

    Args:
        tokenizer: The base model's tokenizer.
        body: The request's fields.
        prompt: The text tokens that the choice continues.

    Attributes:
        detokenizer: Takes the new tokens, without a final stop token that the text does not include.
        scorer: Takes all new tokens with their logprobs, after the tokens of an echoed prompt.
    """

    def __init__(self, tokenizer: Tokenizer, body: GenerationBody, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._hidden = _hidden_tokens(tokenizer, body)
        self.detokenizer = IncrementalDetokenizer(
            self._decode,
            stop=body.stop,
            include_stop_str=body.include_stop_str_in_output,
            prompt_ids=prompt,
            repeats_prompt=body.echoes,
            hidden=self._hidden,
        )
        self.scorer = TokenScorer(self._decode, tokenizer.token_bytes, () if body.echoes else prompt)

    async def echo(self, logprobs: Sequence[Logprobs | None] | None) -> tuple[str, list[ScoredToken]]:
        """The prompt as text, and its tokens with ``logprobs`` if given; in a thread, because it may be long.

        The text ends before an incomplete character at its end, which the new text begins with.
        """

        def work() -> tuple[str, list[ScoredToken]]:
            text = self._decode(self._prompt)
            scored = [] if logprobs is None else self.scorer.append(self._prompt, logprobs)
            return text[: decided_length(text)], scored

        return await asyncio.to_thread(work)

    def _decode(self, token_ids: Sequence[int]) -> str:
        shown = [token_id for token_id in token_ids if token_id not in self._hidden]
        return self._tokenizer.decode(shown, skip_special_tokens=False)


def _hidden_tokens(tokenizer: Tokenizer, body: GenerationBody) -> Mapping[int, str]:
    """The special tokens that the text omits."""
    if not body.skip_special_tokens:
        return {}
    special, shown = tokenizer.special_tokens, body.shown_special_tokens
    return {token_id: text for token_id, text in special.items() if text not in shown} if shown else special
