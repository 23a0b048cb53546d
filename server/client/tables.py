"""Tables of the client commands. Piped output is neither truncated nor coloured; control characters are replaced."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prompt_store.types import PromptKind

_GAP = "  "
_MAX_PADDED = 40
"""Maximum width of a padded column; a wider cell shifts only its own line."""


def show(*parts: Table | str) -> None:
    """Print to standard output: tables that fit a terminal, or plain lines if it is not a terminal."""
    console = Console(highlight=False) if sys.stdout.isatty() else None
    for part in parts:
        if console is None:
            for line in [clean(part)] if isinstance(part, str) else _lines(part):
                typer.echo(line)
        elif isinstance(part, str):
            console.print(Text(clean(part)), soft_wrap=True)  # no markup, no added line ends
        else:
            console.print(part)


def _lines(table: Table) -> Iterator[str]:
    """The lines of a table, with aligned columns and without trailing spaces."""
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    if table.show_header:
        rows.insert(0, tuple(str(column.header) for column in table.columns))
    widths = [min(_MAX_PADDED, max(map(cell_len, column), default=0)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * max(0, width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        yield _GAP.join(cells).rstrip()


def clean(text: object) -> str:
    """Replace control characters: a description may come from anyone, and must not control the terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def prompts(data: Iterable[Mapping[str, Any]]) -> Table:
    """Soft prompts, one per line."""
    table = _table(
        "name", "version", "versions", "aliases", "type", "virtual tokens", "rank", "bytes", "tags", "pinned"
    )
    for prompt in data:
        latest = prompt["latest"]
        _row(
            table,
            prompt["id"],
            latest["version"],
            prompt["num_versions"],
            _aliases(prompt),
            latest["peft_type"],
            _positions(latest),
            _shown(latest["rank"]),
            latest["size"],
            " ".join(latest["tags"]),
            _numbers(prompt["pinned"]),
        )
    return table


def prompt(summary: Mapping[str, Any], page: Mapping[str, Any], history: Mapping[str, Any]) -> Iterator[Table | str]:
    """One soft prompt with its versions and its history."""
    yield _fields(
        name=summary["id"],
        aliases=_aliases(summary),
        versions=summary["num_versions"],
        pinned=_numbers(summary["pinned"]),
    )
    headings = (
        "version",
        "aliases",
        "created",
        "type",
        "virtual tokens",
        "rank",
        "bytes",
        "tags",
        "parent",
        "scores",
    )
    table = _table(*headings)
    for version in page["data"]:
        named = [alias for alias, number in sorted(summary["aliases"].items()) if number == version["version"]]
        _row(
            table,
            version["version"],
            " ".join(named),
            _time(version["created_at"]),
            version["peft_type"],
            _positions(version),
            _shown(version["rank"]),
            version["size"],
            " ".join(version["tags"]),
            version["lineage"].get("parent", ""),
            _pairs(version["lineage"].get("scores", {})),
        )
    yield from ("", table)
    yield from ("", changes(history["data"], with_name=False))
    if page["has_more"] or history["has_more"]:
        yield "There are more: give a higher --limit."


def _aliases(prompt: Mapping[str, Any]) -> str:
    """The aliases of a soft prompt, with the shares of their canaries and shadows."""
    shown = []
    for alias, version in sorted(prompt["aliases"].items()):
        rollout = prompt.get("rollouts", {}).get(alias) or {}
        parts = [f"{percent:g}% {canary}" for canary, percent in (rollout.get("canaries") or {}).items()]
        shadow = rollout.get("shadow")
        parts += [f"shadow {shadow['version']}"] if shadow else []
        shown.append(f"{alias}={version}" + (f" ({', '.join(parts)})" if parts else ""))
    return " ".join(shown)


def changes(data: Iterable[Mapping[str, Any]], *, with_name: bool = True) -> Table:
    """Changes, one per line."""
    headings = ("when", *(["name"] if with_name else []), "what", "alias", "version", "before", "by", "why")
    table = _table(*headings)
    for change in data:
        what = change["action"] + (" (imported)" if change["imported"] else "")
        if change["action"] == "edit":
            what += f": {', '.join(sorted(change['details']))}"
        _row(
            table,
            _time(change["created_at"]),
            *([change["prompt_id"] or ""] if with_name else []),
            what,
            *("" if change[key] is None else change[key] for key in ("alias", "version", "previous_version")),
            f"{change['actor_name']} ({change['actor']})" if change["actor_name"] else change["actor"] or "",
            change["reason"] or "",
        )
    return table


def pushed(version: Mapping[str, Any], *, created: bool) -> str:
    """The result of an upload."""
    name = f"{version['id']}@{version['version']}"
    if created:
        return name
    edited = ", ".join(version["changed"])
    return f"{name} (this version has the same bytes; {f'changed: {edited}' if edited else 'unchanged'})"


