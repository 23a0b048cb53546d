"""Shared memory of killed processes is found and removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory

from server.engine.shared_memory import mapped_segments, remove_segments

OWNER = """
import os, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(create=True, size=100)
resource_tracker.unregister(segment._name, "shared_memory")  # a killed tracker removes nothing
print(segment.name, flush=True)
time.sleep(60)
"""


def test_segments_of_a_killed_group_are_removed_and_no_others() -> None:
    ours = SharedMemory(create=True, size=100)
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        segments = mapped_segments(owner.pid)
        assert [segment.name for segment in segments] == [name]
        assert ours.name in {segment.name for segment in mapped_segments(os.getpgid(0))}
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.communicate()
    assert all(segment.exists() for segment in segments)
    remove_segments(segments)
    remove_segments(segments)
    assert not any(segment.exists() for segment in segments)
    assert mapped_segments(owner.pid) == set()
    ours.close()
    ours.unlink()
