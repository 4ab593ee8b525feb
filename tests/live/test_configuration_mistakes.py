"""What `baton serve` says of a configuration that is none: one sentence, before anything starts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Mistake:
    config: str
    """The YAML file's content."""
    words: tuple[str, ...]
    """What the sentence must hold."""


MISTAKES = {
    "unknown key": Mistake(
        "decode:\n  replica: 2", ("unknown key decode.replica", "did you mean decode.replicas?")
    ),
    "unknown section": Mistake("htpp: {port: 9000}", ("unknown key htpp", "did you mean http?")),
    "wrong type": Mistake("http: {port: many}", ("http.port must be a whole number", "'many'")),
    "out of range": Mistake("decode: {replicas: 0}", ("decode.replicas must be", "not 0")),
    "unknown engine argument": Mistake(
        "engine_args: {max_modellen: 100}", ("engine_args.max_modellen", "max_model_len")
    ),
    "engine argument of the wrong type": Mistake(
        "engine_args: {max_model_len: long}", ("engine_args.max_model_len", "'long'")
    ),
    "engine argument that Baton sets": Mistake(
        "engine_args: {scheduler_cls: mine}", ("engine_args.scheduler_cls",)
    ),
    "unknown argument of the simulated engine": Mistake(
        "engine: simulated\nengine_args: {blocksize: 16}", ("engine_args.blocksize", "block_size")
    ),
    "no YAML": Mistake("http: [", ("is no YAML",)),
}


def serve_with(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", "serve", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_in_the_configuration_is_one_sentence(kind: str, tmp_path: Path) -> None:
    mistake = MISTAKES[kind]
    path = tmp_path / "baton.yaml"
    path.write_text(mistake.config)
    ended = serve_with("--config", str(path))
    assert ended.returncode == 2, ended
    (line,) = (ended.stdout + ended.stderr).strip().splitlines()
    for word in mistake.words:
        assert word in line


def test_a_configuration_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.yaml"
    ended = serve_with("--config", str(path))
    assert ended.returncode == 2
    (line,) = (ended.stdout + ended.stderr).strip().splitlines()
    assert str(path) in line
