"""Marks in chat templates: the text stays, the assistant's part is marked."""

import pytest

from kimi_rl.chat_marks import mark_chat_template
from kimi_rl.errors import InputError
from kimi_rl.recipe import TokenizerSection
from kimi_rl.tokenizer import build_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": " It is 2. "},
    {"role": "user", "content": "And 1+2?"},
    {"role": "assistant", "content": "3"},
]


def tokenizer_with(template):
    tokenizer = build_tokenizer(TokenizerSection(kind="bytes"))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template", [SMOLLM2, SMOLLM2.replace("You are a", "It\\'s \"a\""), SMOLLM2.replace("loop.first and", "false and")]
)
def test_chatml_gets_marks_and_keeps_its_text(template):
    plain, marked = tokenizer_with(template), tokenizer_with(template)
    assert mark_chat_template(marked)
    for messages in (CONVERSATION, [{"role": "system", "content": "Be brief."}, *CONVERSATION]):
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for tokenizer in (marked, plain)]
        assert texts[0] == texts[1]
    found = marked.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    said = [i for i, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert marked.decode(said) == " It is 2. <|im_end|>3<|im_end|>"


def test_marked_and_unknown_templates_are_left_alone():
    tokenizer = build_tokenizer(TokenizerSection(kind="bytes"))
    before = tokenizer.chat_template
    assert mark_chat_template(tokenizer)
    assert tokenizer.chat_template == before
    odd = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    tokenizer = tokenizer_with(odd)
    assert not mark_chat_template(tokenizer)
    assert tokenizer.chat_template == odd


def test_a_tokenizer_without_template_is_refused():
    with pytest.raises(InputError, match="no chat template"):
        mark_chat_template(tokenizer_with(None))
