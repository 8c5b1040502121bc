"""Runs kernels of GPU templates in the emulator: all of one text, each compared with the reference interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitwright.codegen.cuda.emulator import Emulated, Guarded
from bitwright.codegen.targets import GPUS
from bitwright.codegen.tvm.cuda.builder import launch_of
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.template import Refused, Template
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.target import Target
from bitwright.ir.types import BOOL
from bitwright.ir.weights import Array
from tests.codegen.kernel_batch import Case, difference


def taken(template: Template, body: Graph, target: Target, constants: Mapping[str, Array] | None = None) -> CudaConfig:
    """The template's configuration of a body that it must take."""
    config = template.configure(body, constants or {}, target)
    assert not isinstance(config, Refused), config
    assert isinstance(config, CudaConfig)
    return config


@dataclass
class Batch:
    """Cases for one template and one target."""

    template: Template
    cases: Sequence[Case]
    target: str = "cuda-sm80"
    orders: Sequence[int] = (1,)
    configs: list[CudaConfig] = field(default_factory=list)
    text: str = ""

    def emit(self) -> list[list[int]]:
        """The kernels' text and their launches; kernel i is called ``k<i>``."""
        target = GPUS[self.target]
        self.configs = [taken(self.template, c.body, target) for c in self.cases]
        functions = [
            self.template.emit(c.body, k, f"k{i}")
            for i, (c, k) in enumerate(zip(self.cases, self.configs, strict=True))
        ]
        self.text = "\n".join(cuda_source(f) for f in functions)
        return [list(launch_of(f)) for f in functions]

    def run(self) -> list[str]:
        """What differs, one line per case that fails."""
        launches = self.emit()
        library = Emulated(self.text, [f"k{i}" for i in range(len(self.cases))])
        failures = []
        for i, (case, config, launch) in enumerate(zip(self.cases, self.configs, launches, strict=True)):
            want = [to_numpy(t) for t in evaluate(case.body, case.inputs)]
            for order in self.orders:
                got = self._call(library, f"k{i}", launch, case, config, order)
                whys = [
                    f"shape {g.shape}, not {w.shape}" if g.shape != w.shape
                    else difference(g, w.astype(g.dtype) if w.dtype == bool else w, case)
                    for g, w in zip(got, want, strict=True)
                ]  # fmt: skip
                failures += [f"{case.label}: {why}" for why in whys if why]
        return failures

    def _call(
        self, library: Emulated, name: str, launch: Sequence[int], case: Case, config: CudaConfig, order: int
    ) -> list[Array]:
        packed = self.template.pack(case.body, config, {})
        return launched(library, name, launch, case.body, config, list(case.inputs.values()), packed, order)


def launched(
    library: Emulated,
    name: str,
    launch: Sequence[int],
    body: Graph,
    config: CudaConfig,
    inputs: Sequence[Array],
    packed: Sequence[Array],
    order: int = 1,
) -> list[Array]:
    """The outputs of one kernel on copies of arrays that end at guard pages; its scratch must be zero again."""
    room = Guarded()
    try:
        outs = [np.zeros(body.types[o].static_shape, body.types[o].dtype.numpy) for o in body.outputs]
        stored = {"input": inputs, "packed": packed, "output": outs}
        placed = {kind: [room.place(_plain(a)) for a in arrays] for kind, arrays in stored.items()}
        pointers = [placed[a.kind][a.index][0] for a in config.args]
        scratch = room.place(np.zeros(config.scratch_bytes, np.uint8)) if config.scratch_bytes else None
        work = room.place(np.full(config.work_bytes, 0xA5, np.uint8)) if config.work_bytes else None
        pointers += [memory[0] for memory in (scratch, work) if memory is not None]
        library.run(name, launch, pointers, order)
        assert scratch is None or not scratch[1].any(), "the scratch is left with something in it"
        types = [body.types[o].dtype for o in body.outputs]
        return [
            view.view(np.uint8 if t == BOOL else t.numpy).reshape(a.shape).copy()
            for (_, view), a, t in zip(placed["output"], outs, types, strict=True)
        ]
    finally:
        room.free()


def _plain(a: Array) -> Array:
    """The array with a format that ctypes knows."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)
