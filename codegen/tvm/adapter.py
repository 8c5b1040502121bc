"""The thin wrapper around TVM: TIR functions in, position-independent objects without any libtvm symbol out.

TVM's own pipelines end in ``MakePackedAPI``. The one registered here leaves the C ABI alone: a function
``void k(int32_t begin, int32_t end, float* x, ...)`` is exactly that in the object.

Kernels stay in objects of their own, joined by the linker, and that is not a matter of taste: when kernels
that are called with overlapping memory are inlined into one function, TVM's alias tags make LLVM drop live
stores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tvm  # type: ignore[import-untyped]
from tvm import tirx
from tvm.tirx import compilation_pipeline  # type: ignore[import-untyped]

from bitwright.ir.errors import InvalidInput, did_you_mean

PIPELINE = "bitwright_cabi"


@dataclass(frozen=True, slots=True)
class Machine:
    """What LLVM is told about the processor: fields are TVM's target keys, empty ones are left out."""

    mcpu: str = "x86-64"
    mtriple: str = ""
    mattr: tuple[str, ...] = ()
    mabi: str = ""
    mfloat_abi: str = ""
    kind: str = "llvm"

    def target(self) -> Any:
        """TVM's target value."""
        keys: dict[str, object] = {"kind": self.kind}
        if self.kind == "llvm":
            keys["mcpu"] = self.mcpu
            options = {"mtriple": self.mtriple, "mabi": self.mabi, "mfloat-abi": self.mfloat_abi}
            keys |= {k: v for k, v in options.items() if v}
            if self.mattr:
                keys["mattr"] = list(self.mattr)
        return _target(tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in keys.items()))


MACHINES = {
    "avx512-vnni": Machine("znver4"),
    "avx-vnni": Machine("alderlake"),
    "avx2": Machine("haswell"),
    "portable": Machine("x86-64"),
}
"""A machine per instruction-set level of the kernel generators; znver4 has VNNI, VBMI and BF16."""


def machine(isa: str) -> Machine:
    """The machine of an instruction-set level, of an LLVM processor name, or of LLVM's options."""
    if not isa.startswith("-"):
        return MACHINES.get(isa) or Machine(isa)
    given = {key.lstrip("-"): value for key, _, value in (word.partition("=") for word in isa.split())}
    if unknown := set(given) - {"mcpu", "mtriple", "mattr", "mabi"}:
        raise InvalidInput(f"LLVM options {isa!r}: {', '.join(sorted(unknown))} is none of mcpu, mtriple, mattr, mabi")
    mattr = tuple(filter(None, given.get("mattr", "").split(",")))
    return Machine(given.get("mcpu", "generic"), given.get("mtriple", ""), mattr, given.get("mabi", ""))


def processor_features(options: str) -> frozenset[str] | str:
    """The features, by LLVM's names, of a processor's name or LLVM's options; or why there is no such processor."""
    try:
        on = machine(options)
        if on.mtriple.partition("-")[0] not in ("", *map(str, tvm.target.codegen.llvm_get_targets())):
            return f"LLVM knows no architecture {on.mtriple!r}"
        plain = Machine("generic" if on.mtriple else "x86-64", on.mtriple).target()
        known = set(map(str, tvm.target.codegen.llvm_get_cpu_archlist(plain)))
        if on.mcpu not in known:
            return f"LLVM knows no processor {on.mcpu!r}{did_you_mean(on.mcpu, sorted(known))}"
        return frozenset(map(str, tvm.target.codegen.llvm_get_cpu_features(on.target())))
    except (InvalidInput, ValueError, RuntimeError) as e:
        return f"LLVM takes no {options!r}: {e}"


@cache
def _target(keys: tuple[tuple[str, Any], ...]) -> Any:
    return tvm.target.Target({k: list(v) if isinstance(v, tuple) else v for k, v in keys})


def _pipeline() -> tuple[Any, Any, Any]:
    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def lower(mod: Any, _: Any) -> Any:
        x = tirx.transform
        # no simplifier: LLVM does that, and TVM's costs more than the rest of the compilation
        steps = [x.BF16ComputeLegalize(), x.VectorizeLoop(True), x.UnrollLoop(), x.BF16StorageLegalize()]
        return tvm.ir.transform.Sequential(steps)(mod)

    return lower, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


@cache
def _register() -> str:
    compilation_pipeline.register_tir_pipeline(PIPELINE, _pipeline)
    return PIPELINE


def _build(funcs: Sequence[Any], on: Machine) -> Any:
    named = {str(f.attrs["global_symbol"]): f for f in funcs}
    if len(named) != len(funcs):
        raise InvalidInput("two kernels of one object have the same name")
    return tvm.tirx.build(tvm.IRModule(named), on.target(), pipeline=_register())


def build_object(funcs: Sequence[Any], on: Machine | str) -> bytes:
    """Compile TIR functions to one relocatable, position-independent object file (its bytes)."""
    lib = _build(funcs, machine(on) if isinstance(on, str) else on)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        lib.write_to_file(str(path), "o")
        return path.read_bytes()


def assembly(func: Any, on: Machine | str, form: str = "asm") -> str:
    """The generated code as text: ``form`` is ``"asm"`` or ``"ll"``."""
    return str(_build([func], machine(on) if isinstance(on, str) else on).inspect_source(form))


def tir_text(func: Any) -> str:
    """The function as TVMScript, for dumps."""
    return str(func.script())
