"""The command line's client commands against a real server."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from server.cli import app as cli


@pytest.fixture
def prelude(live):
    def invoke(*arguments: str):
        return CliRunner().invoke(cli, list(arguments), env={"PRELUDE_URL": live.url})

    return invoke


def test_push_list_remove(prelude, peft_directory):
    first = str(peft_directory("sentiment"))
    assert prelude("push", first, "--id", "sentiment").stdout == "sentiment@1\n"
    assert prelude("push", first, "--id", "sentiment").stdout == "sentiment@1 (the same bytes were there already)\n"
    second = str(peft_directory("sentiment", seed=1))
    assert prelude("push", second, "--id", "sentiment", "--alias", "canary").stdout == "sentiment@2\n"
    listing = prelude("list").stdout.splitlines()
    assert listing[1].split()[:5] == ["sentiment", "1", "2", "canary=2", "latest=1"]
    assert prelude("rm", "sentiment@2").stdout == "deleted sentiment@2\n"
    assert prelude("rm", "sentiment").exit_code == 0
    assert "sentiment" not in prelude("list").stdout


def test_refusals_are_status_1_and_one_line(prelude, peft_directory):
    wrong = str(peft_directory("wrong", width=9))
    for arguments in (("rm", "no-such"), ("push", wrong, "--id", "wrong"), ("push", wrong, "--id", "Bad Name")):
        result = prelude(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("prelude: ")
        assert result.stderr.count("\n") == 1


def test_api_key(serve, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("k1\n")
    live = serve(api_key_file=keys)
    refused = CliRunner().invoke(cli, ["list", "--url", live.url])
    assert refused.exit_code == 1
    assert "API key" in refused.stderr
    assert CliRunner().invoke(cli, ["list", "--url", live.url, "--api-key", "k1"]).exit_code == 0
    assert CliRunner().invoke(cli, ["list"], env={"PRELUDE_URL": live.url, "PRELUDE_API_KEY": "k1"}).exit_code == 0
