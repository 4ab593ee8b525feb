"""Part of `make check`: the generated code is what the .proto files give."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("worker", "inference")
GENERATED = [
    f"{source}{ending}" for source in SOURCES for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I."]
        sources = [f"protos/{source}.proto" for source in SOURCES]
        subprocess.run([*command, *outputs, *sources], cwd=ROOT, check=True)
        stale = [
            name
            for name in GENERATED
            if (ROOT / "protos" / name).read_text() != (Path(scratch) / "protos" / name).read_text()
        ]
    if stale:
        sys.exit(f"protos/{', protos/'.join(stale)}: out of date; run `make protos`")


if __name__ == "__main__":
    main()
