"""Attention kernels of GPUs in the emulator against the interpreter, with all that may surround them; machine code."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.attention.template import AttentionConfig, CudaAttention
from bitwright.ir import ops
from bitwright.ir.types import U8
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Array
from tests.codegen.test_attention import (
    QKV,
    Cases,
    batch_cases,
    mask_cases,
    normal,
    pair_cases,
    qkv,
    size_cases,
    view_cases,
)
from tests.codegen.test_attention_decode import CASES as DECODE

BF16 = ml_dtypes.bfloat16


def half_cases(c: Cases) -> None:
    """f16 on tensor cores: several tiles of queries and keys, wide heads, odd rows, views."""
    for rows, keys, depth, width in ((130, 150, 64, 64), (16, 65, 24, 16), (9, 64, 17, 9), (20, 70, 160, 144)):
        for causal in (False, True):
            label = f"f16 {rows}x{keys}x{depth}x{width}{' causal' if causal else ''}"
            c.add_case(
                label, qkv((2,), rows, keys, depth, width, np.float16), (ops.Attention(depth**-0.5, causal), QKV)
            )
    back: dict[str, Array] = {"q": normal(2, 16, 19, dtype=np.float16), "k": normal(2, 16, 22, dtype=np.float16)}
    back["v"] = normal(22, 2, 16, dtype=np.float16)
    turn = ops.Transpose((0, 2, 1))
    chain = (turn, ("q",)), (turn, ("k",)), (ops.Transpose((1, 0, 2)), ("v",))
    c.add_case("f16 transposed operands", back, *chain, (ops.Attention(0.3), ("v0", "v1", "v2")))
    scale: dict[str, Array] = {"s": np.array(0.02, np.float16), "z": np.array(128, np.uint8)}
    inputs = qkv((2, 3), 19, 21, 16, 16, np.float16) | scale
    c.add_case("f16 quantize", inputs, (ops.Attention(0.3), QKV), (ops.Quantize(U8), ("v0", "s", "z")), steps=1)
    late = np.zeros((20, 150), np.float32)
    late[3, :128] = late[7, :149] = -np.inf
    c.add_case("f16 keys late", qkv((1,), 20, 150, 16, 16, np.float16) | {"m": late}, (ops.Attention(0.3), (*QKV, "m")))
    c.add_case(
        "f16 large", {x: a * 15 for x, a in qkv((1,), 20, 90, 16, 16, np.float16).items()}, (ops.Attention(1.0), QKV)
    )


def few_cases(c: Cases) -> None:
    """A decoder's step: keys split between parts of warps, warps and blocks."""
    for keys in (1, 255, 600, 1030):
        for kind in (np.float32, np.float16, BF16):
            inputs = qkv((1, 2), 1, keys, 64, 64, kind) | {"q": normal(1, 8, 1, 64, dtype=kind)}
            c.add_case(f"decode {keys} {np.dtype(kind)}", inputs, (ops.Attention(0.125, kv_groups=4), QKV))
    mask = np.where(np.arange(700) < 450, 0, -np.inf).astype(np.float32)
    c.add_case("cache not full", qkv((2, 2), 1, 700, 32, 16) | {"m": mask}, (ops.Attention(0.2), (*QKV, "m")))
    c.add_case("nothing", qkv((1, 2), 1, 600, 32, 16) | {"m": mask[:600] == 1}, (ops.Attention(0.2), (*QKV, "m")))
    c.add_case("three queries", qkv((2,), 3, 600, 33, 20, np.float16), (ops.Attention(0.2), QKV))
    c.add_case("wide f32", qkv((1,), 2, 40, 250, 256), (ops.Attention(0.06, True), QKV))
    odd = {"q": normal(1, 22, 1, 16), "k": normal(1, 2, 30, 16), "v": normal(1, 2, 30, 16)}
    c.add_case("eleven heads a group", odd, (ops.Attention(0.2, kv_groups=11), QKV))
    for name, (inputs, op) in DECODE.items():
        c.add_case(name, inputs, (op, (*QKV, "m")[: len(inputs)]))


