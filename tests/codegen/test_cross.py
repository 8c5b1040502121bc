"""Kernels for Arm and RISC-V under emulation: instructions against their meaning, contractions against NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.instructions.arm import INSTRUCTIONS
from bitwright.codegen.instructions.core import Instruction
from bitwright.codegen.targets import CROSS
from bitwright.codegen.tvm.adapter import assembly, machine
from bitwright.codegen.tvm.contract import (
    ContractSpec,
    Conv,
    KernelFunc,
    Knobs,
    Matrix,
    StoreAcc,
    emit,
    knobs,
    pack,
    supports,
    unpack,
)
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM
from tests.codegen.emulated import Call, need, run
from tests.codegen.test_contract import reference, sparsify
from tests.codegen.test_instructions import ROUNDS, operands

Array = np.ndarray[Any, Any]
REPEATS = 150
"""Fresh weights and activations for every kernel."""
SHAPES: list[tuple[Matrix | Conv, int]] = [
    (Matrix(1, 1, 1), 8), (Matrix(1, 9, 31), 8), (Matrix(3, 17, 64), 8), (Matrix(7, 4, 37), 8), (Matrix(5, 33, 12), 8),
    (Matrix(9, 21, 24), 4), (Matrix(1, 18, 29), 4), (Matrix(6, 5, 33), 2), (Matrix(2, 40, 16), 2),
    (Conv(1, 4, 5, 8, 6, (3, 3), padding=(1, 1, 1, 1)), 8), (Conv(2, 3, 3, 5, 9, (1, 1)), 8),
    (Conv(1, 7, 6, 3, 4, (3, 2), (2, 1), (1, 2), (1, 0, 2, 3)), 8), (Conv(1, 4, 4, 4, 10, (3, 3), groups=2), 8),
    (Conv(1, 5, 5, 8, 8, (3, 3), padding=(1, 1, 1, 1)), 4),
    (Conv(1, 5, 4, 20, 20, (3, 3), padding=(1, 1, 1, 1), groups=20), 8),
    (Conv(1, 7, 9, 6, 6, (5, 5), (2, 2), (1, 1), (2, 2, 2, 2), 6), 8),
]  # fmt: skip
PATTERNS = [None, NM(2, 4, 1), NM(1, 4, 1), NM(4, 8, 1), NM(1, 16, 1), NM(3, 5, 1), NM(2, 4, 1, shared=16)]


def kernels(isa: Any) -> list[tuple[ContractSpec, Knobs, KernelFunc]]:
    """A kernel for every shape and pattern that there is one for."""
    found: list[tuple[ContractSpec, Knobs, KernelFunc]] = []
    for (geometry, bits), pattern in ((s, p) for s in SHAPES for p in PATTERNS):
        spec = ContractSpec(
            "u8s8", geometry, pattern, init=len(found) % 3 == 0, pad_value=113 * isinstance(geometry, Conv)
        )
        if supports(spec, isa):
            continue
        chosen = knobs(spec, isa, bits=bits)
        store = StoreAcc(spec.rows, spec.cols, spec.acc_dtype, len(found) % 4 == 1)
        found.append((spec, chosen, emit(spec, chosen, store, f"kernel{len(found)}")))
    return found


def operands_of(spec: ContractSpec, bits: int, rng: np.random.Generator, extreme: bool) -> tuple[Array, Array, Array]:
    """Activations, weights of so many bits that keep the pattern, initial accumulators."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    x = rng.integers(0, 256, spec.input_elements)
    weight = rng.integers(low, high + 1, spec.weight_shape)
    if extreme:
        x, weight = rng.choice([0, 255], x.shape), rng.choice([low, high], weight.shape)
    init = rng.integers(-(1 << 20), 1 << 20, spec.cols).astype(np.int32)
    weight = weight.astype(np.int8)
    if spec.pattern and spec.pattern.shared > 1:  # the first of every group stay, for all outputs alike
        keep, group = spec.pattern.keep, spec.pattern.group
        depth = np.arange(weight.shape[1]) % group < keep
        weight = weight * depth.reshape(-1, *[1] * (weight.ndim - 2)).astype(np.int8)
    else:
        weight = sparsify(spec, weight, rng)
    return x.astype(np.uint8), weight, init


