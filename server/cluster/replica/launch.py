"""The entry of a replica's server process: ``python -m server.cluster.replica.launch PARENT ARGUMENT...``.

It runs ``prelude`` with the arguments, and stops like after SIGTERM if its parent ends first, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the kernel send SIGTERM to this process when its parent ends.

    Args:
        parent: Process id of the parent; if it has ended already, this process exits.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(0)


def main() -> None:
    """Become the command; the signal at the parent's end outlasts that (prctl(2))."""
    end_with(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-c", "from server.cli import main; main()", *sys.argv[2:]])  # noqa: S606


if __name__ == "__main__":
    main()