GROUPS: dict[str, Any] = {
    "pairs": pair_cases, "halves": half_cases, "sizes": size_cases, "masks": mask_cases, "batches": batch_cases,
    "views": view_cases, "few": few_cases,
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_matches_interpreter(group: str) -> None:
    cases = Cases()
    GROUPS[group](cases)
    batch = GpuBatch(CudaAttention(), cases)
    assert batch.run(orders=(1, 2)) == []
    flash = {c.flash for c in batch.configs if isinstance(c, AttentionConfig)}
    assert flash == {"pairs": {True}, "halves": {True}, "batches": {True, False}}.get(group, {False})
    assert any(c.work_bytes for c in batch.configs) == (group in ("few", "sizes"))


def test_refusals() -> None:
    cases = Cases()
    cases.add_case("wide", qkv((1,), 2, 4, 300, 8), (ops.Attention(), QKV))
    cases.add_case("before", qkv((1,), 2, 4, 8, 8), (ops.Unary("exp"), ("q",)), (ops.Attention(), ("v0", "k", "v")))
    assert [refusal(CudaAttention(), c) for c in cases] == [
        "heads of 300: kernels take up to 256", "exp before the attention",
    ]  # fmt: skip


def random_case(c: Cases, rng: np.random.Generator) -> None:
    """Any attention that the kernels take."""
    kind = (np.float32, np.float16, BF16)[int(rng.integers(3))]
    rows, keys = int(rng.choice([1, 2, 8, 9, 17, 64, 65, 130])), int(rng.integers(1, 200))
    keys = keys * 5 if rows == 1 else keys
    depth, width = (int(n) for n in rng.choice([1, 8, 16, 20, 33, 64, 80, 128], 2))
    groups, heads = int(rng.choice([1, 2, 3, 8])), int(rng.integers(1, 3))
    inputs = {
        "q": normal(1, heads * groups, rows, depth, dtype=kind), "k": normal(1, heads, keys, depth, dtype=kind),
        "v": normal(1, heads, keys, width, dtype=kind),
    }  # fmt: skip
    operands: tuple[str, ...] = QKV
    if rng.integers(2):
        shape = (int(rng.choice([1, heads * groups])), int(rng.choice([1, rows])), keys)
        inputs["m"] = rng.integers(0, 3, shape) > 0 if rng.integers(2) else normal(*shape)
        operands = (*QKV, "m")
    op = ops.Attention(depth**-0.5, bool(rng.integers(2)), groups)
    c.add_case(f"{np.dtype(kind)} {[inputs[n].shape for n in operands]} {op}", inputs, (op, operands))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_random_attentions(seed: int) -> None:
    rng, cases = np.random.default_rng(seed), Cases()
    for _ in range(16):
        random_case(cases, rng)
    assert GpuBatch(CudaAttention(), cases).run(orders=(seed + 1,)) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    cases = Cases()
    for width in (64, 128, 256):
        inputs = qkv((1, 4), 512, 512, width, width, np.float16 if width != 64 else BF16)
        cases.add_case(f"flash {width}", inputs, (ops.Attention(0.1, width == 128), QKV))
    for kind in (np.float16, np.float32):
        inputs = qkv((1, 8), 1, 4096, 128, 128, kind) | {"q": normal(1, 32, 1, 128, dtype=kind)}
        cases.add_case(f"decode {np.dtype(kind)}", inputs, (ops.Attention(0.1, kv_groups=4), QKV))
    cases.add_case("f32", qkv((1, 4), 512, 512, 64, 64), (ops.Attention(0.1), QKV))
    shown = sass(GpuBatch(CudaAttention(), cases).compiled(arch).cubin)
    parts = {int(m[1]): m[2] for m in re.finditer(r"\.text\.k(\d+):(.*?)(?=\.text\.k\d+:|\Z)", shown, re.S)}
    assert sorted(parts) == list(range(6))
    for i, part in parts.items():
        words = (
            ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS", "F2FP") if i < 3 else ("LDG.E.128", "FFMA")
        )
        assert [w for w in (*words, "MUFU.EX2", "SHFL") if w not in part] == [], cases[i].label
        assert not re.findall(r"\b(LDL|STL)\b", part), cases[i].label
