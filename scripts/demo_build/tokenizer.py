"""The demo's tokenizer: byte-level BPE; digits and line ends are single tokens."""

from __future__ import annotations

import itertools
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scripts.demo_build.corpus import documents

VOCABULARY = 2048
DOCUMENTS = 20_000
EOS, PAD = "<|endoftext|>", "<|pad|>"

# The model was not trained on turns, so the template only joins the messages' texts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def train_tokenizer(seed: int, excluded: frozenset[str], max_length: int) -> PreTrainedTokenizerFast:
    """Train on the beginning of the corpus; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    # The model copies numbers more easily if each digit is a token. A line end is always a separate token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|[0-9]| ?[A-Za-z]+|[^A-Za-z0-9\n ]| +"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in itertools.islice(documents(seed, excluded), DOCUMENTS))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files for ``AutoTokenizer.from_pretrained``."""
    tokenizer.save_pretrained(folder)
