"""Judge the GPU path with one call: kernels, tests, and speed against the device's ceilings.

    python -m scripts.gpu.check --out DIR [--seconds 480] [--wheels build/gpu-wheels] [--only PART ...] [--dry]

Needs a GPU of at least 80 GB, torch, Triton, transformers, pytest and pytest-timeout; ``--wheels`` adds what
``scripts/gpu/wheels.sh`` packed, without a network. Parts run one after another in separate processes. Each appends
its figures to ``DIR/figures.jsonl`` as they are measured, and its output to ``DIR/PART.log``. A part that fails or
exceeds its time does not stop the others. What a part leaves of its time is added to that of the later ones.

The exit status is 0 if all parts ran and all targets hold. ``--dry`` runs all parts with a tiny model on a CPU: the
kernels in Triton's interpreter, the rest with torch's attention; targets of speed are not judged then.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.gpu.results import Figure, Results, read_figures, table

ROOT = Path(__file__).parents[2]
BUDGETS = {
    "ceilings": 30,
    "kernels": 70,
    "tests": 120,
    "steps": 70,
    "adapters": 60,
    "mixed": 50,
    "loads": 40,
    "peers": 40,
}
"""Seconds of each part of a check of 480 seconds, imports included; they scale with ``--seconds``."""

FIGURES = "figures.jsonl"


def allowed_seconds(part: str, parts: Sequence[str], left: float, total: float) -> float:
    """Seconds for a part: all that are left, except the budgets of the later parts.

    Args:
        part: The part that starts.
        parts: All parts of the check, in order.
        left: Seconds that are left.
        total: Seconds of the whole check.
    """
    scale = total / sum(BUDGETS[name] for name in parts)
    later = parts[list(parts).index(part) + 1 :]
    return left - scale * sum(BUDGETS[name] for name in later)


def run_part(command: Sequence[str], log: Path, environment: dict[str, str], seconds: float) -> str:
    """Run a part, and kill it and its children at the end of its time; returns how it ended."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(0.0, seconds))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # pytest has workers
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"did not end in {seconds:.0f} s"
            raise
    return "ran" if status == 0 else f"failed with status {status}"


def check(out: Path, parts: Sequence[str], seconds: float, *, is_dry: bool, wheels: Path | None) -> list[Figure]:
    """Run the parts; returns all figures, with one named "ran" for each part.

    Args:
        out: An existing folder for the results.
        parts: Names of parts, in order.
        seconds: For all of them.
        is_dry: Whether to rehearse on a CPU.
        wheels: A folder of wheels to install first; None for none.

    Raises:
        subprocess.CalledProcessError: If the wheels cannot be installed.
    """
    figures_path = out / FIGURES
    figures_path.unlink(missing_ok=True)
    end = time.monotonic() + seconds
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths(out, wheels)), "PYTHONUNBUFFERED": "1"}
    if is_dry:
        # The model is so small that threads only wait for each other.
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for part in parts:
        command = [sys.executable, "-m", "scripts.gpu.part", part, "--results", str(figures_path.resolve())]
        command += ["--dry"] if is_dry else []
        started = time.monotonic()
        allowed = allowed_seconds(part, parts, end - started, seconds)
        log = out / f"{part}.log"
        how = run_part(command, log, environment, allowed)
        if how != "ran":
            lines = log.read_text(errors="replace").strip().splitlines()
            how += f": {lines[-1][:200]}" if lines else ""
        spent = time.monotonic() - started
        results = Results(figures_path, part, judges_speed=not is_dry)
        results.add("ran", how == "ran", at_least=1, is_detail=True, note=how)
        print(f"{part}: {how}, {spent:.0f} s of {allowed:.0f} s", flush=True)
    return read_figures(figures_path)


def paths(out: Path, wheels: Path | None) -> list[str]:
    """Folders of modules for the parts; installs the wheels into one of them.

    Raises:
        subprocess.CalledProcessError: If the wheels cannot be installed.
    """
    inherited = os.environ.get("PYTHONPATH")
    folders = [str(ROOT), *([inherited] if inherited else [])]
    if wheels is None:
        return folders
    site = (out / "site").resolve()
    found = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    options = ["--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *found], check=True)
    return [str(site), *folders]


def main() -> None:
    """Run the check, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all parts")
    parser.add_argument("--only", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="parts to run")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for the parts")
    parser.add_argument("--dry", action="store_true", help="rehearse with a tiny model on a CPU")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in BUDGETS if part in arguments.only]
    figures = check(arguments.out, parts, arguments.seconds, is_dry=arguments.dry, wheels=arguments.wheels)
    print(table(figures))
    missed = sum(figure.holds is False for figure in figures)
    judged = sum(figure.holds is not None for figure in figures)
    print(f"{judged - missed} of {judged} targets hold" + ("; speed was not judged" if arguments.dry else ""))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
