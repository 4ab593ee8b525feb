"""Build the tiny test model: a Llama whose greedy text depends on every block of its prompt.

Role: tests prove that a KV handoff is exact by comparing generated tokens with a plain engine's.
That proof is worth nothing with a model that ignores most of its context, and it is flaky with a
model whose two best logits nearly tie. So the weights are not trained but written down, as a
small digital circuit: see `tiny_weights`.

Boundary: writes a Hugging Face model directory and nothing else. It does not serve the model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import tiny_tokenizer as tok
from engine import tiny_weights

# Raise this whenever the files that build() writes change: an older directory is then rebuilt.
RECIPE_VERSION = 2
MARKER_FILE = "baton_tiny_model.json"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_complete(directory: Path) -> bool:
    try:
        marker = json.loads((directory / MARKER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("recipe_version") == RECIPE_VERSION


def build(directory: Path, *, progress: Callable[[str], None] = print) -> Path:
    """Build the model into ``directory`` unless it is there already; returns the directory.

    Raises FileExistsError rather than replace a non-empty directory that this did not write.
    """
    directory = directory.absolute()
    if _is_complete(directory):
        progress(f"{directory} already holds the tiny model, recipe {RECIPE_VERSION}")
        return directory
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MARKER_FILE).exists():
        raise FileExistsError(f"{directory} is not empty and holds no tiny model")
    from safetensors.torch import save_file

    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        progress("training the tokenizer")
        tokenizer = tok.train()
        tok.save(tokenizer, work)
        progress("writing the weights")
        weights = tiny_weights.weights(tok.token_texts(tokenizer))
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        _write_json(work / "config.json", tiny_weights.config())
        _write_json(
            work / "generation_config.json",
            {"eos_token_id": tok.EOS_ID, "pad_token_id": tok.PAD_ID},
        )
        _write_json(
            work / MARKER_FILE,
            {
                "recipe_version": RECIPE_VERSION,
                "what": "Baton's tiny test model: greedy text depends on every prompt block",
            },
        )
        # Temporary directories and safetensors are private by default; a model is for everybody.
        work.chmod(0o755)
        for path in work.iterdir():
            path.chmod(0o644)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress(f"built the tiny model, recipe {RECIPE_VERSION}, in {directory}")
    return directory


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m engine.tiny_model DIR", file=sys.stderr)
        return 2
    build(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
