"""CUDA C++ text of finished kernels, as TVM prints it, without TVM's own preamble.

The text names functions and types that a prelude must define: ``codegen/cuda/device`` for a GPU,
``codegen/cuda/emulator`` for this machine's C++ compiler. So one text runs on both.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import tvm  # type: ignore[import-untyped]
from tvm import tirx
from tvm.tirx import compilation_pipeline  # type: ignore[import-untyped]

_MARK = 'extern "C" __global__ void'


@cache
def _target() -> Any:
    return tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})


@cache
def _passes() -> Any:
    x = tirx.transform
    return tvm.ir.transform.Sequential(
        [x.BF16ComputeLegalize(), x.VectorizeLoop(True), x.UnrollLoop(), x.BF16StorageLegalize()]
    )


def cuda_source(function: Any) -> str:
    """The kernel's text: its declaration and definition. The same for every architecture."""
    named = str(function.attrs["global_symbol"])
    module = tvm.IRModule({named: function.with_attr("target", _target())})
    module = compilation_pipeline.finalize_device_passes()(_passes()(module))
    text = str(tvm.get_global_func("target.build.cuda")(module, _target()).inspect_source())
    text = text[text.index(_MARK) :].replace("__align__(128) uchar shared_ptr", "__align__(1024) uchar shared_ptr")
    if blocks := int(function.attrs.get("bitwright.min_blocks", 0)):
        text = re.sub(r"__launch_bounds__\((\d+)\)", rf"__launch_bounds__(\1, {blocks})", text)
    if (cluster := int(function.attrs.get("bitwright.cluster", 1))) > 1:
        text = text.replace("__launch_bounds__", f"__cluster_dims__({cluster}, 1, 1) __launch_bounds__")
    return text