@pytest.mark.parametrize("name", CROSS)
def test_ten_thousand_small_contractions(name: str, tmp_path: Path) -> None:
    on = CROSS[name]
    need(on)
    made, rng, calls, wanted = kernels(on.isa), np.random.default_rng(11), list[Call](), list[Array]()
    for n, (spec, chosen, func) in enumerate(made):
        for r in range(REPEATS):
            x, weight, init = operands_of(spec, chosen.bits, rng, r % 3 == 0)
            arrays = pack(spec, chosen, weight, init=init if spec.init else None)
            if r == 0:
                np.testing.assert_array_equal(unpack(spec, chosen, arrays)[0], weight)
            out = np.zeros((spec.rows, spec.cols), np.int32)
            calls.append(Call(n, func.tasks, (x, *arrays, out), func.scratch_bytes))
            wanted.append(reference(spec, x, weight, init if spec.init else None))
    assert len(calls) >= 10_000
    assert {spec.pattern for spec, _, _ in made} == set(PATTERNS)
    assert {chosen.bits for _, chosen, _ in made} == {2, 4, 8}
    got = run([f.primfunc for _, _, f in made], [f.name for _, _, f in made], calls, on, tmp_path)
    for c, g, w in zip(calls, got, wanted, strict=True):
        np.testing.assert_array_equal(g, w, err_msg=f"{made[c.kernel][:2]} on {name}")


@pytest.mark.parametrize("name", CROSS)
def test_floats(name: str, tmp_path: Path) -> None:
    """To 1e-5 of the largest sum."""
    on, rng, made, calls, wanted = CROSS[name], np.random.default_rng(5), [], [], []
    need(on)
    for n, pattern in enumerate([None, NM(2, 4, 1), NM(1, 8, 1)]):
        spec = ContractSpec("f32", Matrix(5, 21, 43), pattern)
        weight = sparsify(spec, rng.standard_normal(spec.weight_shape).astype(np.float32), rng)
        x = rng.standard_normal(spec.input_elements).astype(np.float32)
        chosen = knobs(spec, on.isa)
        func = emit(spec, chosen, StoreAcc(spec.rows, spec.cols, spec.acc_dtype, False), f"kernel{n}")
        made.append(func)
        arrays = (x, *pack(spec, chosen, weight), np.zeros((5, 21), np.float32))
        calls.append(Call(n, func.tasks, arrays, func.scratch_bytes))
        wanted.append(reference(spec, x, weight, None))
    for g, w in zip(run([f.primfunc for f in made], [f.name for f in made], calls, on, tmp_path), wanted, strict=True):
        assert np.abs(g - w).max() <= 1e-5 * np.abs(w).max()


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda i: i.name)
def test_meaning_equals_spelling(instruction: Instruction, tmp_path: Path) -> None:
    on = CROSS["aarch64"]
    need(on)
    b, kinds = Builder("one"), instruction.operands
    inputs = [b.param(f"p{n}", k.dtype, k.lanes * ROUNDS) for n, k in enumerate(kinds)]
    out = b.param("out", instruction.result.dtype, instruction.result.lanes * ROUNDS)
    with b.loop(b.end, b.begin) as i:
        values = [b.load(p, i * k.lanes, k.lanes) for p, k in zip(inputs, kinds, strict=True)]
        b.store(out, i * instruction.result.lanes, call(instruction, *values))
    func, rng = b.finish(), np.random.default_rng(7)
    assert instruction.name in assembly(func, machine(on.mcpu))
    arrays = [operands(k, rng) for k in kinds]
    result = np.zeros((ROUNDS, instruction.result.lanes), instruction.result.dtype.numpy)
    (got,) = run([func], ["one"], [Call(0, ROUNDS, (*arrays, result))], on, tmp_path)
    for n in range(ROUNDS):
        np.testing.assert_array_equal(got[n], instruction.meaning(*(a[n] for a in arrays)), err_msg=f"{arrays} {n}")


@pytest.mark.parametrize(("name", "word", "no"), [
    ("aarch64", "usdot", "sshll"), ("aarch64-dotprod", "sdot", "usdot"), ("riscv64-v", "vsetivli", "libm"),
])  # fmt: skip
def test_kernels_use_the_instructions(name: str, word: str, no: str) -> None:
    on = CROSS[name]
    spec = ContractSpec("u8s8", Matrix(32, 64, 128))
    func = emit(spec, knobs(spec, on.isa), StoreAcc(32, 64, spec.acc_dtype, False), "kernel")
    text = assembly(func.primfunc, machine(on.mcpu))
    assert word in text
    assert no not in text.replace(word, "")


def test_options_of_llvm() -> None:
    made = machine("-mtriple=riscv64-linux-gnu -mcpu=generic-rv64 -mattr=+m,+v -mabi=lp64d")
    assert (made.mcpu, made.mtriple, made.mattr, made.mabi) == (
        "generic-rv64", "riscv64-linux-gnu", ("+m", "+v"), "lp64d"
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="mfpu is none of mcpu, mtriple, mattr, mabi"):
        machine("-mtriple=arm -mfpu=neon")
    assert replace(CROSS["aarch64"], mcpu="znver5").arch == "x86_64"
