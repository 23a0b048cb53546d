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
    """Run the command."""
    end_with(int(sys.argv[1]))
    sys.argv = ["prelude", *sys.argv[2:]]
    # Imported here because typer reads the arguments of the process.
    from server.cli import main as run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()
