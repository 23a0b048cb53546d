"""Build the console: ``make console``; with ``--check``, compare a fresh build with the committed files."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from prompt_store.open_store import open_store
from server.app import create_app
from server.config import EngineSettings, Settings, StoreSettings
from server.demo.tour import MODEL_DIRECTORY

ROOT = Path(__file__).parent.parent
WEB = ROOT / "server" / "console" / "web"
STATIC = ROOT / "server" / "console" / "static"
SOURCES = ("package.json", "package-lock.json", "tsconfig.json", "build.mjs", "index.html", "icon.svg", "src")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="build in another folder, and compare the files")
    if not parser.parse_args().check:
        build(WEB, STATIC)
        return
    with tempfile.TemporaryDirectory() as folder:
        web, static = Path(folder) / "web", Path(folder) / "static"
        web.mkdir()
        for name in SOURCES:
            source = WEB / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, web / name)
        build(web, static)
        if differences := compare(static, STATIC):
            sys.exit("\n".join(["server/console/static is not what `make console` builds:", *differences]))


def build(web: Path, out: Path) -> None:
    """Install the locked packages, generate the API's types, check all types, and bundle."""
    locked = (web / "package-lock.json").read_bytes()
    installed = web / "node_modules" / ".locked"
    if not installed.exists() or installed.read_bytes() != locked:
        run(web, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent")
        installed.write_bytes(locked)
    generated = web / "generated"
    generated.mkdir(exist_ok=True)
    (generated / "openapi.json").write_text(json.dumps(openapi()))
    run(web, "node_modules/.bin/openapi-typescript", "generated/openapi.json", "--output", "generated/api.d.ts")
    run(web, "node_modules/.bin/tsc")
    run(web, "node", "build.mjs", str(out))


def run(folder: Path, *command: str) -> None:
    """Run a program; end this one if it fails."""
    if subprocess.run(command, cwd=folder, check=False).returncode:
        sys.exit(f"failed: {' '.join(command)}")


def openapi() -> dict[str, object]:
    """The document of a server with the embedded model, which is not started."""
    with tempfile.TemporaryDirectory() as folder:
        store = StoreSettings(location=folder)
        settings = Settings(engine=EngineSettings(model=str(MODEL_DIRECTORY)), store=store)
        opened = open_store(store.location)
        try:
            return create_app(settings, store=opened).openapi()
        finally:
            opened.close()


def compare(built: Path, committed: Path) -> list[str]:
    """The files that differ. Compressed ones must hold the bytes of the file that they lie beside.

    Compressors give other bytes in other releases of Node, so these are compared by their content.
    """
    names = {
        path.relative_to(folder) for folder in (built, committed) for path in folder.rglob("*") if path.is_file()
    }
    found = []
    for name in sorted(names):
        if not (built / name).exists() or not (committed / name).exists():
            found.append(f"{name}: only {'built' if (built / name).exists() else 'committed'}")
        elif name.suffix == ".gz":
            if gzip.decompress((committed / name).read_bytes()) != (committed / name.with_suffix("")).read_bytes():
                found.append(f"{name}: not the content of {name.stem}")
        elif name.suffix != ".br" and (built / name).read_bytes() != (committed / name).read_bytes():
            found.append(f"{name}: differs")
    return found


if __name__ == "__main__":
    main()
