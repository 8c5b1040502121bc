"""The kernel templates of GPU targets, in order of preference; the last one takes everything."""

from __future__ import annotations

from functools import cache

from bitwright.codegen.tvm.template import Template


@cache
def templates() -> dict[str, Template]:
    """Every GPU template by name."""
    from bitwright.codegen.tvm.cuda.attention.template import CudaAttention
    from bitwright.codegen.tvm.cuda.copy import CudaCopy
    from bitwright.codegen.tvm.cuda.depthwise import CudaDepthwise
    from bitwright.codegen.tvm.cuda.dynamic import CudaDynamic
    from bitwright.codegen.tvm.cuda.elementwise import CudaElementwise
    from bitwright.codegen.tvm.cuda.generic import CudaGeneric
    from bitwright.codegen.tvm.cuda.group_norm import CudaGroupNorm
    from bitwright.codegen.tvm.cuda.lowbit.template import CudaLowbit
    from bitwright.codegen.tvm.cuda.mma import Mma
    from bitwright.codegen.tvm.cuda.pool import CudaPool
    from bitwright.codegen.tvm.cuda.rows import CudaRows
    from bitwright.codegen.tvm.cuda.simt import Simt
    from bitwright.codegen.tvm.cuda.transpose import CudaTranspose
    from bitwright.codegen.tvm.cuda.wgmma import Wgmma

    known: tuple[Template, ...] = (
        CudaLowbit(),
        CudaDepthwise(),
        Wgmma(),
        Mma(),
        Simt(),
        CudaAttention(),
        CudaDynamic(),
        CudaRows(),
        CudaGroupNorm(),
        CudaPool(),
        CudaTranspose(),
        CudaCopy(),
        CudaElementwise(),
        CudaGeneric(),
    )
    return {t.name: t for t in known}
