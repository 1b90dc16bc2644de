"""The from-scratch tokenizers: lossless, Kimi's turn format, SFT mask, saved and loaded the same."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kimi_rl.errors import InputError
from kimi_rl.recipe import TokenizerSection
from kimi_rl.tokenizer import SPECIAL_TOKENS, build_tokenizer

TEXTS = [
    "Natalia sold 48/2 = 24 clips in May.",
    "She has 12,345 clips altogether; the user has none. #### 72",
] * 20
AWKWARD = [
    "",
    " leading and trailing  ",
    "tabs\tand\r\nnew\n\nlines\n",
    "naïve café, 東京, 🤖👩‍👩‍👧, \u0301 combining, ａ１ wide, ١٢٣",
    "nul \x00 and control \x1f\x7f\x80\xad",
    "it 's . , ! don 't [unk] </s>",
    "\U0010ffff\ufeff\u200b",
    "12345678901234567890 user assistant system",
]
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": " #### 2\n"},
]
RENDERED = (
    "<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>1+1=?<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|> #### 2\n<|im_end|>"
)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return build_tokenizer(TokenizerSection(kind=request.param, vocab_size=320), TEXTS)


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_bytes_ids_are_byte_values():
    tokenizer = build_tokenizer(TokenizerSection(kind="bytes"))
    for text in AWKWARD:
        assert tokenizer.encode(text) == list(text.encode())
    assert len(tokenizer) == 256 + len(SPECIAL_TOKENS)


def test_bpe_merges_words_but_no_digits():
    trained = build_tokenizer(TokenizerSection(kind="bpe", vocab_size=320), TEXTS)
    assert len(trained) <= 320
    assert len(trained.encode("clips")) < len("clips")
    assert len(trained.encode("2024")) == 4
    merged_digits = [t for t in trained.get_vocab() if sum(c.isdigit() for c in t) > 1]
    assert merged_digits == []


def test_special_tokens(tokenizer):
    assert (
        tokenizer.eos_token == "<|im_end|>"
        and tokenizer.pad_token == "[PAD]"
        and tokenizer.bos_token == "[BOS]"
    )
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == ""
    assert sorted(tokenizer.all_special_tokens) == sorted(SPECIAL_TOKENS)


def test_turn_format(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert RENDERED.startswith(prompt) and prompt.endswith("<|im_assistant|>assistant<|im_middle|>")
    with pytest.raises(Exception, match="unknown role 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_generation_mask_is_the_answer_and_its_end(tokenizer):
    chat = CHAT + [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "4"}]
    out = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    learnt = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(learnt) == " #### 2\n<|im_end|>4<|im_end|>"


def test_saved_and_loaded_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_linear"}))
    assert (tmp_path / "chat_template.jinja").is_file()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.pad_token_id == tokenizer.pad_token_id
    assert loaded.padding_side == "left"
    assert loaded.apply_chat_template(CHAT, tokenize=False) == RENDERED
    for text in AWKWARD:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_bad_sizes():
    with pytest.raises(InputError, match="vocab_size: found 263, .* at least 264"):
        build_tokenizer(TokenizerSection(kind="bpe", vocab_size=263), TEXTS)
    with pytest.raises(InputError, match="found no texts"):
        build_tokenizer(TokenizerSection(kind="bpe"), [])
