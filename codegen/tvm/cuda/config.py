"""What a GPU template decides: a :class:`Config` and the launch that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.codegen.tvm.template import Config


@dataclass(frozen=True)
class CudaConfig(Config):
    """``scratch_bytes`` is memory of the device, zero before the first launch; the kernel leaves it zero.

    ``work_bytes``: memory that holds anything before and after. The order of pointers is ``args``, then the scratch,
    then the work memory. ``arch``: 80, 89 or 90 with ``wgmma`` (sm_90a).
    """

    isa: str = "cuda"
    work_bytes: int = 0
    arch: int = 80
    threads: int = 128
    grid: tuple[int, int, int] = (1, 1, 1)
