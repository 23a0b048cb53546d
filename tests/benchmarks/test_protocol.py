import pytest

from benchmarks.peers.protocol import next_reply, reply_line


def test_a_reply_is_found_among_other_lines_and_the_next_one_is_left() -> None:
    lines = iter(["INFO loading\n", reply_line([3, 0.5]) + "\n", reply_line("ready") + "\n"])
    assert next_reply(lines) == [3, 0.5]
    assert next_reply(lines) == "ready"


def test_an_ended_process_is_no_reply() -> None:
    with pytest.raises(EOFError):
        next_reply(iter(["INFO loading\n"]))
