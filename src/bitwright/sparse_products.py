"""Products of packed transposable weights on a GPU: kernels compiled for their sizes, launched in torch's stream."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitwright.codegen.cache import Cache, key_of
from bitwright.codegen.cuda.transposable import column_places
from bitwright.ir.types import BF16, F16, DType
from bitwright.runtime.cuda_driver import CudaDriver, Driver

if TYPE_CHECKING:
    from bitwright.sparse_linear import TransposableWeight

FORMATS: dict[torch.dtype, DType] = {torch.float16: F16, torch.bfloat16: BF16}


def why_not(x: Tensor, weight: TransposableWeight) -> str:
    """Why the device's sparse tensor cores cannot take this product, or the empty string."""
    if x.dtype not in FORMATS:
        return f"they take f16 or bf16, not {x.dtype}"
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return f"both sizes of the weight must be multiples of 8, not {weight.shape[0]}x{weight.shape[1]}"
    return "" if x.numel() else "x is empty"


class Products:
    """The products that one device runs; ``arch``: of its machine code."""

    def __init__(self, driver: Driver, arch: str) -> None:
        self.driver, self.arch = driver, arch
        self._launches: dict[str, tuple[int, ...]] = {}
        self._places: Tensor | None = None

    def __call__(
        self, x: Tensor, weight: TransposableWeight, by_columns: bool, bias: Tensor | None = None, stream: int = 0
    ) -> Tensor:
        """``x [tokens, depth]`` by the weight: [tokens, outputs]; ``by_columns``, by its transpose: [tokens, inputs].

        All on the device; ``bias`` f32 is added. Sums are f32. Raises :class:`BitwrightError` where a launch fails.
        """
        from bitwright.codegen.tvm.cuda.transposable import Product

        outputs, inputs = weight.shape
        p = Product(outputs, inputs, x.shape[0], by_columns, FORMATS[x.dtype], bias is not None)
        if self._places is None:
            self._places = torch.from_numpy(column_places().copy()).to(x.device)
        name = self._kernel(p)
        y = torch.empty(x.shape[0], p.rows, dtype=x.dtype, device=x.device)
        read = [weight.values, weight.codes, weight.metadata(by_columns), self._places, x.contiguous()]
        read += [] if bias is None else [bias]
        gx, gy, gz, threads, shared = self._launches[name]
        pointers = [t.data_ptr() for t in (*read, y)]
        self.driver.launch(name, (gx, gy, gz), threads, shared, pointers, stream)
        return y

    def _kernel(self, p: object) -> str:
        """The loaded kernel of a product, compiled where the cache does not have it."""
        from bitwright.codegen.tvm.select import version

        name = f"t_{key_of(version(), p, self.arch)[:20]}"
        if name not in self._launches:
            text, cubin, launch = _compiled(p, name, self.arch)
            self.driver.load({name: (cubin, text)})
            self._launches[name] = launch
        return name


def _compiled(p: object, name: str, arch: str) -> tuple[str, bytes, tuple[int, ...]]:
    from bitwright.codegen.cuda.machine_code import compile_cuda
    from bitwright.codegen.cuda.package import Kernel, packed, unpacked
    from bitwright.codegen.tvm.cuda.builder import launch_of
    from bitwright.codegen.tvm.cuda.source import cuda_source
    from bitwright.codegen.tvm.cuda.transposable import Product, emit

    store = Cache()
    found = store.get(key_of("transposable", name))
    if found is None:
        assert isinstance(p, Product)
        function = emit(p, name)
        text = cuda_source(function)
        made = compile_cuda(text, arch)
        found = packed(Kernel(name, text, made.cubin, tuple(map(int, launch_of(function))), made.resources[name]))
        store.put(key_of("transposable", name), found)
    kernel = unpacked(found)
    return kernel.text, kernel.cubin, kernel.launch


@cache
def on(index: int) -> Products:
    """The products of CUDA device ``index``. Raises :class:`InvalidInput` where it has no sparse tensor cores."""
    major, minor = torch.cuda.get_device_capability(index)
    arch = "sm_90a" if (major, minor) == (9, 0) else "sm_80"
    return Products(CudaDriver(arch, index), arch)
