"""The tiny model must notice any wrong KV block, and must not notice anything else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from engine import tiny_model
from engine import tiny_tokenizer as tok

BLOCK_TOKENS = 128
SHORTEST_BLOCK_TOKENS = 32
KvPairs = list[tuple[torch.Tensor, torch.Tensor]]  # per layer, each [row, head, position, dim]


@dataclass(frozen=True)
class Tiny:
    directory: Path
    model: Any
    tokenizer: Any
    corpus_ids: list[int]

    def prompt(self, length_tokens: int, rng: random.Random) -> list[int]:
        """A piece of real text or random tokens, with equal chance."""
        if rng.random() < 0.5:
            start = rng.randrange(len(self.corpus_ids) - length_tokens)
            return self.corpus_ids[start : start + length_tokens]
        return [
            rng.randrange(len(tok.SPECIAL_TOKENS), tok.VOCAB_SIZE) for _ in range(length_tokens)
        ]

    def prefill(self, prompts: list[list[int]], chunks: int = 1) -> tuple[torch.Tensor, KvPairs]:
        """The first generated token of each prompt and the KV of all its positions."""
        cache = DynamicCache(config=self.model.config)
        logits = torch.empty(0)
        for ids in torch.tensor(prompts).tensor_split(chunks, dim=1):
            logits = self.model(ids, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1), [(layer.keys, layer.values) for layer in cache.layers]

    def decode(self, kv: KvPairs, first: torch.Tensor, length_tokens: int) -> torch.Tensor:
        """Greedy tokens, the given first one included."""
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(kv):
            cache.update(keys, values, layer)
        tokens = [first]
        while len(tokens) < length_tokens:
            step = self.model(tokens[-1][:, None], past_key_values=cache, use_cache=True)
            tokens.append(step.logits[:, -1].argmax(-1))
        return torch.stack(tokens, dim=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    directory = tiny_model.build(tmp_path_factory.mktemp("tiny") / "model")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    corpus_ids = tokenizer.encode(tok.corpus()[:200_000], verbose=False)
    with torch.inference_mode():
        yield Tiny(directory, model, tokenizer, corpus_ids)


def _blocks(length_tokens: int) -> list[slice]:
    starts = range(0, length_tokens - SHORTEST_BLOCK_TOKENS + 1, BLOCK_TOKENS)
    return [slice(start, min(start + BLOCK_TOKENS, length_tokens)) for start in starts]


def _with_block(kv: KvPairs, row: int, at: slice, source: KvPairs, start: int) -> None:
    """Overwrite one block of one row by as many positions of ``source`` from ``start`` on."""
    taken = slice(start, start + at.stop - at.start)
    for pair, source_pair in zip(kv, source, strict=True):
        for mine, other in zip(pair, source_pair, strict=True):
            mine[row, :, at] = other[row, :, taken]


LONG = [pytest.param(tokens, marks=pytest.mark.slow) for tokens in (777, 1184, 1500)]


@pytest.mark.parametrize("length_tokens", [128, 160, 400, *LONG])
def test_a_wrong_kv_block_changes_the_text(tiny: Tiny, length_tokens: int) -> None:
    rng = random.Random(length_tokens)
    blocks = _blocks(length_tokens)
    # Every second row takes the last block, which is partly filled for most of the lengths.
    damaged = [blocks[-1] if row % 2 else rng.choice(blocks) for row in range(16)]
    prompts = [tiny.prompt(length_tokens, rng) for _ in damaged]
    first, kv = tiny.prefill(prompts)
    right = tiny.decode(kv, first, 16)

    replaced = [list(prompt) for prompt in prompts]
    for prompt, block in zip(replaced, damaged, strict=True):
        prompt[block] = tiny.prompt(block.stop - block.start, rng)
    other_kv = tiny.prefill(replaced)[1]
    zeros = [(torch.zeros_like(keys), torch.zeros_like(values)) for keys, values in kv]

    unnoticed: list[tuple[str, int, slice]] = []
    cases = 0
    for variant in ("other text", "zeros", "another block of the prompt"):
        wrong = [(keys.clone(), values.clone()) for keys, values in kv]
        rows = []
        for row, block in enumerate(damaged):
            source, start = {"other text": other_kv, "zeros": zeros}.get(variant, kv), block.start
            if source is kv:
                fitting = [b.start for b in blocks if b.stop - b.start >= block.stop - block.start]
                others = [candidate for candidate in fitting if candidate != block.start]
                if not others:
                    continue
                start = rng.choice(others)
            _with_block(wrong, row, block, source, start)
            rows.append(row)
        changed = (tiny.decode(wrong, first, 16) != right).any(dim=1)
        cases += len(rows)
        unnoticed += [(variant, row, damaged[row]) for row in rows if not changed[row]]
    assert cases >= 2 * len(damaged)
    assert len(unnoticed) <= 0.05 * cases, unnoticed


def test_keys_and_values_of_every_layer_matter(tiny: Tiny) -> None:
    rng = random.Random(2)
    prompts, other_prompts = ([tiny.prompt(512, rng) for _ in range(16)] for _ in range(2))
    first, kv = tiny.prefill(prompts)
    other_kv = tiny.prefill(other_prompts)[1]
    right = tiny.decode(kv, first, 16)
    for layer in range(len(kv)):
        for part in range(2):
            wrong = [(keys.clone(), values.clone()) for keys, values in kv]
            wrong[layer][part][:, :, 128:256] = other_kv[layer][part][:, :, 128:256]
            changed = (tiny.decode(wrong, first, 16) != right).any(dim=1)
            assert changed.float().mean() >= 0.85, (layer, part)


@pytest.mark.slow
def test_text_does_not_depend_on_chunks_or_batch(tiny: Tiny) -> None:
    rng = random.Random(3)
    for length_tokens in (37, 300, 900):
        prompts = [tiny.prompt(length_tokens, rng) for _ in range(8)]
        first, kv = tiny.prefill(prompts)
        together = tiny.decode(kv, first, 64)
        first, kv = tiny.prefill(prompts, chunks=3)
        assert torch.equal(tiny.decode(kv, first, 64), together)
        for prompt, expected in zip(prompts[:2], together, strict=False):
            first, kv = tiny.prefill([prompt])
            assert torch.equal(tiny.decode(kv, first, 64)[0], expected)


def test_best_logit_leads_by_far_more_than_rounding(tiny: Tiny) -> None:
    rng = random.Random(4)
    ids = torch.tensor([tiny.prompt(1000, rng) for _ in range(2)])
    best, second = tiny.model(ids).logits.float().topk(2).values.unbind(-1)
    # bfloat16 keeps 8 bits: neighbouring numbers are 2**-7 of their size apart at most.
    in_steps = (best - second) / (best * 2**-7)
    assert (in_steps >= 4).float().mean() >= 0.999


def test_greedy_text_is_varied_words_and_goes_on(tiny: Tiny) -> None:
    rng = random.Random(5)
    first, kv = tiny.prefill([tiny.prompt(200, rng) for _ in range(16)])
    outputs = tiny.decode(kv, first, 64).tolist()
    assert all(tok.EOS_ID not in output for output in outputs)
    assert sorted(len(set(output[:32])) for output in outputs)[8] >= 20
    text = tiny.tokenizer.decode(outputs[0])
    assert text.isascii()
    assert text.isprintable()
    assert tiny.tokenizer.decode(outputs[0], skip_special_tokens=True) == text


def test_eos_and_json_closers_can_be_sampled(tiny: Tiny) -> None:
    rng = random.Random(6)
    logits = tiny.model(torch.tensor([tiny.prompt(500, rng)])).logits.float()
    probability = logits.softmax(-1)[0].mean(dim=0)
    assert 1e-4 < probability[tok.EOS_ID] < 0.02
    for closer in ('"', "}", "]", ","):
        (token_id,) = tiny.tokenizer.encode(closer)
        assert probability[token_id] > 1e-4


def test_build_is_deterministic_and_does_not_repeat_itself(tiny: Tiny, tmp_path: Path) -> None:
    said: list[str] = []
    again = tiny_model.build(tmp_path / "again", progress=said.append)
    names = sorted(path.name for path in again.iterdir())
    assert names == sorted(path.name for path in tiny.directory.iterdir())
    for name in names:
        assert (again / name).read_bytes() == (tiny.directory / name).read_bytes(), name

    written_ns = (again / "model.safetensors").stat().st_mtime_ns
    tiny_model.build(again, progress=said.append)
    assert "already" in said[-1]
    assert (again / "model.safetensors").stat().st_mtime_ns == written_ns
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_build_replaces_an_older_recipe_but_nothing_else(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / tiny_model.MARKER_FILE).write_text('{"recipe_version": 0}')
    (old / "left_over").touch()
    tiny_model.build(old)
    marker = json.loads((old / tiny_model.MARKER_FILE).read_text())
    assert marker["recipe_version"] == tiny_model.RECIPE_VERSION
    assert not (old / "left_over").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(FileExistsError):
        tiny_model.build(foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_files_are_small_and_set_no_sampling_defaults(tiny: Tiny) -> None:
    assert sum(path.stat().st_size for path in tiny.directory.iterdir()) < 10_000_000
    generation = json.loads((tiny.directory / "generation_config.json").read_text())
    assert generation == {"eos_token_id": tok.EOS_ID, "pad_token_id": tok.PAD_ID}
    assert tiny.model.config.max_position_embeddings == 8192


def test_tokenizer_keeps_text_and_adds_nothing(tiny: Tiny) -> None:
    text = 'def f(x): return {"a": [1, 23]}\n\n    naïve — 日本 🙂\t'
    ids = tiny.tokenizer.encode(text)
    assert tiny.tokenizer.decode(ids) == text
    assert min(ids) >= len(tok.SPECIAL_TOKENS)
    assert max(ids) < tok.VOCAB_SIZE
    assert tiny.tokenizer.encode(tok.EOS_TOKEN) == [tok.EOS_ID]
    assert (tiny.tokenizer.eos_token_id, tiny.tokenizer.pad_token_id) == (tok.EOS_ID, tok.PAD_ID)


def _chat(tiny: Tiny, messages: list[dict[str, Any]], **options: Any) -> str:
    rendered = tiny.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(rendered, str)
    return rendered


def test_chat_template_is_chatml(tiny: Tiny) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert _chat(tiny, messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_writes_tools_in_hermes_form(tiny: Tiny) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

    def call(**function: Any) -> dict[str, Any]:
        return {"type": "function", "function": function}

    calls = [call(name="add", arguments={"a": 1}), call(name="add", arguments='{"a": 2}')]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Done."},
    ]
    system, conversation = _chat(tiny, messages, tools=[tool]).split("<|im_end|>\n", 1)
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in system
    assert conversation == (
        "<|im_start|>user\nAdd.<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n"
        "<tool_response>\n3\n</tool_response>\n"
        "<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nDone.<|im_end|>\n"
    )
