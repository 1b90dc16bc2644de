"""Small tokenizers for models built from scratch: one token a byte, or byte-level BPE trained on the data.

Both are lossless on any Unicode text, speak Kimi's turn format and save with `save_pretrained` (the chat
template goes to `chat_template.jinja` beside the weights, which transformers, vLLM and lm-eval read).

The special tokens carry the names of Kimi Linear's own tokenizer. As in every chat tokenizer, their text is
read as the token wherever it stands, so a question that spells `<|im_end|>` ends the turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kimi_rl.errors import InputError
from kimi_rl.recipe import TokenizerSection

SPECIAL_TOKENS = (
    "[BOS]",
    "[EOS]",
    "[PAD]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
)

# One turn: <|im_ROLE|>ROLE<|im_middle|>TEXT<|im_end|>, no newline anywhere. `generation` marks what the model
# has to say, so that `apply_chat_template(..., return_assistant_tokens_mask=True)` gives the loss mask of
# SFT; the mark takes in <|im_end|>, or the model would never learn to stop. The role words stay ordinary
# text: as tokens of their own they would change how "user" inside a question is read.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception("unknown role '" ~ message['role'] ~ "'; use system, user or assistant") -}}
  {%- endif -%}
  {{- '<|im_' ~ message['role'] ~ '|>' ~ message['role'] ~ '<|im_middle|>' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] ~ '<|im_end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] ~ '<|im_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict]) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins."""
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)


def build_tokenizer(section: TokenizerSection, texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Tokenizer of a from-scratch model.

    `bytes`: ids 0..255 are the byte values, the special tokens follow (264 in all); `texts` is not read.
    `bpe`: the same 256 bytes plus merges learnt from `texts`, at most `section.vocab_size` tokens with the
    special ones (fewer where the texts hold too little to merge). Digits are split one by one, so every
    number is read digit by digit. Raises InputError where `vocab_size` cannot hold the bytes and the special
    tokens, or `texts` is empty.
    """
    tokenizer = _bytes() if section.kind == "bytes" else _bpe(section.vocab_size, texts)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[BOS]",
        eos_token="<|im_end|>",
        pad_token="[PAD]",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("[BOS]", "[PAD]", "<|im_end|>")],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level tokenizers (GPT-2's table), in byte order."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # printable: stand for themselves
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(0x100 + moved.index(byte)) for byte in range(256)]


def _bytes() -> Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def _bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise InputError(
            f"tokenizer.vocab_size: found {vocab_size}, a `bpe` tokenizer needs at least {least} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens); raise it or use kind: bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise InputError("tokenizer.kind: `bpe` is trained on the data, found no texts; use kind: bytes")
    return tokenizer
