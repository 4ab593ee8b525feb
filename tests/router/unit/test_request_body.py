"""What the edge reads in bodies that are hard to read, or try to hide something."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from running_edge import CONTEXT_TOKENS, RunningEdge

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
DEEP = 10_000


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    edge = RunningEdge(tmp_path_factory.mktemp("edge") / "u")
    yield edge
    edge.end()


def front_of(edge: RunningEdge, path: str, body: bytes) -> str | None:
    """The front that got it, or None if it was refused; either has it whole."""
    status, answer, _ = edge.post(path, body)
    if status == 400:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return None
    assert (status, answer["bytes"]) == (200, len(body))
    return str(answer["front"])


def quoted_property(name: str) -> bytes:
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "n": 2}
    return json.dumps(
        {"prompt": "a", "structured_outputs": {"json": schema}, "vllm_xargs": {"n": 2}}
    ).encode()


@pytest.mark.parametrize(
    ("body", "front"),
    [
        # Strings.
        (rb'{"prompt": "\"n\": 2, \"suffix\": \"a\""}', "fast"),
        (rb'{"prompt": "\\", "n": 2}', "full"),
        (rb'{"prompt": "\\\", \"n\": 2"}', "fast"),
        (rb'{"prompt": "a}", "n": 1}', "fast"),
        (rb'{"prompt": "}", "n": 2}', "full"),
        (rb'{"stop": ["]", "\"]"], "prompt": "a", "n": 2}', "full"),
        (rb'{"stop": ["]", "\"]"], "prompt": "a"}', "fast"),
        (rb'{"prompt": "\ud83d\ude00\u0000"}', "fast"),
        ('{"prompt": "\u20ac\U0001f600"}'.encode(), "fast"),
        # Only its own members count.
        (quoted_property("n"), "fast"),
        (quoted_property("kv_transfer_params"), "fast"),
        (b'{"prompt": "a", "unknown": {"n": 2, "suffix": ["a"]}}', "fast"),
        # Names.
        (rb'{"prompt": "a", "\u006e": 2}', "full"),
        (rb'{"prompt": "a", "\u006E": 2}', "full"),
        (rb'{"prompt": "a", "suffi\u0078": "b"}', "full"),
        (rb'{"prompt": "a", "N": 2}', "fast"),
        (rb'{"prompt": "a", "": 2}', "fast"),
        (b'{"prompt": "a", "n": 1, "n": 2}', "full"),
        (b'{"prompt": "a", "n": 2, "n": 1}', "full"),
        (b'{"prompt": "a", "n": 1, "n": 1}', "full"),
        # White space.
        (b' \t\r\n{ "prompt"\n:\t"a" ,\r"n" : 2 } ', "full"),
        (b' \t\r\n{ "prompt"\n:\t"a" ,\r"n" : 1 } ', "fast"),
        (b'{"prompt":"a","n":2}', "full"),
        # Numbers.
        (b'{"prompt": "a", "n": 1.0}', "full"),
        (b'{"prompt": "a", "n": true}', "full"),
        (b'{"prompt": "a", "n": "1"}', "full"),
        (b'{"prompt": "a", "n": null}', "full"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "full"),
        (b'{"prompt": "a", "seed": %s}' % (b"9" * 5000), "full"),
        (b'{"prompt": "a", "top_k": 99999999999}', "full"),
        (b'{"prompt": "a", "temperature": 1e-2}', "fast"),
        (b'{"prompt": "a", "temperature": "0.5"}', "full"),
        (b'{"prompt": [1, 2, 3.5]}', "full"),
        (b'{"prompt": [1, -2]}', "full"),
        (b'{"prompt": [[1, 2]]}', "full"),
        (b'{"prompt": []}', "fast"),
    ],
)
def test_completions(edge: RunningEdge, body: bytes, front: str) -> None:
    assert front_of(edge, COMPLETIONS, body) == front


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()


def said(**message: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "a"}, message]}).encode()


@pytest.mark.parametrize(
    ("body", "front"),
    [
        (chat(), "fast"),
        (chat(messages=[]), "full"),
        (chat(messages="a"), "full"),
        (said(role="user", content=[{"type": "text", "text": "a"}]), "fast"),
        (said(role="user", content=[{"type": "text", "text": "a"}] * 2), "full"),
        (said(role="user", content=[{"type": "image_url", "image_url": {"url": "a"}}]), "full"),
        (said(role="user", content=""), "full"),
        (said(role="user", content=None), "full"),
        (said(role="wizard", content="a"), "full"),
        (said(role="user", content="a", name="b"), "full"),
        (said(role="tool", content="a", tool_call_id="1"), "fast"),
        (chat(tools=[{"type": "function"}], tool_choice="auto"), "fast"),
        (chat(tools=[{"type": "function"}], tool_choice="none"), "full"),
        (chat(chat_template="{{ 1 }}"), "full"),
        (chat(n=2), "full"),
        (chat(logprobs=True, top_logprobs=2), "fast"),
        (chat(top_logprobs=-1), "full"),
        (chat(stream_options={}), "full"),
        (chat(stream=True, stream_options={"include_usage": True}), "fast"),
    ],
)
def test_chats(edge: RunningEdge, body: bytes, front: str) -> None:
    assert front_of(edge, CHAT, body) == front


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"1",
        b'"n"',
        b"[]",
        b'[{"prompt": "a", "n": 2}]',
        b"{",
        b"{}",
        b'{"prompt"',
        b'{"prompt"}',
        b'{"prompt": }',
        b'{"prompt": "a',
        b'{"prompt": "a\\"}',
        b'{"prompt": "a"',
        b'{"prompt": "a",}',
        b'{"prompt": "a"} {"n": 2}',
        b'{"prompt": [1, 2}',
        b'{"prompt": {"a": 1]}',
        b"{'prompt': 'a'}",
        b'{prompt: "a"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"\xff": 1}',
        b"\x00" * 1000,
        b"\xff" * 1000,
        b'{"prompt": "a", "temperature": NaN}',
    ],
)
def test_what_is_no_request_is_for_a_front_to_refuse(edge: RunningEdge, body: bytes) -> None:
    """The edge neither fails on it nor holds it back: the fronts say what is wrong with it."""
    for path in (COMPLETIONS, CHAT, "/tokenize", "/v1/messages"):
        assert front_of(edge, path, body) in ("fast", "full")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "kv_transfer_params": {}}',
        b'{"kv_transfer_params": {"do_remote_prefill": true}, "prompt": "a"}',
        rb'{"prompt": "a", "\u006bv_transfer_params": {}}',
        rb'{"prompt": "a", "kv\u005Ftransfer_params": {}}',
        b'{"prompt": "a", "kv_transfer_params": null, "kv_transfer_params": {}}',
        b'{"prompt": "a", "kv_transfer_params" \n : \n {}}',
        b'{"prompt": "a", "data_parallel_rank": 0}',
        b'{"prompt": "a", "priority": 1}',
        b'{"prompt": "a", "priority": -1e3}',
        b'{"prompt": "a", "priority": "-1"}',
        b'{"prompt": "a", "priority": true}',
        b'{"prompt": "a", "vllm_xargs": {"b": "{", "kv_transfer_params": 1}}',
        rb'{"prompt": "a", "vllm_xargs": {"baton\u005fx": 1}}',
        b'{"prompt": "a", "vllm_xargs": {"baton_": 1}, "vllm_xargs": {}}',
        b'{"prompt": "a", "max_tokens": %d}' % (CONTEXT_TOKENS + 1),
        b'{"prompt": "a", "max_tokens": %s}' % (b"9" * 400),
        b'{"prompt": "a", "max_tokens": 1e999}',
        b'{"prompt": "%s", "kv_hints": 1, "prompt": "' % (b"a" * 1000),
    ],
)
def test_what_is_refused_however_it_is_written(edge: RunningEdge, body: bytes) -> None:
    for path in (COMPLETIONS, CHAT):
        assert front_of(edge, path, body) is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "kv_transfer_params": null}',
        b'{"prompt": "a", "priority": 0}',
        b'{"prompt": "kv_transfer_params\\": {}", "vllm_xargs": {"a": "baton_x"}}',
        b'{"prompt": "a", "vllm_xargs": {"a": {"kv_transfer_params": 1}}}',
        b'{"prompt": "a", "vllm_xargs": null}',
        b'{"prompt": "a", "max_tokens": %d}' % CONTEXT_TOKENS,
    ],
)
def test_what_only_looks_like_it_passes(edge: RunningEdge, body: bytes) -> None:
    assert front_of(edge, COMPLETIONS, body) == "fast"


@pytest.mark.parametrize(
    ("body", "front"),
    [
        (b"[" * DEEP, "fast"),
        (b'{"a":' * DEEP, "fast"),
        (b'{"prompt": "a", "vllm_xargs": %s%s}' % (b'{"a":' * DEEP, b"}" * DEEP), "fast"),
        (b'{"prompt": %s%s}' % (b"[" * DEEP, b"]" * DEEP), "full"),
        (b'{"prompt": "a", "b": %s1%s, "n": 2}' % (b"[" * DEEP, b"]" * DEEP), "full"),
        (b'{"prompt": [[%s]]}' % (b"1," * 30_000), "full"),
        (b'{"prompt": "%s"}' % (b"\\\\" * 30_000), "fast"),
        (b'{"prompt": "%s' % (b"\\" * 60_000), "fast"),
        (b'{"prompt": "%s"}' % (b'\\"' * 30_000), "fast"),
        (b"{%s}" % b",".join(b'"a%d":1' % number for number in range(5_000)), "fast"),
        (b'{"prompt": [%s]}' % b",".join(b"%d" % number for number in range(10_000)), "fast"),
        (b'{"stop": [%s], "n": 2}' % b",".join([b'"]"'] * 10_000), "full"),
    ],
)
def test_what_is_deep_or_long_is_read_quickly(edge: RunningEdge, body: bytes, front: str) -> None:
    assert len(body) < 64 * 1024
    started_s = time.monotonic()
    for _ in range(3):
        assert front_of(edge, COMPLETIONS, body) == front
    assert time.monotonic() - started_s < 10
