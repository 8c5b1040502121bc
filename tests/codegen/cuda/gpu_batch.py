"""Runs many GPU kernels in the emulator: one text, compiled once, each compared with the reference interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitwright.codegen.cuda.emulator import Emulated, Guarded
from bitwright.codegen.cuda.machine_code import Compiled, compile_cuda
from bitwright.codegen.targets.nvidia import SM80, SM90
from bitwright.codegen.tvm.cuda.builder import launch_of
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.template import Refused, Template
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.weights import Array
from tests.codegen.kernel_batch import Case, difference


@dataclass
class GpuBatch:
    """Cases for one template; ``weights`` names the inputs of each case that are constants."""

    template: Template
    cases: Sequence[Case]
    weights: Sequence[str] = ()
    sm: int = 90

    def constants(self, case: Case) -> dict[str, Array]:
        return {k: v for k, v in case.inputs.items() if k in self.weights}

    @cached_property
    def configs(self) -> list[CudaConfig]:
        """What the template decides."""
        made = []
        for c in self.cases:
            config = self.template.configure(c.body, self.constants(c), SM90 if self.sm == 90 else SM80)
            assert isinstance(config, CudaConfig), (c.label, config)
            made.append(config)
        return made

    @cached_property
    def functions(self) -> list[object]:
        """The finished kernels."""
        pairs = zip(self.cases, self.configs, strict=True)
        return [self.template.emit(c.body, k, f"k{i}") for i, (c, k) in enumerate(pairs)]

    @cached_property
    def text(self) -> str:
        return "\n".join(cuda_source(f) for f in self.functions)

    def run(self, orders: Sequence[int] = (1,)) -> list[str]:
        """What differs, one line per case and order of threads that fails."""
        emulated = Emulated(self.text, [f"k{i}" for i in range(len(self.cases))])
        return [
            f"{c.label} (order {order}): {why}"
            for i, c in enumerate(self.cases)
            for order in orders
            if (why := self._one(emulated, i, c, order))
        ]

    def _one(self, emulated: Emulated, i: int, case: Case, order: int) -> str:
        want = [to_numpy(t) for t in evaluate(case.body, case.inputs)]
        got = self.outputs(emulated, i, case, order)
        for g, w in zip(got, want, strict=True):
            if why := difference(g, w.astype(g.dtype) if w.dtype == bool else w, case):
                return why
        return ""

    def outputs(self, emulated: Emulated, i: int, case: Case, order: int) -> list[Array]:
        """What kernel ``i`` writes; scratch memory must be zero again."""
        config, function = self.configs[i], self.functions[i]
        packed = self.template.pack(case.body, config, self.constants(case))
        why = self.template.verify(case.body, config, self.constants(case), packed)
        assert not why, why
        outs = [_poison(case.body.types[o].static_shape, case.body.types[o].dtype.numpy) for o in case.body.outputs]
        arrays: Mapping[str, Sequence[Array]] = {
            "input": [case.inputs[v.name] for v in case.body.inputs], "packed": packed, "output": outs,
        }  # fmt: skip
        room = Guarded()
        try:
            placed = [room.place(np.ascontiguousarray(arrays[a.kind][a.index])) for a in config.args]
            zeros = room.place(np.zeros(max(config.scratch_bytes, 1), np.uint8))
            work = room.place(np.full(max(config.work_bytes, 1), 0xA5, np.uint8))
            addresses = [at for at, _ in placed] + [zeros[0]] * bool(config.scratch_bytes)
            emulated.run(f"k{i}", launch_of(function), [*addresses, *[work[0]] * bool(config.work_bytes)], order)
            assert not zeros[1].any(), "scratch memory is not zero again"
            found = {
                a.index: view.copy() for a, (_, view) in zip(config.args, placed, strict=True) if a.kind == "output"
            }
            return [found[k] for k in range(len(outs))]
        finally:
            room.free()

    def compiled(self, arch: str) -> Compiled:
        """Machine code of all kernels; none may spill."""
        made = compile_cuda(self.text, arch)
        for name, r in made.resources.items():
            assert r.spill_stores == r.spill_loads == 0, (self.cases[int(name[1:])].label, r)
            assert launch_of(self.functions[int(name[1:])])[4] <= (227 if arch == "sm_90a" else 163) * 1024
        return made


def _poison(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """An output that no kernel has written."""
    return np.frombuffer(b"\xa5" * (int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()


def refusal(template: Template, case: Case, weights: Sequence[str] = ()) -> str:
    """The reason why a template does not take a case, or the empty string."""
    answer = template.configure(case.body, {k: v for k, v in case.inputs.items() if k in weights}, SM90)
    return answer.reason if isinstance(answer, Refused) else ""
