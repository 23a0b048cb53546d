"""The check at the start that a model is served exactly: paged attention against the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from server.engine.attention import AttentionBackend, SDPABackend, make_metadata
from server.errors import EngineStartError

PROBE_TOKENS = 24
"""Length of the texts that are computed in two ways; less where the context is shorter."""

PROBE_KEYS = 700
"""Length of the made-up sequence over which kernels are compared; less where the cache is smaller."""

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference between two ways to the same logits, as a share of their standard deviation."""

Forward = Callable[[Sequence[tuple[Sequence[int], int, int]], torch.Tensor, Sequence[int]], torch.Tensor]
"""Spans (block table, first position, number of positions), token ids [1, rows] and rows whose logits are wanted, to
logits [wanted rows, vocabulary]."""

Decode = Callable[[Sequence[int], Sequence[int], Sequence[Sequence[int]], int], torch.Tensor]
"""Token ids, their positions, block tables and the size of the batch, to logits [tokens, vocabulary]."""


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
        own, others_own = self._expected[0][:length], self._expected[1][:half]
        self._decodes = (
            [int(other_ids[0, -1]), int(ids[0, -1])],
            [half - 1, length - 1],
            [other, table],
            torch.stack([others_own[-1], own[-1]]),
        )
        got = torch.cat([both[:half], first, both[half:], decoded])
        self._compare(got, torch.cat([others_own, own, self._decodes[-1]]), [half, half, length - half, 2])

    def run_decodes(self, decode: Decode, sizes: Sequence[int]) -> None:
        """After ``run``: compute the last tokens once more, in batches that are filled up to each size.

        Args:
            decode: Computes decodes in another way than ``run``'s forward pass.
            sizes: Of the batches.

        Raises:
            EngineStartError: As ``run``.
        """
        token_ids, positions, tables, expected = self._decodes
        for size in sizes:
            try:
                got = decode(token_ids[:size], positions[:size], tables[:size], size)
            except Exception as error:
                raise self._refusal(error) from error
            self._compare(got, expected[:size], [len(got)])

    def _compare(self, got: torch.Tensor, expected: torch.Tensor, parts: list[int]) -> None:
        by_row = (got.float() - expected.float()).abs().amax(dim=-1)
        if self._dtype != torch.float32 and self._has_experts:
            # Rounding sends a token near the border to another expert, and its logits are other ones. Attention that
            # is wrong shows in most rows of some part.
            difference = max(part.median().item() for part in torch.split(by_row, parts))
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


def check_kernels(backend: AttentionBackend, num_heads: int) -> None:
    """Compare a backend's attention with ``SDPABackend``'s, in each way that the model's layers have called it.

    The model's own texts are too short for windows to matter and for keys to be divided among programs. So keys and
    values are made up, in the cache's last blocks, and windows are made short.

    Args:
        backend: Through which a model has run.
        num_heads: Query heads of a layer.

    Raises:
        EngineStartError: If they differ by more than rounding explains, or the backend fails.
    """
    cache = backend.cache
    spec, device = cache.spec, cache.tensor.device
    count = min(PROBE_KEYS, cache.num_blocks * spec.block_size)
    table = list(range(cache.num_blocks - 1, cache.num_blocks - 1 - -(-count // spec.block_size), -1))
    generator = torch.Generator().manual_seed(0)
    made_up = torch.randn(2, len(table), *cache.tensor.shape[3:], generator=generator)
    rows = min(40, count)
    spans = [(table, position, 1) for position in sorted({0, count // 3, count - 1})] + [(table, count - rows, rows)]
    metadata = make_metadata(spans, spec.block_size, device)
    num_rows = metadata.groups[-1].stop
    query = torch.randn(num_heads, num_rows, spec.head_dim, generator=generator).to(device, spec.dtype)
    reference = SDPABackend(cache)
    before = cache.tensor[:, 0, table]
    cache.tensor[:, 0, table] = made_up.to(cache.tensor)
    checked = set()
    try:
        for call in backend.calls.values():
            kind = (call.softcap is not None, call.sinks is not None, call.window is not None)
            if kind not in checked:
                checked.add(kind)
                short = replace(call, window=None if call.window is None else min(call.window, 37))
                expected = reference.attend(query, 0, metadata, short).float()
                difference = (backend.attend(query, 0, metadata, short).float() - expected).abs().max().item()
                allowed = PROBE_TOLERANCE[spec.dtype] * expected.std().item()
                if not difference <= allowed:
                    raise EngineStartError(
                        f"{type(backend).__name__} differs from plain attention by {difference:.3g}, more than "
                        f"rounding explains ({allowed:.3g})"
                    )
    except EngineStartError:
        raise
    except Exception as error:
        raise EngineStartError(f"{type(backend).__name__} fails ({type(error).__name__}: {error})") from error
    finally:
        reference.close()
        cache.tensor[:, 0, table] = before
