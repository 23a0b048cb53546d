"""Small tokenizers of each kind that models use, made in memory."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "the cat sat on the mat and the dog ran",
    "yes no maybe positive negative neutral",
    "Question: hello world, how are you? Answer: fine.",
    "été à la plage",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9",
]
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNKNOWN, CLS, SEP = "[UNK]", "[CLS]", "[SEP]"
END = "<|endoftext|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2, Llama 3 and Qwen: every token is a sequence of bytes, and a space is an ordinary byte."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, additional_special_tokens=["<|im_end|>"])


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Like Llama 2 and Mistral: a space before every text, removed by the decoder; unknown text as bytes."""
    core = _byte_fallback_bpe()
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(core)


def sentencepiece_bpe_without_prefix() -> PreTrainedTokenizerFast:
    """Like Gemma: the same without the space before a text."""
    core = _byte_fallback_bpe()
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_bos(core)


def unigram() -> PreTrainedTokenizerFast:
    """Like T5 and XLM-R: words in pieces; the first piece is marked by the space before it."""
    core = Core(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token=UNK, show_progress=False
    )
    core.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token=UNK)


def wordpiece() -> PreTrainedTokenizerFast:
    """Like BERT: pieces that continue a word are marked, and a space precedes all others."""
    core = Core(models.WordPiece(unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=160, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", core.token_to_id("[CLS]"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=CLS, eos_token=SEP, unk_token=UNKNOWN)


def word_ends() -> PreTrainedTokenizerFast:
    """Like CLIP and GPT: the last piece of each word is marked, and a space follows it unless the text ends."""
    core = Core(models.BPE(unk_token=UNK, end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, unk_token=UNK)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    kind.__name__: kind
    for kind in (byte_level, sentencepiece_bpe, sentencepiece_bpe_without_prefix, unigram, wordpiece, word_ends)
}


def _byte_fallback_bpe() -> Core:
    trained = Core(models.BPE(unk_token=UNK))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        [text for text in TEXTS if text.isascii()] * 4,
        trainers.BpeTrainer(vocab_size=140, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = {piece: index + len(BYTES) for piece, index in model["vocab"].items()}
    vocabulary |= {piece: index for index, piece in enumerate((UNK, BOS, EOS, *BYTES))}
    return Core(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token=UNK,
            byte_fallback=True,
            fuse_unk=True,
        )
    )


def _with_bos(core: Core) -> PreTrainedTokenizerFast:
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token=UNK)
