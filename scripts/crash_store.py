"""Kill a prompt store repeatedly while it writes, and check its state afterwards.

    python scripts/crash_store.py --rounds 200

Each round starts a process with three threads that upload, promote, roll back and delete as fast as they can. The
process logs the start and the acknowledgement of each operation. SIGKILL ends it at a random moment. The round then
opens the store and compares it with the log. Every acknowledged operation must have taken effect; an operation in
progress may or may not have. Every version must have its files with the right bytes, and no other file may remain.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from prompt_store.errors import PromptNotFoundError
from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, BaseModelSpec, PromptRef

BASE = BaseModelSpec("tiny", 32, 2, 2, 8, 64, "float32")
NUM_THREADS = 3
MAX_LINES_READ = 40
"""Upper bound of the random number of log lines that are read before the kill."""
MAX_DELAY_SECONDS = 0.02
CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


def config_of(number: int) -> bytes:
    """One of five configurations, so that names share blobs, drop them and add them again."""
    return json.dumps({**CONFIG, "note": number % 5}).encode()


def weights_of(number: int) -> bytes:
    """One of seven soft prompts, so that names share blobs."""
    return save({"prompt_embeddings": np.full((4, 32), number % 7, np.float32)})


@dataclass
class Expected:
    """The expected state of one name.

    Attributes:
        versions: SHA-256 of the configuration and weights, by version.
        last_version: The highest version ever assigned.
        aliases: Version by alias.
    """

    versions: dict[int, str] = field(default_factory=dict)
    last_version: int = 0
    aliases: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Expected:
        """Return an independent copy."""
        return Expected(dict(self.versions), self.last_version, dict(self.aliases))

    def apply(self, operation: dict[str, object]) -> None:
        """Update the expected state as the store does for this operation."""
        version = int(str(operation["version"]))
        match operation["what"]:
            case "publish":
                digest = str(operation["digest"])
                same = (number for number, known in self.versions.items() if known == digest)
                version = next(same, self.last_version + 1)
                self.versions.setdefault(version, digest)
                self.last_version = max(self.last_version, version)
                self.aliases["latest"] = version
            case "promote":
                self.aliases["prod"] = version
            case "delete_version":
                del self.versions[version]
                for alias, pointed in list(self.aliases.items()):
                    if pointed == version:
                        del self.aliases[alias]
            case "delete_prompt":
                self.versions.clear()
                self.aliases.clear()


def next_operation(rng: random.Random, state: Expected) -> dict[str, object]:
    """Draw an operation that is valid in this state."""
    choice = rng.random()
    if not state.versions or choice < 0.5:
        number = rng.randrange(35)
        digest = hashlib.sha256(config_of(number) + weights_of(number)).hexdigest()
        return {"what": "publish", "version": 0, "number": number, "digest": digest}
    version = rng.choice(sorted(state.versions))
    if choice < 0.75:
        return {"what": "promote", "version": version}
    return {"what": "delete_version" if choice < 0.95 else "delete_prompt", "version": version}


def perform(store: PromptStore, name: str, operation: dict[str, object]) -> None:
    """Perform the operation on the store."""
    version = int(str(operation["version"]))
    match operation["what"]:
        case "publish":
            number = int(str(operation["number"]))
            with store.upload() as upload:
                for filename, data in (
                    (CONFIG_FILE, config_of(number)),
                    (WEIGHTS_FILE, weights_of(number)),
                ):
                    with upload.open(filename) as file:
                        file.write(data)
                store.publish(upload, name=name, base=BASE)
        case "promote":
            store.set_alias(name, "prod", version)
        case "delete_version":
            store.delete_version(name, version, force=True)
        case "delete_prompt":
            store.delete_prompt(name, force=True)


def write(folder: Path, states: dict[str, Expected], seed: int) -> None:
    """Write to the store until the process is killed; never returns."""
    store = open_store(folder, retention_seconds=0)
    log_lock = threading.Lock()

    def log(event: str, name: str, operation: dict[str, object]) -> None:
        with log_lock:
            print(json.dumps({"event": event, "name": name, "operation": operation}), flush=True)

    def work(name: str, state: Expected) -> None:
        rng = random.Random(f"{seed}-{name}")
        while True:
            operation = next_operation(rng, state)
            log("begin", name, operation)
            try:
                perform(store, name, operation)
            except Exception as error:
                log(f"failed: {error!r}", name, operation)
                raise
            state.apply(operation)
            log("done", name, operation)

    for name, state in states.items():
        threading.Thread(target=work, args=(name, state)).start()


def run_round(folder: Path, states: dict[str, Expected], seed: int) -> int:
    """Start a writer, kill it, and check the store; returns the number of acknowledged operations.

    ``states`` are updated to the state of the store after the kill.

    Raises:
        AssertionError: If something is lost, incomplete, or left behind.
    """
    arguments = {name: vars(state) for name, state in states.items()}
    command = [sys.executable, __file__, "--write", str(folder), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    if process.stdin is None or process.stdout is None:
        raise AssertionError("a pipe is missing")
    process.stdin.write(json.dumps(arguments))
    process.stdin.close()
    rng = random.Random(seed)
    # Each name logs "begin" before "done". With more lines than names, at least one operation is acknowledged.
    num_lines = len(states) + rng.randint(1, MAX_LINES_READ)
    lines = [process.stdout.readline() for _ in range(num_lines)]
    time.sleep(rng.uniform(0, MAX_DELAY_SECONDS))
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    in_progress: dict[str, dict[str, object]] = {}
    num_acknowledged = 0
    for line in lines:
        if not line.endswith("\n"):
            continue  # cut off by the kill
        entry = json.loads(line)
        if entry["event"] == "begin":
            in_progress[entry["name"]] = entry["operation"]
        elif entry["event"] != "done":
            raise AssertionError(f"{entry}")
        else:
            states[entry["name"]].apply(in_progress.pop(entry["name"]))
            num_acknowledged += 1
    check(folder, states, in_progress)
    return num_acknowledged


def check(folder: Path, states: dict[str, Expected], in_progress: dict[str, dict[str, object]]) -> None:
    """Compare a killed store with the acknowledged operations.

    ``states`` are updated with the operations in progress that took effect.
    """
    store = open_store(folder, retention_seconds=0)
    digests: set[str] = set()
    try:
        for name, before in states.items():
            found = observe(store, name, before.last_version, digests)
            possible = [before]
            if name in in_progress:
                after = before.copy()
                after.apply(in_progress[name])
                possible.append(after)
            for state in possible:
                if (found.versions, found.aliases) == (state.versions, state.aliases):
                    states[name] = state
                    break
            else:
                raise AssertionError(f"{name} is {found}, expected one of {possible}")
    finally:
        store.close()
    blobs = {path.name for path in (folder / "blobs").rglob("*") if path.is_file()}
    if blobs != digests:
        raise AssertionError(f"unreferenced blobs: {blobs - digests}; missing blobs: {digests - blobs}")
    for left in ("staging", "quarantine"):
        rest = [path for path in (folder / left).rglob("*") if path.is_file()]
        if rest:
            raise AssertionError(f"files left behind: {rest}")


def observe(store: PromptStore, name: str, last_version: int, digests: set[str]) -> Expected:
    """Read the state of a name from the store, and add its blobs to ``digests``."""
    found = Expected(last_version=last_version)
    for number in range(1, last_version + 2):
        try:
            version = store.resolve(PromptRef(name, version=number, alias=None))
        except PromptNotFoundError:
            continue
        config, weights = (
            store.read_file(name, number, filename)
            for filename in ("adapter_config.json", "adapter_model.safetensors")
        )
        found.versions[number] = hashlib.sha256(config + weights).hexdigest()
        digests.update(file.sha256 for file in version.files)
    if found.versions:
        found.aliases = dict(store.get_prompt(name).aliases)
    return found


def run_rounds(folder: Path, rounds: int, seed: int, *, is_quiet: bool = False) -> int:
    """Run rounds on one store; returns the total number of acknowledged operations.

    Raises:
        AssertionError: If a round finds a fault in the store.
    """
    states = {f"name-{index}": Expected() for index in range(NUM_THREADS)}
    total = 0
    for number in range(rounds):
        acknowledged = run_round(folder, states, seed + number)
        total += acknowledged
        if not is_quiet:
            stored = sum(len(state.versions) for state in states.values())
            print(f"round {number + 1}: {acknowledged} operations acknowledged, {stored} versions stored", flush=True)
    return total


def main() -> None:
    """Run the rounds, or, with ``--write``, write until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        states = {
            name: Expected(
                {int(number): digest for number, digest in values["versions"].items()},
                values["last_version"],
                values["aliases"],
            )
            for name, values in json.load(sys.stdin).items()
        }
        write(arguments.write, states, arguments.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        total = run_rounds(Path(folder) / "store", arguments.rounds, arguments.seed)
    print(f"{arguments.rounds} rounds, {total} operations acknowledged, nothing lost, nothing left behind")


if __name__ == "__main__":
    main()
