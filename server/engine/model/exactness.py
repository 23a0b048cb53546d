"""The startup check that a model is served exactly: paged attention against the model's own attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from server.engine.attention.backend import AttentionBackend, SDPABackend, make_metadata
from server.engine.attention.kv_cache import KVCache
from server.engine.model.model_shape import KeyValueShape, config_value, key_value_shape, num_embeddings
from server.errors import EngineStartError

PROBE_TOKENS = 24
"""Length of the texts, or of the context if it is shorter."""

PROBE_KEYS = 700
"""Length of the random sequence over which kernels are compared, or of the cache if it is smaller."""

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of logits due to rounding, as a fraction of their standard deviation."""

SOFT_PROMPT_ROWS, TEXT_ROWS = 5, 8
"""Virtual tokens and text tokens of the checked soft prompts; fewer if the context is shorter."""

Span = tuple[Sequence[int], int, int]
"""Block table, first position, number of positions."""

Forward = Callable[[Sequence[Span], dict[str, torch.Tensor], Sequence[int]], torch.Tensor]
"""Spans, token ids [1, rows] or embeddings [1, rows, width] by the name of the model's parameter, and the selected
rows, to the logits [selected rows, vocabulary]."""

Decode = Callable[[Sequence[int], Sequence[int], Sequence[Sequence[int]], int], torch.Tensor]
"""Token ids, their positions, block tables and the size of the batch, to the logits [tokens, vocabulary]."""


