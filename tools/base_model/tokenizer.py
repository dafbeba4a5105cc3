"""The byte-level tokenizer of the shipped base model, in the file format of `tokenizers`.

Token ids 0 to 255 are the bytes of the UTF-8 text; three special tokens follow. Any text survives
encoding and decoding unchanged, and none gets a token that was not asked for.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = range(256, 259)
VOCABULARY_SIZE = 259


def byte_characters() -> list[str]:
    """The printable character that stands for each byte, by the table of OpenAI's GPT-2 encoder.

    Printable Latin-1 characters stand for their own byte; the other bytes take the characters
    from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def build() -> Tokenizer:
    """A tokenizer whose ids are bytes: byte-level BPE without one merge."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIALS])
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    return tokenizer


def write(directory: Path, *, longest: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; ``longest`` is the model's limit."""
    build().save(str(directory / "tokenizer.json"))
    bos, eos, pad = SPECIALS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
