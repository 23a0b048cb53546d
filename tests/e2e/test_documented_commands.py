"""The shell examples of README and the quickstart, run as a newcomer copies them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from server.demo.tour import SOFT_PROMPTS_DIRECTORY
from tests.support.demo_server import TASKS
from tests.support.serving import adapter, serving, upload
from tests.test_docs import ROOT

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")

ELSEWHERE = ("prelude serve ", "prelude demo", "make ")
"""They start servers or need Docker; test_docs.py checks their flags and targets, and CI runs some of them."""

FEWER_STEPS = " --max-steps 3"


def commands() -> list[str]:
    """Every command once, in the order of the documents, without its comment."""
    found: dict[str, None] = {}
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if command := re.sub(r"\s+#\s.*", "", line).strip():
                    found[command] = None
    return list(found)


@pytest.mark.slow
def test_every_command_succeeds(tmp_path: Path) -> None:
    run = [command for command in commands() if not command.startswith((*ELSEWHERE, "pip "))]
    assert len(run) > 8
    (tmp_path / "server").symlink_to(ROOT / "server")
    (tmp_path / "path/to/peft").mkdir(parents=True)
    (tmp_path / "path/to/peft/output").symlink_to(SOFT_PROMPTS_DIRECTORY / "intent")
    for file in (SOFT_PROMPTS_DIRECTORY / "extract").glob("adapter_*"):
        (tmp_path / file.name).symlink_to(file)
    row = {"prompt": "The lid was hardly sturdy."}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    with serving(tmp_path / "files", "--dtype", "float32") as (client, _):
        for task in TASKS:
            assert upload(client, task, *adapter(task)).status_code == 201
        url = str(client.base_url).rstrip("/")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PRELUDE_URL": url, "PATH": path}
        for command in run:
            line = command.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS --fail-with-body ")
            line += FEWER_STEPS * line.startswith("prelude train ")
            done = subprocess.run(
                ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_every_installed_extra_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [
        extra
        for document in ROOT.glob("**/*.md")
        if not {".venv", "node_modules", "build"} & set(document.parts)
        for extras_of_one in re.findall(r"prelude-server\[([\w,]+)\]", document.read_text())
        for extra in extras_of_one.split(",")
    ]
    assert named
    assert set(named) <= extras.keys()
    text = (ROOT / "docs" / "install.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert rows == extras.keys() - {"bench", "dev", "docs"}