class ExactnessCheck:
    """Compares served logits with the model's own, for a few texts with and without soft prompts.

    The constructor computes the references with the model's eager attention. This check decides which models are
    served, not a list: some models ignore the attention interface, some compute something else through it, some look
    up more by token id than embeddings. A refusal is better than wrong tokens.

    Args:
        model: As loaded by transformers; its attention is set to "eager".
        config: The configuration of its text model.
        max_model_len: Positions of a sequence.
        has_experts: Whether it is a mixture of experts.

    Attributes:
        vocab_size: Number of token ids with an embedding and a logit.
        shape: The shape of its keys and values.

    Raises:
        EngineStartError: If the model cannot compute the references, or cannot be served.
    """

    def __init__(
        self, model: PreTrainedModel, config: PreTrainedConfig, max_model_len: int, *, has_experts: bool
    ) -> None:
        self._name = type(model).__name__
        self._dtype: torch.dtype = model.dtype
        self._has_experts = has_experts
        embed: torch.nn.Module = model.get_input_embeddings()
        rows = num_embeddings(embed, config)
        count = torch.arange(min(PROBE_TOKENS, max_model_len), device=model.device)[None]
        self._texts = (count * 7919 % rows, (count + 1) * 6101 % rows)
        try:
            model.set_attn_implementation("eager")
            with torch.inference_mode():
                first, second = (
                    model(input_ids=text, position_ids=count.to(text), use_cache=True) for text in self._texts
                )
        except Exception as error:
            raise EngineStartError(
                f"{self._name} cannot be served: its forward pass fails ({type(error).__name__}: {error})"
            ) from error
        self._expected = [first.logits[0], second.logits[0]]
        width = first.logits.shape[-1]
        if width > rows:
            raise EngineStartError(
                f"{self._name} cannot be served: it chooses among {width} tokens and has embeddings for {rows}: some "
                "that it chooses it could not read"
            )
        self.vocab_size = width
        self.shape: KeyValueShape = key_value_shape(
            self._name, getattr(first, "past_key_values", None), config_value(config, "num_hidden_layers")
        )
        with torch.inference_mode():
            self._try_soft_prompts(model, embed, max_model_len)

    def _try_soft_prompts(self, model: PreTrainedModel, embed: torch.nn.Module, max_model_len: int) -> None:
        """Compute the references of a text behind a soft prompt of each kind."""
        self._num_virtual = max(1, min(SOFT_PROMPT_ROWS, max_model_len // 4))
        num_text = min(TEXT_ROWS, max_model_len - self._num_virtual)
        if num_text < 1:  # no soft prompt fits
            self._num_virtual = 0
            return
        n, shape, text = self._num_virtual, self.shape, self._texts[0][:, :num_text]
        positions = torch.arange(n + num_text, device=text.device)[None]
        try:  # inputs are copies, because some models scale them in place
            logits = model(inputs_embeds=embed(text), position_ids=positions[:, :num_text], use_cache=False).logits[0]
        except Exception as error:
            raise EngineStartError(
                f"{self._name} cannot be served: it takes no embeddings in the place of token ids, as soft prompts "
                f"need ({type(error).__name__}: {error})"
            ) from error
        self._compare(
            logits,
            self._expected[0][:num_text],
            [num_text],
            "its logits of embeddings differ from those of the same tokens' ids. It looks something up by id besides "
            "the embeddings, and a soft prompt's rows have no ids. They differ",
        )
        # Midpoints of two tokens' embeddings: of the usual size, but not in the vocabulary.
        ids = torch.arange(1, n + 1, device=text.device)[None] * 131 % self.vocab_size
        rows = (embed(ids) + embed((ids + 7) % self.vocab_size)) / 2
        self._embeds = torch.cat([rows, embed(text)], dim=1)
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(2, shape.num_layers, n, shape.num_kv_heads, shape.head_dim, generator=generator)
        # In PEFT's order: for each token K0 V0 K1 V1 ...
        self._key_values = random.permute(2, 1, 0, 3, 4).reshape(n, -1).to(self._dtype)
        keys_and_values = random.to(text.device, self._dtype).transpose(2, 3)[:, :, None]
        try:
            cache = DynamicCache()
            for layer in range(shape.num_layers):
                cache.update(keys_and_values[0, layer], keys_and_values[1, layer], layer)
            behind_embeddings = model(inputs_embeds=self._embeds.clone(), position_ids=positions, use_cache=False)
            behind_key_values = model(
                input_ids=text, position_ids=positions[:, n:], past_key_values=cache, use_cache=True
            )
        except Exception as error:
            raise EngineStartError(
                f"{self._name} cannot be served: it takes no soft prompt ({type(error).__name__}: {error})"
            ) from error
        self._behind = behind_embeddings.logits[0], behind_key_values.logits[0]

    def run(self, forward: Forward, *, num_blocks: int, block_size: int, layers: Set[int]) -> None:
        """Compare the logits of two texts over paged blocks.

        One text is prefilled in two chunks. The second chunk stands behind the other text in the batch, which reveals
        a model that attends over the whole flat batch. The blocks need no reset, because each position is written
        before it is read.

        Args:
            forward: Computes one flat batch.
            num_blocks: Blocks of the cache, at least 2.
            block_size: Positions in a block.
            layers: The layers that have called the backend; updated by ``forward``.

        Raises:
            EngineStartError: If a pass fails, or its logits differ by more than rounding explains.
        """
        length = min(self._texts[0].shape[1], num_blocks // 2 * block_size)
        half, per_seq = length // 2, -(-length // block_size)
        ids, other_ids = self._texts[0][:, :length], self._texts[1][:, :half]
        table = list(range(per_seq))
        other = [block + per_seq for block in table]
        try:
            first = forward([(table, 0, half)], {"input_ids": ids[:, :half]}, range(half))
            others = self.shape.num_layers - len(layers)
            if others:
                raise NotImplementedError(f"{others} of its {self.shape.num_layers} layers do not call it")
            spans = [(other, 0, half), (table, half, length - half)]
            both = forward(spans, {"input_ids": torch.cat([other_ids, ids[:, half:]], dim=1)}, range(length))
            # The last tokens again as decodes, for which another kernel may serve.
            spans = [(other, half - 1, 1), (table, length - 1, 1)]
            decoded = forward(spans, {"input_ids": torch.cat([other_ids[:, -1:], ids[:, -1:]], dim=1)}, range(2))
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

    def run_soft_prompts(self, forward: Forward, cache: KVCache) -> None:
        """Compare a bare text, a text behind embeddings and a text behind keys and values, in one flat batch.

        The embeddings are computed in the same pass as the text behind them. The blocks' content is restored.

        Args:
            forward: Computes one flat batch.
            cache: The cache; the spare block is used too.

        Raises:
            EngineStartError: As ``run``.
        """
        n, size = self._num_virtual, cache.spec.block_size
        length = min(self._embeds.shape[1] if n else 0, (cache.num_blocks + 1) // 3 * size)
        if length <= n:
            return  # the context or the cache is too small
        num_text, per_seq = length - n, -(-length // size)
        blocks = list(range(3 * per_seq))
        bare, behind_rows, behind_keys = (blocks[i * per_seq : (i + 1) * per_seq] for i in range(3))
        text = self._embeds[:, n:length]
        before = cache.tensor[:, :, blocks]
        try:
            cache.fill(behind_keys, self._key_values)
            got = forward(
                [(bare, 0, num_text), (behind_rows, 0, n), (behind_rows, n, num_text), (behind_keys, n, num_text)],
                {"inputs_embeds": torch.cat([text, self._embeds[:, :length], text], dim=1)},
                range(2 * num_text + length),
            )
        except Exception as error:
            raise self._refusal(error) from error
        finally:
            cache.tensor[:, :, blocks] = before
        of_rows, of_keys = self._behind
        for part, expected, what in (
            (got[:num_text], self._expected[0][:num_text], "a bare text's logits beside soft prompts"),
            (got[num_text : num_text + length], of_rows[:length], "logits behind a soft prompt of embeddings"),
            (got[num_text + length :], of_keys[:num_text], "logits behind a soft prompt of keys and values"),
        ):
            self._compare(part, expected, [len(part)], f"over paged keys and values {what} differ from its own")

    def run_decodes(self, decode: Decode, sizes: Sequence[int]) -> None:
        """Compute the last tokens of ``run`` again, in batches padded to each size.

        Args:
            decode: Computes decodes, in another way than ``run``'s forward pass.
            sizes: Sizes of the batches.

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

    def _compare(
        self,
        got: torch.Tensor,
        expected: torch.Tensor,
        parts: list[int],
        what: str = "over paged keys and values its logits differ from its own",
    ) -> None:
        by_row = (got.float() - expected.float()).abs().amax(dim=-1)
        allowed = PROBE_TOLERANCE[self._dtype] * expected.float().std().item()
        if self._dtype != torch.float32 and self._has_experts:
            # Rounding may send a token to another expert. That changes its logits, and to some degree those of the
            # rows that see it. Wrong attention changes nearly all rows of a part, and changes them more.
            allowed *= 2.0
            difference = max(part.quantile(0.25).item() for part in torch.split(by_row, parts))
        else:
            difference = by_row.max().item()
        if not difference <= allowed:
            raise EngineStartError(
                f"{self._name} cannot be served: {what} by {difference:.3g}, more than rounding explains "
                f"({allowed:.3g})"
            )

    def _refusal(self, error: Exception) -> EngineStartError:
        return EngineStartError(
            f"{self._name} cannot be served: its attention does not go through transformers' attention interface as "
            f"Prelude needs it ({type(error).__name__}: {error})"
        )


def probe_blocks(block_size: int) -> int:
    """Blocks of the smallest cache in which no check is shortened."""
    in_blocks = (2 * -(-PROBE_TOKENS // block_size), 3 * -(-(SOFT_PROMPT_ROWS + TEXT_ROWS) // block_size))
    return max(*in_blocks, -(-PROBE_KEYS // block_size))


def check_kernels(backend: AttentionBackend, num_heads: int) -> None:
    """Compare a backend's attention with ``SDPABackend``'s, for each kind of call by the model's layers.

    The texts of ``ExactnessCheck`` are too short for windows to matter and for keys to be divided among programs. So
    random keys and values are written into the cache's last blocks, and windows are shortened.

    Args:
        backend: The backend; the model has run through it.
        num_heads: Query heads of a layer.

    Raises:
        EngineStartError: If they differ by more than rounding explains, or the backend fails.
    """
    cache = backend.cache
    spec, device = cache.spec, cache.tensor.device
    count = min(PROBE_KEYS, cache.num_blocks * spec.block_size)
    table = list(range(cache.num_blocks - 1, cache.num_blocks - 1 - -(-count // spec.block_size), -1))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, len(table), *cache.tensor.shape[3:], generator=generator)
    rows = min(40, count)
    spans = [(table, position, 1) for position in sorted({0, count // 3, count - 1})] + [(table, count - rows, rows)]
    # Decodes alone, too: other launches may compute them.
    batches = [make_metadata(part, spec.block_size, device) for part in (spans, spans[:-1])]
    num_rows = batches[0].groups[-1].stop
    query = torch.randn(num_heads, num_rows, spec.head_dim, generator=generator).to(device, spec.dtype)
    reference = SDPABackend(cache)
    before = cache.tensor[:, 0, table]
    cache.tensor[:, 0, table] = random.to(cache.tensor)
    checked = set()
    try:
        for call in backend.calls.values():
            kind = (call.softcap is not None, call.sinks is not None, call.window is not None)
            if kind not in checked:
                checked.add(kind)
                short = replace(call, window=None if call.window is None else min(call.window, 37))
                for metadata in batches:
                    own = query[:, : metadata.groups[-1].stop]
                    expected = reference.attend(own, 0, metadata, short).float()
                    difference = (backend.attend(own, 0, metadata, short).float() - expected).abs().max().item()
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
        cache.tensor[:, 0, table] = before
