"""Makes sure that the model is on this machine: built, found, or downloaded.

Boundary: loads no model and imports neither torch nor vLLM into this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cluster.config import Config
from protos.errors import ConfigError

TINY_NAME: Final = "tiny"
_COMMON_CONTEXT_TOKENS: Final = 8192
_NOT_NEEDED: Final = ["*.pth", "*.pt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]


def tiny_directory() -> Path:
    """Where the tiny model is built; kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "baton" / TINY_NAME


def served_names(config: Config) -> list[str]:
    """As configured; else the hub id, or the last part of the directory."""
    if config.model.served_names:
        return config.model.served_names
    path = config.model.path
    if path is None:
        return [TINY_NAME]
    return [Path(path).resolve().name if is_directory_path(path) else path]


def tool_call_parser(config: Config) -> str | None:
    """As configured; the tiny model's chat template writes tool calls in Hermes' form."""
    default = "hermes" if config.model.path is None else None
    return config.model.tool_call_parser or default


def is_directory_path(path: str) -> bool:
    """Whether it names a directory rather than a model on the hub (`OWNER/NAME`)."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") != 1 or Path(path).exists()


async def prepare(config: Config, progress: Callable[[str], None]) -> Path:
    """The model's directory, complete. Raises ConfigError."""
    path = config.model.path
    if path is None:
        directory = tiny_directory()
        await _build_tiny(directory)
    elif is_directory_path(path):
        directory = _absolute(path)
    else:
        directory = await asyncio.to_thread(_download, path, progress)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"model.path: {directory} holds no model (there is no config.json in it); give a "
            "checkpoint's directory or a hub id such as Qwen/Qwen3-0.6B."
        )
    return directory


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


async def _build_tiny(directory: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "engine.tiny_model", str(directory),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    if process.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"the tiny model could not be built: {' '.join(last)}")


def _download(hub_id: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Reports instead of drawing."""

        def display(self, *_: object, **__: object) -> None:
            if self.unit == "B" and self.total:
                progress(f"{self.n / 1e9:.2f} of {self.total / 1e9:.2f} GB")

    try:
        found = snapshot_download(hub_id, ignore_patterns=_NOT_NEEDED, tqdm_class=Bar)
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"model.path: {hub_id} is not in the local cache, and the hub can't be reached; give "
            "a directory."
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path: {hub_id} can't be downloaded: {reason}") from None
    return Path(found)


def context_tokens(config: Config, directory: Path) -> int:
    """The longest prompt and output together: the smaller of the pools', else the model's own."""
    configured = [
        length
        for role in ("prefill", "decode")
        if (length := config.engine_args_of(role).get("max_model_len")) is not None
    ]
    if configured:
        return int(min(configured))
    content: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = content.get("text_config", content)
    return int(text.get("max_position_embeddings", _COMMON_CONTEXT_TOKENS))
