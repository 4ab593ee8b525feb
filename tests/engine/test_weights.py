"""The digest of what an engine computes with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.weights import SAMPLE_BYTES, weights_digest

TENSOR_BYTES = 5 * SAMPLE_BYTES


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    header, at = {}, 0
    for name, content in tensors.items():
        offsets = [at, at + len(content)]
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": offsets}
        at += len(content)
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join([*tensors.values()]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text('{"layers": 2}')
    (directory / "tokenizer.json").write_text('{"vocab": {"a": 1}}')
    (directory / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    tensors = {"first": bytes(TENSOR_BYTES), "second": bytes(10)}
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "extra.bin").write_bytes(bytes(1_000_000))
    return directory


def digest(directory: Path, **loaded_as: object) -> str:
    return weights_digest(directory, loaded_as)


def test_a_copy_elsewhere_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "on" / "another" / "node")
    assert digest(copied) == digest(checkpoint)


def change(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def overwrite(name: str, at: int, content: bytes) -> Callable[[Path], object]:
    """From the end, if `at` is negative."""

    def write(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.seek(at, 2 if at < 0 else 0)
            file.write(content)

    return write


@pytest.mark.parametrize(
    "changed",
    [
        change("config.json", '{"layers": 3}'),
        change("tokenizer.json", '{"vocab": {"b": 1}}'),
        change("modeling.py", "class Model: ..."),
        lambda directory: write_safetensors(directory / "model.safetensors", {"other": b"0" * 9}),
        lambda directory: write_safetensors(directory / "more.safetensors", {"third": b"0" * 9}),
        lambda directory: (directory / "model.safetensors").rename(directory / "m.safetensors"),
        # The tensors' own bytes: the middle of the first, all of the second.
        overwrite("model.safetensors", -10 - TENSOR_BYTES // 2, b"\1"),
        overwrite("model.safetensors", -10, b"\1"),
        overwrite("model.safetensors", -1, b"\1"),
        overwrite("extra.bin", 0, b"\1" * 1_000_000),
        overwrite("extra.bin", 1_000_000, b"\1"),
    ],
)
def test_what_counts_shows(checkpoint: Path, changed: Callable[[Path], object]) -> None:
    before = digest(checkpoint)
    changed(checkpoint)
    assert digest(checkpoint) != before


@pytest.mark.parametrize(
    "changed",
    [
        change("tokenizer_config.json", '{"chat_template": "new"}'),
        change("README.md", "A model."),
        # What is not sampled, as the module says.
        overwrite("model.safetensors", -10 - TENSOR_BYTES, b"\1"),
    ],
)
def test_what_does_not_count_may_change(
    checkpoint: Path, changed: Callable[[Path], object]
) -> None:
    before = digest(checkpoint)
    changed(checkpoint)
    assert digest(checkpoint) == before


def test_how_it_is_loaded_counts(checkpoint: Path) -> None:
    seen = {
        digest(checkpoint),
        digest(checkpoint, dtype="bfloat16"),
        digest(checkpoint, dtype="float16"),
        digest(checkpoint, dtype="float16", made_up_from=0),
        digest(checkpoint, dtype="float16", made_up_from=1),
    }
    assert len(seen) == 5
    assert digest(checkpoint, dtype="float16", made_up_from=1) in seen


def test_models_that_are_not_there_are_told_apart_by_their_names(tmp_path: Path) -> None:
    assert digest(tmp_path / "one") == digest(tmp_path / "one") != digest(tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole safetensors file"),
        ((1000).to_bytes(8, "little") + b"{}", "no whole safetensors file"),
        ((2).to_bytes(8, "little") + b"[}", "a header that is not of safetensors' format"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "a header that is not of safetensors' format"),
    ],
)
def test_a_file_that_is_cut_or_broken_is_named(
    checkpoint: Path, content: bytes, message: str
) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*{message}"):
        digest(checkpoint)
