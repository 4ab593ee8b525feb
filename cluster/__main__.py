"""The `baton` command, also `python -m cluster`: what comes before anything slow is imported."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point."""
    # Ctrl-C ends this process at once while nothing runs yet that has to be ended with it; `serve`
    # takes over once something does. Shells start background commands with it ignored, and as a
    # KeyboardInterrupt it can get lost within a library that is being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cluster.cli import app

    app()


if __name__ == "__main__":
    main()
