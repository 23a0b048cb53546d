"""What ``prelude cluster`` says of what Ray Serve says."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("ray", reason="Ray is not installed: make test-cluster installs it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own code
    from server.cluster.serving.operator import cause_in


def test_the_cause_is_what_the_replica_said_last() -> None:
    text = """Deploying failed: Failed to update the deployments ['base']. The deployment failed to start 3 times:
    Traceback (most recent call last):
      File "deployments.py", line 73, in __init__
    server.errors.EngineStartError: base-0 ended with status 1: first
    server.errors.EngineStartError: base-1 ended with status 1: prelude: no
      config.json
    """
    assert cause_in(text) == "base-1 ended with status 1: prelude: no config.json"


def test_without_a_cause_it_is_the_end_of_the_message() -> None:
    assert cause_in("no\n room") == "no room"
    assert len(cause_in("x" * 5000)) == 2000
