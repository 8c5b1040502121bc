"""``make gpu-report`` without a device: what it prepares gives the reference's results, and what it prints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitwright.gpu_emulation import EmulatedDriver

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Clocked(EmulatedDriver):
    """Everything takes a millisecond."""

    def timed(self, run: Callable[[int], None], stream: int) -> float:
        run(stream)
        return 1e-3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_cases", "gpu_prepare"):
        sys.modules.pop(name, None)


def test_prepared_programs_are_checked_timed_and_listed(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.zip"
    importlib.import_module("gpu_prepare").prepare(path, ["cuda-sm90"], "s8 1x67x72")
    prepared = gpu.Prepared(path)
    assert gpu.checked(prepared, "cuda-sm90", Clocked) == 0
    assert "1 programs give the reference's results, 0 do not" in capsys.readouterr().out
    (case,) = prepared.cases["cuda-sm90"]
    monkeypatch.setattr(gpu, "_COPIES", 2)
    row = gpu.timed(prepared, case, Clocked(), with_torch=False)
    assert row.seconds == pytest.approx(1e-3 / gpu.EACH)
    text = gpu.table([row], {"f16": 1e12, "s8": 2e12, "bytes": 1e11})
    assert "s8 1x67x72" in text
    assert f"{2 * 67 * 72 / row.seconds / 2e12:.0%}" in text or f"{row.nbytes / row.seconds / 1e11:.0%}" in text


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90"])
def test_all_that_a_device_checks_is_right_in_the_emulator(gpu: Any, tmp_path: Path, target: str) -> None:
    path = tmp_path / "report.zip"
    importlib.import_module("gpu_prepare").prepare(path, [target], checks=True)
    prepared = gpu.Prepared(path)
    assert len(prepared.cases[target]) > 50
    assert gpu.checked(prepared, target, EmulatedDriver) == 0


def test_a_wrong_result_is_told(gpu: Any) -> None:
    import numpy as np

    want = np.arange(6, dtype=np.int32)
    assert gpu.difference(want, want) == ""
    assert gpu.difference(want + (want == 3), want) == "1 of 6 integers differ"
    wide = want.astype(np.float32)
    assert gpu.difference(wide * (1 + 1e-6), wide) == ""
    assert gpu.difference(wide * 1.01, wide).startswith("off by 0.01")
    assert gpu.difference(np.where(want == 2, np.nan, wide), wide) == "NaN or infinities in other places"


def test_without_a_device_nothing_is_claimed(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    assert gpu._device({"cuda-sm90": "sm_90a"}) is None
    assert "nothing was run and nothing is claimed" in capsys.readouterr().out
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(gpu.InvalidInput, match="was not written by --prepare"):
        gpu.Prepared(tmp_path / "no.zip")


def test_whole_networks_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    models = importlib.import_module("gpu_models")
    monkeypatch.setattr(models, "MODELS", {"digits": ((2,), ("int8", "2:4 f16"))})
    monkeypatch.setattr(models, "EACH", 1)
    monkeypatch.setattr(models, "ROUNDS", 1)
    assert len(models.prepare(tmp_path, "cuda-sm80", size="tiny")) == 2
    lines = models.measure(tmp_path, Clocked, with_torch=False)
    assert all(" right (" in line for line in lines)
    assert len(lines) == 2


def test_whole_networks_without_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    models = importlib.import_module("gpu_models")
    monkeypatch.setattr(sys, "argv", ["gpu_models.py", str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert models.main() == 0
    assert "nothing was run and nothing is claimed" in capsys.readouterr().out
