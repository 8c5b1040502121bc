"""From a plan to launches, and kernels as bytes."""

from __future__ import annotations

import zipfile
from io import BytesIO

import pytest

from bitwright.codegen.cuda.launches import Pointer, check_shape, launches_of
from bitwright.codegen.cuda.machine_code import Resources
from bitwright.codegen.cuda.package import Kernel, bundle, packed, unpacked
from bitwright.codegen.plan import Arg, Buffer, Step, plan
from bitwright.codegen.targets import GPUS
from bitwright.ir.errors import BitwrightError

KERNEL = Kernel("k_a", 'extern "C" ...', b"\x7fELF\0\1", (2, 3, 1, 128, 4096), Resources(32, 0, 0, 0))


def test_steps_become_launches_with_scratch_between_arguments_and_work() -> None:
    steps = [
        Step("k_a", 1, (Arg("x"), Arg("w"), Arg("h", access="w"), Arg("h#work", access="w")), label="h"),
        Step("k_b", 1, (Arg("h"), Arg("y", access="w")), label="y"),
    ]
    buffers = [
        Buffer("x", 64, "input"), Buffer("w", 100, "weight"), Buffer("h", 64), Buffer("h#work", 640), Buffer("y", 64),
    ]  # fmt: skip
    made = plan(steps, buffers, ["y", "x"])
    first, second, copy = launches_of(made, {"k_a": (2, 3, 1, 128, 4096), "k_b": (1, 1, 1, 32, 0)}, {"k_a": 3})
    assert (first.grid, first.threads, first.shared_bytes) == ((2, 3, 1), 128, 4096)
    assert [p.space for p in first.args] == ["input", "weight", "arena", "scratch", "arena"]
    assert first.args[2].offset != first.args[4].offset
    assert second.args == (Pointer("arena", 0, first.args[2].offset), Pointer("output", 0, 0))
    assert (copy.nbytes, copy.args) == (64, (Pointer("output", 1, 0), Pointer("input", 0, 0)))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2048, 0), (1, 70000, 1, 32, 0), (1, 1, 1, 32, 200 << 10), (0, 1, 1, 32, 0)]
)
def test_launches_that_no_device_takes_are_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(BitwrightError, match=r"kernel k_a has .* cuda-sm80 takes at most"):
        check_shape("k_a", shape, GPUS["cuda-sm80"])
    check_shape("k_a", (7, 1, 1, 1024, 163 << 10), GPUS["cuda-sm80"])


def test_kernels_come_back_from_bytes_and_bundles_are_always_the_same() -> None:
    assert unpacked(packed(KERNEL)) == KERNEL
    assert bundle([KERNEL]) == bundle([KERNEL])
    with zipfile.ZipFile(BytesIO(bundle([KERNEL]))) as archive:
        assert archive.read("k_a.cubin") == KERNEL.cubin
        assert archive.read("k_a.cu").decode() == KERNEL.text
