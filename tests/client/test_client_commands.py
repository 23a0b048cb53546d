"""The command line's client commands against a real server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app as cli
from server.client import commands, tables
from server.client import http as http_client
from server.client.http import ClientError, PreludeClient
from server.errors import EngineDeadError, OverloadedError, RequestFailedError
from tests.client.conftest import Data, Get, Ok, Prelude
from tests.support.api_fixtures import PeftDirectory, Serve, UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer

pytestmark = pytest.mark.slow


def test_a_pushed_soft_prompt_is_listed_and_can_be_removed(prelude: Prelude, peft_directory: PeftDirectory) -> None:
    first = str(peft_directory("sentiment"))
    assert prelude("push", first, "--id", "sentiment").stdout.splitlines()[0] == "sentiment@1"
    assert (
        prelude("push", first, "--id", "sentiment").stdout.splitlines()[0]
        == "sentiment@1 (this version has the same bytes; unchanged)"
    )
    second = str(peft_directory("sentiment", seed=1))
    assert prelude("push", second, "--id", "sentiment", "--alias", "canary").stdout.startswith("sentiment@2\n")
    listing = prelude("list").stdout.splitlines()
    assert listing[1].split()[:5] == ["sentiment", "1", "2", "canary=2", "latest=1"]
    refused = prelude("rm", "sentiment@2")
    assert (refused.exit_code, refused.stdout) == (5, "")
    assert "in use by the alias canary" in refused.stderr
    assert "--yes" in refused.stderr
    removed = prelude("rm", "sentiment@2", "--yes").stdout.splitlines()
    assert removed[0] == "deleted sentiment@2 and canary=2"
    assert removed[1].startswith("prelude restore sentiment@2 brings it back until ")
    assert prelude("rm", "sentiment").exit_code == 0
    assert "sentiment" not in prelude("list").stdout


def test_push_sends_every_field(data: Data, get: Get, peft_directory: PeftDirectory) -> None:
    lineage = {"parent": "other@3", "scores": {"f1": 0.5}}
    version = data(
        "push",
        str(peft_directory("sentiment")),
        *("--id", "sentiment", "--description", "of reviews", "--tag", "a", "--tag", "b"),
        *("--metadata", '{"x": 1}', "--lineage", json.dumps(lineage)),
    )
    assert (version["description"], version["tags"], version["metadata"]) == ("of reviews", ["a", "b"], {"x": 1})
    assert version["lineage"] == lineage
    assert (version.pop("changed"), version.pop("warnings")) == ([], [])
    assert version == get("/sentiment/versions/1")


def test_push_overrides_base_and_task(ok: Ok, data: Data, prelude: Prelude, peft_directory: PeftDirectory) -> None:
    directory = peft_directory("sentiment")
    config = directory / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": "org/large"}
    del fields["task_type"]
    config.write_text(json.dumps(fields))
    refused = prelude("push", str(directory), "--id", "sentiment")
    assert refused.exit_code == 4
    assert "--task-type CAUSAL_LM" in refused.stderr
    assert "--allow-other-base" in refused.stderr
    said = ["--allow-other-base", "--task-type", "CAUSAL_LM"]
    version = data("push", str(directory), "--id", "sentiment", *said)
    assert version["overrides"] == {"allow_other_base": True, "task_type": "CAUSAL_LM"}
    assert "allow_other_base=true task_type=CAUSAL_LM" in ok("show", "sentiment@1")
    assert prelude("push", str(directory), "--id", "sentiment", "--task-type", "OTHER").exit_code == 2


def test_push_streams_the_files(live: LiveServer, peft_directory: PeftDirectory) -> None:
    directory = peft_directory("sentiment", rows=4000)
    sizes: list[int] = []
    with PreludeClient(live.url) as client, pytest.raises(ClientError) as refused:
        client.push(directory, name="sentiment", on_bytes=sizes.append)
    assert refused.value.status == 413  # the file is still read to its end
    assert sum(sizes) == sum(path.stat().st_size for path in directory.iterdir())
    assert max(sizes) <= 65536


def test_list_prints_soft_prompts(ok: Ok, data: Data, get: Get, peft_directory: PeftDirectory) -> None:
    for name, tag in (("a", "x"), ("b", "y"), ("c", "x")):
        ok("push", str(peft_directory(name, seed=ord(name))), "--id", name, "--tag", tag)
    assert data("list") == get("")
    assert [prompt["id"] for prompt in data("list", "--tag", "x")["data"]] == ["a", "c"]
    assert data("list", "--limit", "2") == get("?limit=2")
    assert data("list", "--limit", "3") == get("?limit=3")
    assert len(ok("list", "--tag", "y").splitlines()) == 2
    assert data("list", "--tag", "none") == {"object": "list", "data": [], "has_more": False, "last_id": None}


def test_list_reads_every_page(
    data: Data, ok: Ok, peft_directory: PeftDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "_PAGE", 2)
    for name in "abcde":
        ok("push", str(peft_directory(name, seed=ord(name))), "--id", name)
    assert [prompt["id"] for prompt in data("list")["data"]] == list("abcde")
    assert [prompt["id"] for prompt in data("list", "--limit", "3")["data"]] == list("abc")


def test_show_prints_a_version(ok: Ok, data: Data, get: Get, two: None, peft_directory: PeftDirectory) -> None:
    answer = data("show", "sentiment")
    assert answer == {
        "prompt": get("/sentiment"),
        "versions": get("/sentiment/versions?limit=20"),
        "history": get("/sentiment/history?limit=20"),
    }
    text = ok("show", "sentiment")
    assert "latest=2" in text
    assert text.count("publish") == text.count("promote") == 2
    assert "more" not in text
    assert "There are more" in ok("show", "sentiment", "--limit", "1")
    for target, version in (("sentiment@1", 1), ("sentiment@latest", 2)):
        assert data("show", target) == get(f"/sentiment/versions/{version}")
        assert f"sentiment@{version}" in ok("show", target)
    assert get("/sentiment/versions/1")["files"][1]["sha256"] in ok("show", "sentiment@1")


def test_show_prints_scores_and_lineage(ok: Ok, peft_directory: PeftDirectory) -> None:
    lineage = {"training_run": "run-7", "parent": "x@1", "dataset_digest": "d00d", "scores": {"f1": 0.5, "em": 1}}
    text = ["--description", "a [b]c[/b] \x1b[31mred", "--tag", "t1", "--metadata", '{"k": "v"}']
    ok("push", str(peft_directory("s")), "--id", "s", *text, "--lineage", json.dumps(lineage))
    shown = ok("show", "s@1")
    for part in ("a [b]c[/b] ", "t1", '{"k": "v"}', "run-7", "x@1", "d00d", "em=1.0 f1=0.5"):
        assert part in shown
    assert "\x1b" not in shown
    assert "em=1.0 f1=0.5" in ok("show", "s")


def test_piped_output_is_neither_cut_nor_coloured(
    prelude: Prelude, peft_directory: PeftDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    tags = [f"tag-{index:02}-{'x' * 100}" for index in range(12)]
    options = [option for tag in tags for option in ("--tag", tag)]
    prelude("push", str(peft_directory("s")), "--id", "s" * 128, *options)
    for command in ("list", "show"):
        output = prelude(command, *(["s" * 128] if command == "show" else [])).stdout
        assert "\x1b" not in output
        assert any(all(tag in line for tag in tags) for line in output.splitlines())


def test_promote_and_rollback_move_an_alias(ok: Ok, data: Data, get: Get, two: None) -> None:
    assert ok("promote", "sentiment", "1") == "sentiment@latest is version 1\n"
    assert data("promote", "sentiment", "2", "--alias", "stable") == {
        "object": "prompt.alias",
        "id": "sentiment",
        "alias": "stable",
        "version": 2,
        "rollout": None,
    }
    assert ok("promote", "sentiment", "1", "--alias", "stable", "--expect", "2") == "sentiment@stable is version 1\n"
    assert ok("rollback", "sentiment", "--alias", "stable", "--expect", "1") == "sentiment@stable is version 2\n"
    assert data("rollback", "sentiment")["version"] == 2
    assert get("/sentiment")["aliases"] == {"latest": 2, "stable": 2}


def test_pull_writes_the_files(
    ok: Ok, data: Data, get: Get, two: None, peft_directory: PeftDirectory, tmp_path: Path
) -> None:
    for target, seed in (("sentiment@1", 0), ("sentiment", 1), ("sentiment@latest", 1)):
        directory = tmp_path / "new" / target
        version = 2 if seed else 1
        assert ok("pull", target, str(directory)) == f"sentiment@{version} is in {directory}\n"
        for path in peft_directory("sentiment", seed=seed).iterdir():
            assert (directory / path.name).read_bytes() == path.read_bytes()
        assert len(list(directory.iterdir())) == 2
        assert data("pull", target, str(directory)) == get(f"/sentiment/versions/{version}")


def test_pull_does_not_overwrite(prelude: Prelude, ok: Ok, two: None, tmp_path: Path) -> None:
    ok("pull", "sentiment@1", str(tmp_path / "to"))
    weights = tmp_path / "to" / "adapter_model.safetensors"
    before = weights.read_bytes()
    result = prelude("pull", "sentiment@2", str(tmp_path / "to"))
    assert result.exit_code == 1
    assert f"{weights} would be overwritten" in result.stderr
    assert weights.read_bytes() == before
    config = tmp_path / "to" / "adapter_config.json"
    inode = config.stat().st_ino  # identical in both versions, so the file is not rewritten
    ok("pull", "sentiment@2", str(tmp_path / "to"), "--force")
    assert weights.read_bytes() != before
    assert config.stat().st_ino == inode
    assert len(list((tmp_path / "to").iterdir())) == 2


def test_pull_to_an_unusable_directory_is_an_error(prelude: Prelude, two: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = prelude("pull", "sentiment", str(tmp_path / "file"))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    (tmp_path / "to" / "adapter_config.json").mkdir(parents=True)
    result = prelude("pull", "sentiment", str(tmp_path / "to"), "--force")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert not list((tmp_path / "to").glob("*.part")) + list((tmp_path / "to").glob(".*"))


def test_pull_verifies_the_digests(live: LiveServer, two: None, tmp_path: Path) -> None:
    with PreludeClient(live.url) as client:
        version = client.versions("sentiment", limit=1)["data"][0]
        version["files"][1]["sha256"] = "0" * 64
        with pytest.raises(ClientError, match="does not match the server's record"):
            client.pull(version, tmp_path / "to")
        assert list((tmp_path / "to").iterdir()) == []
        version["version"] = 9
        with pytest.raises(ClientError, match="has no version 9") as refused:
            client.pull(version, tmp_path / "to")
        assert refused.value.status == 404
        version["files"] = [{"filename": "../evil", "sha256": "0", "size": 1}]
        client.pull(version, tmp_path / "to")
        assert not (tmp_path / "evil").exists()


def test_inspect_prints_the_servers_answer(ok: Ok, data: Data, get: Get, two: None) -> None:
    assert data("inspect", "sentiment@1", "--top-k", "2") == get("/sentiment/inspect?version=1&top_k=2")
    assert data("inspect", "sentiment") == get("/sentiment/inspect")
    text = ok("inspect", "sentiment")
    assert "sentiment@2" in text
    assert '"a" 1.000  "b" 0.990' in text
    assert "1.5 ± 0.25" in text


def test_inspect_supports_key_values_and_tasks(
    live: LiveServer, ok: Ok, data: Data, prelude: Prelude, other_parts: UploadParts
) -> None:
    for name, parts in (("prefix", other_parts("prefix", peft_type="PREFIX_TUNING")), ("many", other_parts("many"))):
        httpx.post(f"{live.url}/v1/prompts", **parts).raise_for_status()
        assert name in ok("list")
    lines = ok("inspect", "prefix").splitlines()
    assert lines[-1].split() == ["1", "2", "1", "3", "5", "4", "6"]
    assert data("inspect", "many", "--task-id", "2")["task_id"] == 2
    assert prelude("inspect", "many").exit_code == 4


def test_warm_can_pin(ok: Ok, data: Data, get: Get, prelude: Prelude, two: None, engine: FakeEngine) -> None:
    assert ok("warm", "sentiment").startswith("sentiment@2 is warm after 0.0")
    assert ok("warm", "sentiment@1", "--pin").endswith(" s, and pinned\n")
    assert get("/sentiment")["pinned"] == [1]
    assert ok("warm", "sentiment@1", "--unpin") == "sentiment@1 is not pinned\n"
    assert data("warm", "sentiment@latest")["object"] == "prompt.warmed"
    assert len(engine.prepared) == 3
    assert prelude("warm", "sentiment", "--task-id", "0").exit_code == 4


NOT_FOUND = ["show x", "show sentiment@9", "show sentiment@none", "pull sentiment@none {tmp}", "promote sentiment 9"]
NOT_FOUND += [
    "rollback x",
    "rm x",
    "rm sentiment@9",
    "restore x",
    "restore sentiment",
    "restore sentiment@9",
    "inspect sentiment@9",
    "warm x",
    "pull x {tmp}",
    "promote x 1",
]
CONFLICT = ["promote sentiment 1 --expect 1", "rollback sentiment --expect 1"]


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [(line, 3, "prompt_not_found") for line in NOT_FOUND] + [(line, 5, "conflict") for line in CONFLICT],
)
def test_refusals_are_one_line(
    prelude: Prelude, two: None, tmp_path: Path, line: str, status: int, code: str
) -> None:
    arguments = line.format(tmp=tmp_path / "to").split()
    result = prelude(*arguments)
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.startswith("prelude: ")
    assert result.stderr.count("\n") == 1
    as_json = prelude(*arguments, "--json")
    assert as_json.exit_code == status
    assert json.loads(as_json.stdout)["error"]["code"] == code
    assert as_json.stderr == result.stderr


def test_all_faults_of_invalid_files_are_printed(prelude: Prelude, peft_directory: PeftDirectory) -> None:
    directory = peft_directory("wrong", width=9)
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "TOKEN_CLS"}))
    result = prelude("push", str(directory), "--id", "wrong")
    assert result.exit_code == 4
    lines = result.stderr.splitlines()
    assert len(lines) >= 2
    as_json = prelude("push", str(directory), "--id", "wrong", "--json")
    details = json.loads(as_json.stdout)["error"]["details"]
    assert [line.split(": ")[1] for line in lines] == [fault["code"] for fault in details]


@pytest.mark.parametrize(
    "options",
    [["--metadata", "{"], ["--lineage", '{"no": 1}'], ["--tag", "Bad Tag"], ["--id", "tiny"], ["--id", "Bad Name"]],
)
def test_refused_fields_are_status_4_and_one_line(
    prelude: Prelude, peft_directory: PeftDirectory, options: list[str]
) -> None:
    result = prelude("push", str(peft_directory("x")), "--id", "x", *options)
    assert result.exit_code == 4
    assert result.stderr.count("\n") == 1


def test_a_too_large_file_is_refused(prelude: Prelude, peft_directory: PeftDirectory) -> None:
    assert prelude("push", str(peft_directory("large", rows=4000)), "--id", "large").exit_code == 4


@pytest.mark.parametrize(
    ("failure", "status"),
    [(OverloadedError("full"), 7), (EngineDeadError("ended"), 7), (RequestFailedError("cannot be read"), 1)],
)
def test_failures_of_the_server_have_an_exit_status(
    prelude: Prelude,
    two: None,
    engine: FakeEngine,
    failure: Exception,
    status: int,
) -> None:
    engine.inspect_failure = engine.prepare_failure = failure
    assert prelude("inspect", "sentiment").exit_code == status
    assert prelude("warm", "sentiment").exit_code == status


def test_the_api_key_is_an_option_or_a_variable(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k1\n")
    live = serve(api_key_file=keys)
    refused = CliRunner().invoke(cli, ["list", "--url", live.url])
    assert refused.exit_code == 6
    assert "API key" in refused.stderr
    assert "Give a key by --api-key or PRELUDE_API_KEY" in refused.stderr
    wrong = CliRunner().invoke(cli, ["list", "--url", live.url, "--api-key", "k2"])
    assert wrong.exit_code == 6
    assert "The sent key is from --api-key or PRELUDE_API_KEY" in wrong.stderr
    assert "k2" not in wrong.stderr
    assert CliRunner().invoke(cli, ["list", "--url", live.url, "--api-key", "k1"]).exit_code == 0
    assert CliRunner().invoke(cli, ["list"], env={"PRELUDE_URL": live.url, "PRELUDE_API_KEY": "k1"}).exit_code == 0


def test_a_key_without_the_scope_is_refused(serve: Serve, tmp_path: Path, peft_directory: PeftDirectory) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nkey = "r"\ntenant = "a"\nscopes = ["prompts:read"]\n')
    live = serve(api_key_file=keys)
    line = ["push", str(peft_directory("x")), "--id", "x", "--url", live.url, "--api-key", "r"]
    refused = CliRunner().invoke(cli, line)
    assert refused.exit_code == 6
    assert "prompts:write" in refused.stderr
    assert "The sent key is from --api-key or PRELUDE_API_KEY" in refused.stderr


def test_piped_lines_have_no_trailing_space(ok: Ok, peft_directory: PeftDirectory) -> None:
    metadata = json.dumps({"notes": "x" * 2300})
    ok("push", str(peft_directory("s")), "--id", "s", "--metadata", metadata, "--tag", "t")
    ok("push", str(peft_directory("s", seed=1)), "--id", "s", *[f"--tag=t{'y' * 100}{index}" for index in range(20)])
    for command in (["show", "s@1"], ["show", "s"], ["list"], ["inspect", "s"]):
        lines = ok(*command).splitlines()
        assert all(line == line.rstrip() for line in lines)
        assert sum(len(line) > 200 for line in lines) <= 1, "a wide cell must widen only its line"


def test_piped_columns_are_aligned_by_display_width(capsys: pytest.CaptureFixture[str]) -> None:
    table = tables._table("name", "tags", "pinned")
    tables._row(table, "日本語", "a", "1")
    tables._row(table, "abc", "b" * 100, "2")
    tables._row(table, "d", "", "3")
    tables.show("before", table)
    assert capsys.readouterr().out.splitlines() == [
        "before",
        f"name    tags{' ' * 36}  pinned",
        f"日本語  a{' ' * 39}  1",
        f"abc     {'b' * 100}  2",
        f"d       {' ' * 40}  3",
    ]


def test_progress_only_for_large_files_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = commands._PROGRESS_BYTES
    with commands._progress("uploading", large) as on_bytes:
        on_bytes(large)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with commands._progress("uploading", large - 1) as on_bytes:
        on_bytes(large - 1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with commands._progress("uploading", large) as on_bytes:
        on_bytes(large)
    assert "uploading" in capsys.readouterr().err


def test_a_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    table = tables._table("tags")
    tables._row(table, "x" * 100)
    tables.show(table)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(len(line) for line in lines) <= 60
    assert "".join(line.strip() for line in lines[1:]) == "x" * 100  # folded, not cut


def test_an_unreadable_file_is_an_error(prelude: Prelude, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").mkdir()
    result = prelude("push", str(tmp_path), "--id", "x")
    assert result.exit_code == 1
    assert str(Path(tmp_path) / "adapter_config.json") in result.stderr
