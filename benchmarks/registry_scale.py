"""Compare catalogs with 100,000 and with 1,000 registered soft prompts.

    python -m benchmarks.registry_scale [--catalog postgresql://...]

Names are inserted into the tables in bulk, because 100,000 uploads would take too long. The measured operations go
through ``PromptStore``, like those of a request, alternately on the two stores: resolve an uncached reference, list a
page of 100 names, list a page of 100 names by a tag that every second name has, list 100 changes of all names (of a
tenant, of a key, of a kind since a time), upload, promote. The memory of a process that has opened a store and
resolved 2,000 names is measured too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from safetensors.numpy import save

from prompt_store.catalog.database import Database
from prompt_store.catalog.schema import aliases, blobs, history, prompts, tags, version_files, versions
from prompt_store.changes import HistoryAction, HistoryFilter
from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import Access, BaseModelSpec, PromptRef

BASE = BaseModelSpec("tiny", 32, 2, 2, 8, 64, "float32")
CONFIG = json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}).encode()
_BATCH = 5_000


def name_of(index: int) -> str:
    """A name with a hash prefix, so that sorted names are in random order of their index."""
    return f"{hashlib.sha256(str(index).encode()).hexdigest()[:12]}-{index}"


def history_of(index: int) -> list[dict[str, object]]:
    """The two entries of a name's upload, a second after those of the name before, by one of a hundred keys."""
    entry: dict[str, object] = {"revision": 0, "name": name_of(index), "version": 1, "at": index * 1_000_000}
    entry["actor"] = f"key-{index % 100}"
    return [
        {**entry, "id": 2 * index - 1, "action": "publish", "alias": None},
        {**entry, "id": 2 * index, "action": "promote", "alias": "latest"},
    ]


def register(url: str, count: int) -> None:
    """Write ``count`` names of one version each into a catalog's tables."""
    database = Database(url)
    config = hashlib.sha256(CONFIG).hexdigest()
    for first in range(0, count, _BATCH):
        ids = range(first + 1, min(first + _BATCH, count) + 1)
        digest = {index: hashlib.sha256(f"weights {index}".encode()).hexdigest() for index in ids}
        rows: list[tuple[sa.Table, list[dict[str, object]]]] = [
            (prompts, [{"id": i, "name": name_of(i), "last_version": 1, "num_versions": 1} for i in ids]),
            (
                versions,
                [
                    {
                        "id": i,
                        "prompt_id": i,
                        "version": 1,
                        "digest": digest[i],
                        "peft_type": "PROMPT_TUNING",
                        "task_type": "CAUSAL_LM",
                        "num_virtual_tokens": 4,
                        "dtype": "F32",
                        "description": "",
                        "metadata": "{}",
                        "lineage": "{}",
                        "created_at": 0,
                    }
                    for i in ids
                ],
            ),
            (blobs, [{"sha256": digest[i], "size": 600} for i in ids]),
            (history, [row for i in ids for row in history_of(i)]),
            (aliases, [{"prompt_id": i, "alias": "latest", "version": 1} for i in ids]),
            (tags, [{"version_id": i, "tag": "even", "name": name_of(i)} for i in ids if i % 2 == 0]),
            (
                version_files,
                [
                    {"version_id": i, "filename": filename, "sha256": sha256}
                    for i in ids
                    for filename, sha256 in (
                        ("adapter_config.json", config),
                        ("adapter_model.safetensors", digest[i]),
                    )
                ],
            ),
        ]
        with database.writing() as connection:
            if first == 0:
                connection.execute(blobs.insert(), [{"sha256": config, "size": len(CONFIG)}])
            for table, values in rows:
                connection.execute(table.insert(), values)
    with database.writing() as connection:
        if database.is_shared:
            # Rows inserted with explicit ids do not advance the sequences.
            for name, used in (("prompts", count), ("versions", count), ("history", 2 * count)):
                connection.exec_driver_sql(f"SELECT setval('{name}_id_seq', {used + 1})")
        connection.exec_driver_sql("ANALYZE")
    database.close()


def upload(store: PromptStore, name: str, number: int) -> None:
    """Publish a new soft prompt."""
    with store.upload() as staged:
        for filename, data in (
            ("adapter_config.json", CONFIG),
            ("adapter_model.safetensors", save({"prompt_embeddings": np.full((4, 32), number, np.float32)})),
        ):
            with staged.open(filename) as file:
                file.write(data)
        store.publish(staged, name=name, base=BASE, alias="candidate")


