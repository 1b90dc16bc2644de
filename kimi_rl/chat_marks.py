"""Marks in a chat template around what the model has to say: for converted models, and for SFT of a plain transformer.

An sft stage learns what the marks (`{% generation %}`) hold; public templates rarely have them.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from kimi_rl.errors import InputError

# ChatML, as SmolLM2, Qwen2 and many others write it. The mark takes in <|im_end|>, or the model would never learn to
# stop, and leaves out the newline behind it, which nobody ever samples.
_CHATML = """\
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' and DEFAULT -%}
    {{- '<|im_start|>system\\n' ~ DEFAULT ~ '<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] ~ '<|im_end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] ~ '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_TURNS = [{"role": "user", "content": " Q1\n"}, {"role": "assistant", "content": "A1 "}]
_CONVERSATIONS = (
    _TURNS,
    _TURNS[:1],
    [{"role": "system", "content": "S"}, *_TURNS],
    [*_TURNS, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}],
)


def mark_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Put marks into the tokenizer's template, in place, where that leaves the text of every conversation as it is.

    Returns whether the template has marks now; it is left alone where none of the known forms writes the same text.
    Raises InputError where the tokenizer has no chat template at all.
    """
    if not tokenizer.chat_template:
        raise InputError("SOURCE: its tokenizer has no chat template; choose the instruction-tuned model")
    if has_generation_markers(tokenizer.chat_template):
        return True
    wanted = _written(tokenizer, tokenizer.chat_template)
    for template in (_chatml(wanted[0]), _trl(tokenizer)):
        if template is not None and _written(tokenizer, template) == wanted:
            tokenizer.chat_template = template
            return True
    return False


def _written(tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str]) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        for messages in _CONVERSATIONS
        for prompt in (False, True)
    ]


def _chatml(text: str) -> str | None:
    """The ChatML template with the default system message that `text`, a conversation without one, opens with."""
    opening = "<|im_start|>system\n"
    default = ""
    if text.startswith(opening):
        default = text.removeprefix(opening).split("<|im_end|>")[0]
    literal = "'" + default.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    return _CHATML.replace("DEFAULT", literal)


def _trl(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's own marked form of a template that it knows."""
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None
