"""Tuning over Ray: two nodes on this machine, one of them killed in the middle."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitwright.cluster import Node, RayBench, resource_of
from bitwright.codegen.tuning.bench import LocalBench, Trial
from bitwright.errors import BitwrightError
from tests.codegen import harness
from tests.codegen import tuning_faults as faults

ray = pytest.importorskip("ray", reason="needs the extra bitwright[cluster]")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parent.parent
TARGET = harness.target()


def slow_compile(order: Any) -> bytes:
    """A compile function that takes a while, so that a node can be killed meanwhile."""
    import time

    time.sleep(0.2)
    return faults.library()


class PlainNode(Node):
    """A node that compiles the C kernels of the tests."""

    def __init__(self, _: int | None) -> None:
        self.bench = LocalBench(1, compile=slow_compile)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT), *sys.path]))
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr("bitwright.cluster.Node", PlainNode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


def trials(count: int) -> list[Trial]:
    request = faults.request(faults.library(), "good")
    return [Trial("anything", request) for _ in range(count)]  # type: ignore[arg-type]


def test_a_killed_node_loses_no_candidate(cluster: Any) -> None:
    with pytest.raises(BitwrightError, match="no node of the Ray cluster measures this target"):
        RayBench(TARGET)
    nodes = [cluster.add_node(num_cpus=1, resources={resource_of(TARGET): 1}) for _ in range(2)]
    cluster.wait_for_nodes()
    with RayBench(TARGET) as bench:
        assert len(bench.actors) == 2
        outcomes = {}
        for index, outcome, library in bench.run(trials(8)):
            outcomes[index] = f"{outcome.status} {outcome.reason}".strip()
            assert library
            if len(outcomes) == 2:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
        assert outcomes == dict.fromkeys(range(8), "ok")
        assert len(bench.actors) == 1


def test_resources_tell_targets_apart() -> None:
    assert resource_of(harness.target("avx2")) != resource_of(TARGET)
    assert resource_of(TARGET) == resource_of(harness.target())
