"""Make the secrets that docker-compose.yml reads: API keys, Prometheus' key among them, and Grafana's password.

What is there already is kept. Run by ``make secrets``; needs nothing but Python.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path


def make_secrets(folder: Path) -> list[Path]:
    """Write what is missing in ``folder``; returns what was written.

    The files can be read by everybody who can reach them, because the users that the containers run as have other
    numbers than the one on this machine; the folder lets nobody else in.
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
