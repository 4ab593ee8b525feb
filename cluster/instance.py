"""One `baton serve` on this machine: its id, its directories, and the guard that ends it all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import guard
from protos.errors import BatonError, ConfigError

_TERM_GRACE_S = 2.0
_KEPT_S = 24 * 3600.0
"""How long logs of an instance that failed are kept."""


class Instance:
    """Directories of this run, below one that only the user can enter."""

    def __init__(self, run_directory: str | None) -> None:
        """Raises ConfigError for a directory that isn't the user's alone."""
        self.id = secrets.token_hex(4)
        base = Path(run_directory or f"{tempfile.gettempdir()}/baton-{os.getuid()}").absolute()
        _own(base)
        remove_leftovers(base)
        self.directory = base / self.id
        self.directory.mkdir(mode=0o700)
        # Ray's socket paths are long and their length is limited to 107: it gets a short one.
        self.ray_directory = Path(tempfile.mkdtemp(prefix=f"baton-ray-{self.id}-"))
        self.admin_socket = self.directory / "admin.sock"
        self._guard: subprocess.Popen[bytes] | None = None
        self._keep_logs = False

    def start_guard(self) -> None:
        """From now on everything that carries the instance's id ends with this process."""
        os.environ[guard.VARIABLE] = self.id
        self._guard = subprocess.Popen(
            [
                sys.executable, "-I", "-S", guard.__file__,
                self.id, str(_TERM_GRACE_S), str(self.directory), str(self.ray_directory),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Out of reach of a terminal's Ctrl-C.
            process_group=0,
            env={},
        )  # fmt: skip
        assert self._guard.stdout is not None
        if self._guard.stdout.readline() != b"watching\n":
            raise BatonError("the guard process did not start")

    def keep_logs(self) -> Path:
        """Something failed: leave the directory. Returns it."""
        self._keep_logs = True
        return self.directory

    def end(self, *, force: bool) -> None:
        """End every process of the instance but this one, and remove its directories. Blocks."""
        if self._guard is not None and self._guard.stdin is not None:
            if force:
                self._guard.stdin.write(b"!")
            self._guard.stdin.close()
            self._guard.wait()
        if not self._keep_logs:
            shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.ray_directory, ignore_errors=True)


def remove_leftovers(base: Path) -> None:
    """Remove directories of instances that ended, unless so lately that one may want the logs."""
    for directory in base.iterdir():
        lock = directory / "lock"
        try:
            age_s = time.time() - lock.stat().st_mtime
            if age_s < _KEPT_S:
                continue
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # No instance's directory, or the guard of a live one holds the lock.
            continue
        shutil.rmtree(directory, ignore_errors=True)


def _own(base: Path) -> None:
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = base.lstat()
    except OSError as error:
        raise ConfigError(f"run_directory {base} can't be made: {error.strerror}") from None
    if status.st_uid != os.getuid() or not base.is_dir() or base.is_symlink():
        raise ConfigError(f"run_directory {base} belongs to someone else: set another one")
    base.chmod(0o700)
