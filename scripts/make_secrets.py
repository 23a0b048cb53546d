"""Create the secrets that docker-compose.yml reads: API keys, including Prometheus's key, and Grafana's password.

Existing files stay unchanged. Run by ``make secrets``; needs only Python's standard library.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path


def make_secrets(folder: Path) -> list[Path]:
    """Write the secrets that are missing in ``folder``; returns the paths of the new files.

    The files are readable by every user, because the containers run as users with other ids than the host's user.
    The folder's mode keeps other users of the host out.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    written = []

    def write(name: str, text: str) -> Path:
        path = folder / name
        if not path.exists():
            path.write_text(text + "\n")
            path.chmod(0o644)
            written.append(path)
        return path

    metrics_key = write("metrics_key", secrets.token_urlsafe(32)).read_text().strip()
    comment = "# One key a line. The first is for clients, the second is Prometheus'."
    write("api_keys", f"{comment}\n{secrets.token_urlsafe(32)}\n{metrics_key}")
    write("grafana_password", secrets.token_urlsafe(16))
    return written


if __name__ == "__main__":
    for made in make_secrets(Path(sys.argv[1])):
        print(f"wrote {made}")