def operations(store: PromptStore, count: int, rng: random.Random) -> dict[str, Callable[[int], object]]:
    """The timed operations by name; each takes the index of the repetition."""
    order = list(range(1, count + 1))
    rng.shuffle(order)
    # Pages start in the first half of the names, so that every page is full.
    starts = rng.sample(sorted(map(name_of, order))[: count // 2], count // 2)
    return {
        "resolve": lambda turn: store.resolve(PromptRef.parse(name_of(order[turn % count]))),
        "list a page": lambda turn: store.list_prompts(100, after=starts[turn % len(starts)]),
        "list a page by tag": lambda turn: store.list_prompts(100, after=starts[turn % len(starts)], tag="even"),
        "list the history": lambda turn: store.registry.list_history(HistoryFilter(), before=count + turn % count),
        "list the history of a tenant": lambda turn: store.registry.list_history(
            HistoryFilter(), before=count + turn % count, access=Access("t")
        ),
        "list the history of a key": lambda turn: store.registry.list_history(
            HistoryFilter(actor=f"key-{turn % 100}"), limit=10
        ),
        "list the history of an action since a time": lambda turn: store.registry.list_history(
            HistoryFilter(action=HistoryAction.PUBLISH, since=(count - 500) * 1_000_000)
        ),
        "publish": lambda turn: upload(store, name_of(order[turn % count]), turn),
        "promote": lambda turn: store.set_alias(name_of(order[turn % count]), f"a{turn}", 1),
    }


def resident_mib(location: str, catalog: str, count: int) -> float:
    """Memory of a separate process that opens the store and resolves 2,000 names."""
    code = (
        "import sys, random, psutil\n"
        "from benchmarks.registry_scale import name_of\n"
        "from prompt_store.open_store import open_store\n"
        "from prompt_store.types import PromptRef\n"
        "store = open_store(sys.argv[1], catalog_url=sys.argv[2])\n"
        "rng = random.Random(0)\n"
        "for _ in range(2000): store.resolve(PromptRef.parse(name_of(rng.randint(1, int(sys.argv[3])))))\n"
        "store.totals(); print(psutil.Process().memory_info().rss / 2**20)\n"
    )
    command = [sys.executable, "-c", code, location, catalog, str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--catalog", help="URL of a PostgreSQL server for two new databases; default: SQLite")
    arguments = parser.parse_args()
    counts = {"small": arguments.small, "large": arguments.large}
    with tempfile.TemporaryDirectory() as folder:
        urls = {which: f"sqlite:///{folder}/{which}/catalog.sqlite3" for which in counts}
        for which in counts:
            (Path(folder) / which).mkdir()
        made: list[str] = []
        if arguments.catalog:
            server = sa.create_engine(
                sa.make_url(arguments.catalog).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
            )
            for which in counts:
                made.append(f"prelude_bench_{uuid.uuid4().hex[:8]}")
                with server.connect() as connection:
                    connection.exec_driver_sql(f'CREATE DATABASE "{made[-1]}"')
                urls[which] = (
                    sa.make_url(arguments.catalog).set(database=made[-1]).render_as_string(hide_password=False)
                )
        try:
            figures = measure(folder, urls, counts, arguments.turns)
        finally:
            for name in made:
                with server.connect() as connection:
                    connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
    print(json.dumps(figures, indent=2))


def measure(folder: str, urls: dict[str, str], counts: dict[str, int], turns: int) -> dict[str, object]:
    """Measure both stores; returns all figures."""
    for which, count in counts.items():
        started = time.perf_counter()
        register(urls[which], count)
        print(f"{count} names registered in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    memory = {which: resident_mib(f"{folder}/{which}", urls[which], count) for which, count in counts.items()}
    stores = {which: open_store(f"{folder}/{which}", catalog_url=urls[which]) for which in counts}
    timed = {which: operations(stores[which], count, random.Random(0)) for which, count in counts.items()}
    figures: dict[str, object] = {
        "catalog": "PostgreSQL" if "postgresql" in urls["small"] else "SQLite",
        "cores": os.cpu_count(),
        "resident_mib": {which: round(size, 1) for which, size in memory.items()},
    }
    for name in timed["small"]:
        seconds: dict[str, list[float]] = {which: [] for which in counts}
        for turn in range(turns):
            for which in counts:
                started = time.perf_counter()
                timed[which][name](turn)
                seconds[which].append(time.perf_counter() - started)
        medians = {which: statistics.median(values) for which, values in seconds.items()}
        figures[name] = {
            **{f"{which}_ms": round(1000 * value, 3) for which, value in medians.items()},
            "large_over_small": round(medians["large"] / medians["small"], 2),
        }
    for store in stores.values():
        store.close()
    return figures


if __name__ == "__main__":
    main()
