"""The check at the start that a model is served exactly: paged attention against the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

import torch
from transformers import PreTrainedModel

from server.errors import EngineStartError

PROBE_TOKENS = 24
"""Length of the texts that are computed in two ways; less where the context is shorter."""

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference between two ways to the same logits, as a share of their standard deviation."""

Forward = Callable[[Sequence[tuple[Sequence[int], int, int]], torch.Tensor, Sequence[int]], torch.Tensor]
"""Spans (block table, first position, number of positions), token ids [1, rows] and rows whose logits are wanted, to
logits [wanted rows, vocabulary]."""


class ExactnessCheck:
    """What a model itself, with its eager attention, says of two texts.

    Which models work is decided by this, not by a list: some ignore the attention interface, some compute something
    else through it, and wrong tokens are worse than a refusal.

    Args:
        model: As transformers has loaded it.
        vocab_size: Token ids are below it.
        max_model_len: Positions of a sequence.
        has_experts: Whether it is a mixture of experts.

    Raises:
        EngineStartError: If the model cannot compute them.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, max_model_len: int, *, has_experts: bool) -> None:
        self._name = type(model).__name__
        self._dtype: torch.dtype = model.dtype
        self._has_experts = has_experts
        count = torch.arange(min(PROBE_TOKENS, max_model_len), device=model.device)[None]
        self._texts = (count * 7919 % vocab_size, (count + 1) * 6101 % vocab_size)
        try:
            model.set_attn_implementation("eager")
            with torch.inference_mode():
                self._expected = [
                    model(input_ids=text, position_ids=count.to(text), use_cache=False).logits[0]
                    for text in self._texts
                ]
        except Exception as error:
            raise self._refusal(error) from error

    def run(self, forward: Forward, *, num_blocks: int, block_size: int, num_layers: int, layers: Set[int]) -> None:
        """Compare with two texts side by side over paged blocks.

        One text is prefilled in two chunks, the second of them behind the other text, so that a model which attends
        over the flat batch by itself shows. Nothing is left behind, for every position of a block is written before
        it is read.

        Args:
            forward: Computes one flat batch.
            num_blocks: Of the cache, at least 2.
            block_size: Positions of each.
            num_layers: That have keys and values in the cache.
            layers: Those that have attended to it, by now.

        Raises:
            EngineStartError: If a pass fails, or its logits differ by more than rounding explains.
        """
        length = min(self._texts[0].shape[1], num_blocks // 2 * block_size)
        half, per_seq = length // 2, -(-length // block_size)
        ids, other_ids = self._texts[0][:, :length], self._texts[1][:, :half]
        table = list(range(per_seq))
        other = [block + per_seq for block in table]
        try:
            first = forward([(table, 0, half)], ids[:, :half], range(half))
            others = num_layers - len(layers)
            if others:
                raise NotImplementedError(f"{others} of its {num_layers} layers do not call it")
            spans = [(other, 0, half), (table, half, length - half)]
            both = forward(spans, torch.cat([other_ids, ids[:, half:]], dim=1), range(length))
            # The last token of each once more, as a decode: what computes single rows may be another thing.
            spans = [(other, half - 1, 1), (table, length - 1, 1)]
            decoded = forward(spans, torch.cat([other_ids[:, -1:], ids[:, -1:]], dim=1), range(2))
        except Exception as error:
            raise self._refusal(error) from error
        got = torch.cat([both[:half], first, both[half:], decoded])
        own, others_own = self._expected[0][:length], self._expected[1][:half]
        expected = torch.cat([others_own, own, others_own[-1:], own[-1:]])
        by_row = (got.float() - expected.float()).abs().amax(dim=-1)
        if self._dtype != torch.float32 and self._has_experts:
            # Rounding sends a token near the border to another expert, and its logits are other ones. Attention that
            # is wrong shows in most rows of some part.
            parts = torch.split(by_row, [half, half, length - half, 2])
            difference = max(part.median().item() for part in parts)
        else:
            difference = by_row.max().item()
        allowed = PROBE_TOLERANCE[self._dtype] * expected.float().std().item()
        if not difference <= allowed:
            raise EngineStartError(
                f"{self._name} cannot be served: over paged keys and values its logits differ from "
                f"its own by {difference:.3g}, more than rounding explains ({allowed:.3g})"
            )

    def _refusal(self, error: Exception) -> EngineStartError:
        return EngineStartError(
            f"{self._name} cannot be served: its attention does not go through transformers' attention interface as "
            f"Prelude needs it ({type(error).__name__}: {error})"
        )
