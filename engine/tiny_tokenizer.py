"""The tokenizer of the tiny test model: byte-level BPE trained on Python's own documentation.

Boundary: this module knows text, token ids and the chat template. It knows nothing of weights
(``engine.tiny_model`` asks it for a trained tokenizer and for the kinds of tokens in it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 2048
MAX_LENGTH_TOKENS = 8192

PAD_TOKEN = "<|endoftext|>"
TURN_START_TOKEN = "<|im_start|>"
EOS_TOKEN = "<|im_end|>"
# The order gives the ids 0, 1 and 2: the trainer puts special tokens first.
SPECIAL_TOKENS = (PAD_TOKEN, TURN_START_TOKEN, EOS_TOKEN)
PAD_ID, TURN_START_ID, EOS_ID = range(len(SPECIAL_TOKENS))

_REPLACEMENT_LINES = 2000
_CORPUS_CAP_CHARS = 800_000

# ChatML, with tools in the Hermes form that serving engines' "hermes" tool parser reads back. All
# line breaks of the output are in expressions, since renderers differ in what they trim.
CHAT_TEMPLATE = r"""
{%- set begins_with_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' -}}
  {%- if begins_with_system -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}
  {{- '# Tools\n\nYou may call one or more functions. Their signatures are within ' -}}
  {{- '<tools></tools>:\n<tools>\n' -}}
  {%- for tool in tools -%}{{- (tool | tojson) + '\n' -}}{%- endfor -%}
  {{- '</tools>\n\nFor each call return a JSON object within <tool_call></tool_call>:\n' -}}
  {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n' -}}
  {{- '</tool_call><|im_end|>\n' -}}
{%- elif begins_with_system -%}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'system' and loop.first -%}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user\n' -}}{%- endif -%}
    {{- '<tool_response>\n' + message.content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>' -}}{%- endif -%}
    {{- '\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\n' + (message.content or '') -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function if call.function else call -%}
      {%- if message.content or not loop.first -%}{{- '\n' -}}{%- endif -%}
      {{- '<tool_call>\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
      {%- if function.arguments is string -%}
        {{- function.arguments -}}
      {%- else -%}
        {{- function.arguments | tojson -}}
      {%- endif -%}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def corpus() -> str:
    """English prose, code and JSON-like text which every Python installation carries."""
    import argparse
    import inspect
    import typing
    from json import decoder, encoder
    from pydoc_data.topics import topics

    sources = [inspect.getsource(module) for module in (argparse, decoder, encoder, typing)]
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return ("\n\n".join(sources) + prose)[:_CORPUS_CAP_CHARS]


def train() -> Tokenizer:
    """Train the tokenizer; the same text gives the same merges, hence the same ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Digits stay single so that numbers are short sequences of few different tokens; the length
    # limits keep merges word-sized instead of learning the corpus' ruler lines.
    words = Regex(r" ?\p{L}{1,16}|\p{N}| ?[^\s\p{L}\p{N}]{1,4}|\s{1,8}(?!\S)|\s{1,8}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def lines() -> Iterator[str]:
        yield from corpus().splitlines(keepends=True)
        # One token for what decoders write for bytes that are no character; else a load client's
        # random text never comes back as the number of tokens that it was made of.
        yield from ["\ufffd\n"] * _REPLACEMENT_LINES

    tokenizer.train_from_iterator(lines(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """What each id decodes to on its own; specials give '', parts of a character U+FFFD."""
    return [tokenizer.decode([token_id]) for token_id in range(VOCAB_SIZE)]


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write what transformers and the Rust front end read: tokenizer.json and its config."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH_TOKENS,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "additional_special_tokens": [TURN_START_TOKEN],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
