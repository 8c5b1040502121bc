"""Products of packed transposable weights on a GPU: kernels compiled for their sizes, launched in torch's stream."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitwright.codegen.cache import Cache, key_of
from bitwright.codegen.cuda.package import Kernel, packed, unpacked
from bitwright.codegen.cuda.transposable import Product, column_places
from bitwright.ir.errors import InvalidInput
from bitwright.ir.files import save
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
    """The products that one device runs; ``arch``: of its machine code.

    ``folder``: kernels that :func:`prepare` compiled elsewhere; then nothing is compiled here.
    """

    def __init__(self, driver: Driver, arch: str, folder: Path | None = None) -> None:
        self.driver, self.arch, self.folder = driver, arch, folder
        self._launches: dict[str, tuple[int, ...]] = {}
        self._places: Tensor | None = None

    def __call__(
        self, x: Tensor, weight: TransposableWeight, by_columns: bool, bias: Tensor | None = None, stream: int = 0
    ) -> Tensor:
        """``x [tokens, depth]`` by the weight: [tokens, outputs]; ``by_columns``, by its transpose: [tokens, inputs].

        All on the device; ``bias`` f32 is added. Sums are f32. Raises :class:`BitwrightError` where a launch fails.
        """
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

    def _kernel(self, p: Product) -> str:
        """The loaded kernel of a product, compiled where neither the folder nor the cache has it."""
        name = kernel_name(p, self.arch)
        if name not in self._launches:
            kernel = unpacked(self._stored(name) if self.folder else compiled(p, self.arch))
            self.driver.load({name: (kernel.cubin, kernel.text)})
            self._launches[name] = kernel.launch
        return name

    def _stored(self, name: str) -> bytes:
        assert self.folder is not None
        path = self.folder / f"{name}.zip"
        if not path.is_file():
            raise InvalidInput(f"{self.folder} has no kernel for this product ({path.name}): prepare it again")
        return path.read_bytes()


def kernel_name(p: Product, arch: str) -> str:
    """What the kernel of a product is called."""
    return f"t_{key_of(p, arch)[:20]}"


def compiled(p: Product, arch: str) -> bytes:
    """The kernel of a product (``codegen/cuda/package.py``), from the cache where it is there."""
    from bitwright.codegen.cuda.machine_code import compile_cuda
    from bitwright.codegen.tvm.cuda.builder import launch_of
    from bitwright.codegen.tvm.cuda.source import cuda_source
    from bitwright.codegen.tvm.cuda.transposable import emit
    from bitwright.codegen.tvm.select import version

    store, name = Cache(), kernel_name(p, arch)
    key = key_of("transposable", version(), p, arch)
    if (found := store.get(key)) is not None:
        return found
    function = emit(p, name)
    text = cuda_source(function)
    made = compile_cuda(text, arch)
    data = packed(Kernel(name, text, made.cubin, tuple(map(int, launch_of(function))), made.resources[name]))
    store.put(key, data)
    return data


def prepare(products: Iterable[Product], arch: str, folder: Path) -> None:
    """Compile kernels into ``folder``, for a machine that has a device but no compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    for p in products:
        save(folder / f"{kernel_name(p, arch)}.zip", compiled(p, arch))


@cache
def on(index: int) -> Products:
    """The products of CUDA device ``index``. Raises :class:`InvalidInput` where it has no sparse tensor cores."""
    major, minor = torch.cuda.get_device_capability(index)
    arch = "sm_90a" if (major, minor) == (9, 0) else "sm_80"
    return Products(CudaDriver(arch, index), arch)
