"""Makes cpu.lock from pyproject.toml: resolves with pip, leaves out what a CPU install can't use.

Run as `make lock` where pip finds the `+cpu` build of torch; then run the tests with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
# CUDA builds, and the tools for a hosting service that fastapi-cli brings.
LEFT_OUT = {
    "torchvision",
    "torchaudio",
    "torchcodec",
    "triton",
    "agent-detector",
    "detect-installer",
    "fastapi-cloud-cli",
    "sentry-sdk",
    "baton-serve",
}


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--report", "-", f"{ROOT}[cpu,dev]"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    pins = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    header = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    lines = [f"{name}=={pins[name]}" for name in sorted(pins, key=str.lower)]
    kept = [line for line in lines if line.partition("==")[0].lower() not in LEFT_OUT]
    LOCK.write_text("\n".join([*header, *kept]) + "\n")


if __name__ == "__main__":
    main()
