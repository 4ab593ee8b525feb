"""What `baton serve` chooses where the user has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster import engine_defaults
from cluster.config import Config
from cluster.engine_defaults import cpu_has_bfloat16


def test_of_this_machine_pytorch_says_the_same() -> None:
    assert cpu_has_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu sse2 avx avx2 fma", False),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512dq avx512bw avx512vl", True),
        ("flags\t\t: fpu sse2 avx2 avx512f", False),
        ("Features\t: fp asimd sve i8mm bf16", True),
        ("Features\t: fp asimd", False),
        ("model name\t: bf16 avx512bw avx512vl avx512dq", False),
    ],
)
def test_of_others_their_flags_say_it(tmp_path: Path, line: str, has: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n", encoding="utf-8")
    assert cpu_has_bfloat16(cpuinfo) == has


@pytest.mark.parametrize(("on_cpu", "dtype"), [(True, "float32"), (False, None)])
def test_on_gpus_the_cpu_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, dtype: str | None
) -> None:
    monkeypatch.setattr(engine_defaults, "is_cpu_install", lambda: on_cpu)
    monkeypatch.setattr(engine_defaults, "cpu_has_bfloat16", lambda: False)
    assert engine_defaults.arguments(Config(), "decode").get("dtype") == dtype
