"""The documents say what the code does."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from server.cli import FLAGS, app
from server.client.commands import ExitStatus
from tests.metrics.test_metrics import make_used

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_flag_is_documented_with_its_variable_and_default() -> None:
    rows = {
        cells[0]: cells[1:]
        for line in (ROOT / "docs" / "configuration.md").read_text().splitlines()
        if line.startswith("| `--") and (cells := [cell.strip().strip("`") for cell in line.strip("|").split("|")])
    }
    for flag in FLAGS:
        name = f"--{flag.name.replace('_', '-')}"
        assert name in rows, f"docs/configuration.md lacks {name}"
        variable, default = rows[name][0], rows[name][1]
        assert variable == flag.variable
        shown = "required" if flag.default is ... else "-" if flag.default is None else str(flag.default)
        assert default == shown, f"{name}: the default is {shown}"
    assert len(rows) == len(FLAGS), "docs/configuration.md documents a flag that does not exist"


def test_every_client_command_is_documented_with_its_options_and_exit_codes() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    rows = {found[1]: line for line in text.splitlines() if (found := re.match(r"\| `prelude (\w+) ?.*", line))}
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert rows.keys() == commands.keys() - {"serve", "demo"}
    for name, row in rows.items():
        for parameter in commands[name].params:
            for option in [*parameter.opts, *parameter.secondary_opts]:
                if option.startswith("--") and option != "--help":
                    assert option in row or f"| `{option}` |" in text, f"docs/commands.md lacks {name} {option}"
    codes = [int(code) for code in re.findall(r"^\| (\d) \|", text, re.MULTILINE)]
    assert codes == [status.value for status in ExitStatus]


def examples_of_commands() -> list[list[str]]:
    """The arguments of every ``prelude`` line in the documents' shell examples."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"^(?:if ! )?(?:\.venv/bin/)?prelude (.*?)(?: > .*)?$", line.strip())
                if match:
                    found.append(shlex.split(match[1], comments=True))
    return found


@pytest.mark.parametrize("arguments", examples_of_commands(), ids=" ".join)
def test_commands_in_examples_can_be_parsed(arguments: list[str], tmp_path: Path) -> None:
    group = get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    rest = [str(tmp_path) if "/" in argument and argument[0] not in "-{h" else argument for argument in arguments[1:]]
    with command.make_context(arguments[0], rest):
        pass


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_make_targets_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    for command in re.findall(r"^(?:    )?make ([a-z -]+?)(?:\s+#.*| ARGS.*)?$", text, re.MULTILINE):
        assert set(command.split()) <= make_targets(), f"{document.name} names make {command}"


def test_every_metric_is_documented_with_its_type_labels_and_help() -> None:
    text, _ = make_used().render("")
    families = [
        family
        for family in text_string_to_metric_families(text.decode())
        if family.name.startswith("prelude_") and "_created" not in family.name
    ]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in (ROOT / "docs" / "operations.md").read_text().splitlines()
        if line.startswith("| `prelude_")
    ]
    expected = []
    for family in families:
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        shown = ", ".join(f"`{label}`" for label in labels)
        expected.append((f"`{name}`", family.type, shown or "-", family.documentation))
    assert sorted(rows) == sorted(expected)


def test_every_test_that_security_names_exists() -> None:
    table = (ROOT / "docs" / "security.md").read_text().split("## Known attacks")[1].split("\n## ")[0]
    rows = [
        line for line in table.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| class"))
    ]
    assert rows
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test is named: {row[:60]}"
        for file, function in named:
            text = (ROOT / file).read_text()
            assert re.search(rf"^(async )?def {function}\(", text, re.MULTILINE), f"{file} has no {function}"


def test_the_tree_names_files_that_exist() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("```")[1]
    names = set(re.findall(r"\b([a-z_]+\.py)\b", tree))
    assert names
    existing = {path.name for folder in ("server", "prompt_store") for path in (ROOT / folder).rglob("*.py")}
    assert names <= existing


def names_in(file: Path) -> set[str]:
    """Functions and classes of a module, and methods as ``Class.method``."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
    return names


def test_architecture_names_functions_that_exist() -> None:
    text = " ".join((ROOT / "docs" / "architecture.md").read_text().split())
    named = re.findall(r"((?:`[\w.]+`(?:, | or | and )?)+) \(`([\w/]+\.py)`\)", text)
    assert len(named) == text.count(".py`)"), "each file must follow the functions that it contains"
    for functions, file in named:
        known = names_in(ROOT / file)
        for function in re.findall(r"`([\w.]+)`", functions):
            assert function in known, f"{file} has no {function}"


def test_architecture_describes_each_path_in_at_most_ten_steps() -> None:
    _, *paths = re.split(r"^## ", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert [path.splitlines()[0] for path in paths] == [
        "A request, from the route to the first token",
        "An upload, from the route to the catalog",
        "A soft prompt, from the blob to its blocks",
    ]
    for path in paths:
        assert 1 <= len(re.findall(r"^\d+\. ", path, re.MULTILINE)) <= 10


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("server", "prompt_store", "tests", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert long == {}


def test_no_folder_has_more_than_16_modules() -> None:
    folders = {
        path.parent
        for root in ("server", "prompt_store")
        for path in (ROOT / root).rglob("*.py")
        if path.name != "__init__.py"
    }
    counts = {folder: sum(path.name != "__init__.py" for path in folder.glob("*.py")) for folder in folders}
    assert {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > 16} == {}