def version(record: Mapping[str, Any]) -> Iterator[Table | str]:
    """One version."""
    lineage = record["lineage"]
    yield _fields(
        name=f"{record['id']}@{record['version']}",
        description=record["description"],
        type=record["peft_type"],
        task=record["task_type"],
        tasks=record["num_tasks"],
        labels=record["num_labels"],
        virtual_tokens=_positions(record),
        rank=record["rank"],
        modules=record["num_modules"],
        parameters=record["num_parameters"],
        targets=" ".join(record["targets"]),
        over=record["over"],
        dtype=record["dtype"],
        base=record["base_model_name_or_path"],
        format=_format(record.get("format")),
        overrides=_pairs({key: json.dumps(value).strip('"') for key, value in record["overrides"].items()}),
        tags=" ".join(record["tags"]),
        metadata=json.dumps(record["metadata"]) if record["metadata"] else None,
        parent=lineage.get("parent"),
        training_run=lineage.get("training_run"),
        dataset=lineage.get("dataset_digest"),
        scores=_pairs(lineage.get("scores", {})),
        created=_time(record["created_at"]),
        by=record["created_by"],
        owner=record["owner"],
        pinned="yes" if record["pinned"] else "no",
    )
    table = _table("file", "bytes", "sha256")
    for file in record["files"]:
        _row(table, file["filename"], file["size"], file["sha256"])
    yield from ("", table)


def inspection(found: Mapping[str, Any]) -> Iterator[Table | str]:
    """Norms and nearest tokens, or changed modules."""
    yield _fields(
        name=f"{found['id']}@{found['version']}",
        type=found["peft_type"],
        task_id=found["task_id"],
        virtual_tokens=_positions(found),
    )
    if found["modules"] is not None:
        table = _table("module", "rank", "scale", "Frobenius norm", "spectral norm", "share of the weight's norm")
        for module in found["modules"]:
            numbers = (module[key] for key in ("scale", "frobenius_norm", "spectral_norm", "share"))
            _row(table, module["name"], module["rank"], *(f"{number:.4g}" for number in numbers))
    elif found["tokens"] is not None:
        vocabulary = found["vocabulary"]
        mean, std = vocabulary["norm_mean"], vocabulary["norm_std"]
        yield f"norm of the vocabulary's embeddings: {mean:.4g} ± {std:.4g}"
        table = _table("token", "norm", "nearest (cosine similarity)")
        for token in found["tokens"]:
            near = [
                f"{json.dumps(item['text'], ensure_ascii=False)} {item['similarity']:.3f}"
                for item in token["nearest"]
            ]
            _row(table, token["index"], f"{token['norm']:.4g}", "  ".join(near))
    else:
        table = _table("layer", "keys: mean norm", "min", "max", "values: mean norm", "min", "max")
        for layer in found["layers"]:
            norms = [layer[part][which] for part in ("keys", "values") for which in ("mean", "min", "max")]
            _row(table, layer["index"], *(f"{norm:.4g}" for norm in norms))
    yield from ("", table)


def training(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """The result of a training."""
    published = result.get("published")
    check = published and published["golden_check"]
    values = "logits" if result.get("task_type") == "seq-cls" else "tokens"
    yield _fields(
        name=f"{published['id']}@{published['version']}" if published else result["name"],
        alias=published and published["alias"],
        method=result["method"],
        steps=f"{result['steps']}, best after {result['best_step']}",
        seconds=result["seconds"],
        files=result["adapter"],
        golden_check=check
        and f"{check['largest_difference']:.2g} nats from PEFT at most, over {check['tokens']} {values}",
    )
    if any(result["scores"].values()):
        table = _table("held out", "accuracy", "loss")
        for name, scores in result["scores"].items():
            _row(table, name, f"{scores['accuracy']:.3f}", f"{scores['loss']:.4f}")
        yield from ("", table)


def deleted(target: str, reply: Mapping[str, Any]) -> Iterator[str]:
    """A deletion, and until when it can be undone."""
    also = f" and {_pairs(reply['aliases'])}" if reply["aliases"] else ""
    yield f"deleted {target}{also}"
    if reply.get("ended_rollouts"):
        yield f"ended the rollout of {' '.join(reply['ended_rollouts'])}"
    if reply["restorable_until"] is not None:
        yield f"prelude restore {target} brings it back until {_time(reply['restorable_until'])}"


def restored(reply: Mapping[str, Any]) -> Iterator[str]:
    """Restored versions and aliases."""
    versions = (f"{reply['id']}@{version}" for version in reply["versions"])
    yield f"restored {' '.join(versions)}"
    if reply["aliases"]:
        yield f"aliases: {_pairs(reply['aliases'])}"
    if reply["kept_aliases"]:
        yield f"not moved, because they exist again: {_pairs(reply['kept_aliases'])}"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(Text(clean(cell)) for cell in cells))


def _fields(**fields: object) -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in range(2):
        grid.add_column(overflow="fold")
    for name, value in fields.items():
        if value not in (None, ""):
            _row(grid, name.replace("_", " "), value)
    return grid


def _format(value: Mapping[str, Any] | None) -> str | None:
    """A prompt format in one line."""
    if value is None:
        return None
    others = {key: json.dumps(item) for key, item in value.items() if key != "type"}
    return f"{value['type']} {_pairs(others)}".rstrip()


def _pairs(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(values.items()))


def _positions(version: Mapping[str, Any]) -> object:
    """The number of virtual tokens; an adapter has none."""
    return "" if version["kind"] == PromptKind.ADAPTER else version["num_virtual_tokens"]


def _shown(value: object) -> object:
    return "" if value is None else value


def _numbers(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
