"""From an order to a compiled kernel; runs in compile workers."""

from __future__ import annotations

from bitwright.codegen.cuda.machine_code import compile_cuda
from bitwright.codegen.cuda.package import Kernel, packed
from bitwright.codegen.tvm.cuda.builder import launch_of
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.select import Order, template_of


def compile_gpu(order: Order) -> bytes:
    """Emit and compile one kernel for its configuration's architecture; see ``codegen/cuda/package.py``."""
    function = template_of(order.template).emit(order.body, order.config, order.symbol)
    text = cuda_source(function)
    made = compile_cuda(text, order.config.mcpu)
    launch = tuple(int(n) for n in launch_of(function))
    return packed(Kernel(order.symbol, text, made.cubin, launch, made.resources[order.symbol]))
