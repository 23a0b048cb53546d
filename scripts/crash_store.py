"""Kill a writing prompt store again and again, and look at what is left.

    python scripts/crash_store.py --rounds 200

Each round starts a process that uploads, promotes, rolls back and deletes in three threads, as fast as it can, and
writes down what it begins and what was acknowledged. It is killed with SIGKILL at a random moment. Then the store is
opened and held against the notes: everything acknowledged is there (the one operation of each thread that was under
way may or may not be), every version has its files with the right bytes, and nothing else lies around.
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
"""Upper bound of the random number of notes that are read before the kill."""
MAX_DELAY_SECONDS = 0.02
CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


def config_of(number: int) -> bytes:
    """Few of them, so that names share blobs, lose them and get them again."""
    return json.dumps({**CONFIG, "note": number % 5}).encode()


def weights_of(number: int) -> bytes:
    """Another soft prompt for each number below 7."""
    return save({"prompt_embeddings": np.full((4, 32), number % 7, np.float32)})


@dataclass
class Expected:
    """What one name has to look like.

    Attributes:
        versions: sha256 of the weights by version.
        last_version: The highest that there ever was.
        aliases: Version by alias.
    """

    versions: dict[int, str] = field(default_factory=dict)
    last_version: int = 0
    aliases: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Expected:
        """One that can be changed by itself."""
        return Expected(dict(self.versions), self.last_version, dict(self.aliases))

    def apply(self, operation: dict[str, object]) -> None:
        """Do to it what an operation does to the store."""
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
                        if alias == "latest" and self.versions:
                            self.aliases[alias] = max(self.versions)
            case "delete_prompt":
                self.versions.clear()
                self.aliases.clear()


def next_operation(rng: random.Random, state: Expected) -> dict[str, object]:
    """Something that can be done to a name in this state."""
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
    """Do it."""
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
            store.delete_version(name, version)
        case "delete_prompt":
            store.delete_prompt(name)


def write(folder: Path, states: dict[str, Expected], seed: int) -> None:
    """The process that is killed: never returns by itself."""
    store = open_store(folder)
    saying = threading.Lock()

    def say(event: str, name: str, operation: dict[str, object]) -> None:
        with saying:
            print(json.dumps({"event": event, "name": name, "operation": operation}), flush=True)

    def work(name: str, state: Expected) -> None:
        rng = random.Random(f"{seed}-{name}")
        while True:
            operation = next_operation(rng, state)
            say("begin", name, operation)
            try:
                perform(store, name, operation)
            except Exception as error:
                say(f"failed: {error!r}", name, operation)
                raise
            state.apply(operation)
            say("done", name, operation)

    for name, state in states.items():
        threading.Thread(target=work, args=(name, state)).start()


def run_round(folder: Path, states: dict[str, Expected], seed: int) -> int:
    """One life of a writer; ``states`` become what is left. Returns how many operations were acknowledged.

    Raises:
        AssertionError: If something is lost, half there, or left behind.
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
    # Each name begins an operation and then acknowledges it: one more line than names is an acknowledgement.
    num_lines = len(states) + rng.randint(1, MAX_LINES_READ)
    lines = [process.stdout.readline() for _ in range(num_lines)]
    time.sleep(rng.uniform(0, MAX_DELAY_SECONDS))
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    under_way: dict[str, dict[str, object]] = {}
    num_acknowledged = 0
    for line in lines:
        if not line.endswith("\n"):
            continue  # cut off by the kill
        note = json.loads(line)
        if note["event"] == "begin":
            under_way[note["name"]] = note["operation"]
        elif note["event"] != "done":
            raise AssertionError(f"{note}")
        else:
            states[note["name"]].apply(under_way.pop(note["name"]))
            num_acknowledged += 1
    check(folder, states, under_way)
    return num_acknowledged


def check(folder: Path, states: dict[str, Expected], under_way: dict[str, dict[str, object]]) -> None:
    """Hold a store that was killed against what was acknowledged; takes over what was done of the rest."""
    store = open_store(folder)
    digests: set[str] = set()
    try:
        for name, before in states.items():
            found = observe(store, name, before.last_version, digests)
            possible = [before]
            if name in under_way:
                after = before.copy()
                after.apply(under_way[name])
                possible.append(after)
            for state in possible:
                if (found.versions, found.aliases) == (state.versions, state.aliases):
                    states[name] = state
                    break
            else:
                raise AssertionError(f"{name} is {found}, not one of {possible}")
    finally:
        store.close()
    blobs = {path.name for path in (folder / "blobs").rglob("*") if path.is_file()}
    if blobs != digests:
        raise AssertionError(f"blobs without a name: {blobs - digests}; without bytes: {digests - blobs}")
    for left in ("staging", "quarantine"):
        rest = [path for path in (folder / left).rglob("*") if path.is_file()]
        if rest:
            raise AssertionError(f"left behind: {rest}")


def observe(store: PromptStore, name: str, last_version: int, digests: set[str]) -> Expected:
    """What the store has of a name; adds the blobs that it names to ``digests``."""
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
    """So many lives of one store; returns how many operations were acknowledged in all.

    Raises:
        AssertionError: As ``run_round`` does.
    """
    states = {f"name-{index}": Expected() for index in range(NUM_THREADS)}
    total = 0
    for number in range(rounds):
        acknowledged = run_round(folder, states, seed + number)
        total += acknowledged
        if not is_quiet:
            held = sum(len(state.versions) for state in states.values())
            print(f"round {number + 1}: {acknowledged} operations acknowledged, {held} versions held", flush=True)
    return total


def main() -> None:
    """Write until killed, or run the rounds."""
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
