"""Programs for other architectures, compiled here and emulated: the same bits; what is told where that cannot be."""

from __future__ import annotations

import shutil
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright import cli
from bitwright.codegen.c.toolchain import TOOLCHAINS
from bitwright.codegen.link import compiler_for
from bitwright.codegen.targets import CROSS
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.compare import agreement, compare
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.text import show
from bitwright.runtime.program import Program
from tests.zoo import ZOO

Array = np.ndarray[Any, Any]
MODELS = ["digits", "resnet18", "mobilenet_v2", "bert_base"]
RECIPES = {
    "int8": "int8",
    "2:4": "nm-mask{pattern=2:4}, int8",
    "1:4": "nm-mask{pattern=1:4}, int8",
    "4 bits": "quantize-weights{bits=4}, int8",
}


def need(target: str) -> None:
    """Skip where the compiler or the emulator of a target is missing, or the CPU that gives the wanted bits."""
    if not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("this CPU has no AVX2")
    if why := TOOLCHAINS[CROSS[target].arch].missing():
        pytest.skip(why)


@cache
def model(name: str) -> tuple[Graph, tuple[Array, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, example = ZOO[name]("tiny")
        return bw.capture(module, example), tuple(np.asarray(e) for e in example)


def outputs(result: Any) -> tuple[Array, ...]:
    return result if isinstance(result, tuple) else (result,)


@cache
def here(name: str, recipe: str) -> tuple[Array, ...]:
    """What a program of this machine gives (with fused multiply-add: the last addition of f32 rounds like theirs)."""
    graph, inputs = model(name)
    return outputs(bw.compile(graph, target="x86-avx2", recipe=RECIPES[recipe], calibration=[inputs])(*inputs))


def check(name: str, recipe: str, target: str) -> Program:
    """The emulated program gives the bits of this machine's; where results are f32 sums, all but the last ones."""
    need(target)
    graph, inputs = model(name)
    program = bw.compile(graph, target=target, recipe=RECIPES[recipe], calibration=[inputs])
    assert program.manifest.arch == CROSS[target].arch
    for got, want in zip(outputs(bw.emulate(program)(*inputs)), here(name, recipe), strict=True):
        if name == "bert_base":  # ends in a layer norm, whose f32 sums depend on the lanes of a vector
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(np.abs(want).max()))
        else:
            assert got.tobytes() == want.tobytes()
    return program


@pytest.mark.parametrize("target", ["aarch64", "riscv64-v"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_same_bits(name: str, recipe: str, target: str) -> None:
    check(name, recipe, target)


@pytest.mark.parametrize("target", ["aarch64-dotprod", "aarch64-neon", "riscv64"])
@pytest.mark.parametrize(("name", "recipe"), [("resnet18", "int8"), ("mobilenet_v2", "4 bits"), ("bert_base", "1:4")])
def test_lesser_machines_too(name: str, recipe: str, target: str) -> None:
    check(name, recipe, target)


@pytest.mark.parametrize("target", ["aarch64", "aarch64-dotprod", "riscv64-v"])
def test_weights_with_group_scales(target: str) -> None:
    """Group kernels sum f32 in the order of the groups everywhere."""
    need(target)
    graph, inputs = model("bert_base")
    recipe = "quantize-weights{bits=4 group=32}, dynamic-quantize"
    (want,) = outputs(bw.compile(graph, target="x86-avx2", recipe=recipe)(*inputs))
    program = bw.compile(graph, target=target, recipe=recipe)
    assert any("grouped" in s.kernel for s in program.manifest.steps)
    (got,) = outputs(bw.emulate(program)(*inputs))
    # activations are rounded at run time, and f32 sums before that may differ in the last bit
    assert np.sqrt(np.mean(np.square(got - want))) < 5e-3 * np.sqrt(np.mean(np.square(want)))


def test_a_saved_program_is_refused_here_and_runs_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("aarch64")
    graph, inputs = model("digits")
    path = tmp_path / "digits.bw"
    program = bw.compile(graph, target="aarch64", recipe="int8", calibration=[inputs])
    program.save(path)
    with pytest.raises(InvalidInput, match=r"the program is for aarch64, this machine is .*--emulate"):
        program(*inputs)
    with pytest.raises(InvalidInput, match=r"digits\.bw: the program is for aarch64"):
        bw.load(path)
    (want,) = here("digits", "int8")
    assert bw.emulate(path)(*inputs).tobytes() == want.tobytes()
    np.savez(tmp_path / "x.npz", **{program.input_names[0]: inputs[0]})  # type: ignore[arg-type]
    words = ["bitwright", "run", path, "--emulate", "-i", tmp_path / "x.npz", "-o", tmp_path / "y.npz"]
    monkeypatch.setattr(sys, "argv", [str(w) for w in words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert np.load(tmp_path / "y.npz")[program.output_names[0]].tobytes() == want.tobytes()


def test_the_command_measures_nothing_that_cannot_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("aarch64")
    graph, _ = model("digits")
    (tmp_path / "net.bw-ir").write_text(show(graph))
    graph.weights.save(tmp_path / "net.safetensors")
    monkeypatch.setattr(sys, "argv", ["bitwright", "compile", str(tmp_path / "net.bw-ir"), "--target", "aarch64"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "predicted, not measured: the program runs on aarch64" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "argv", ["bitwright", "inspect", str(tmp_path / "net.bw")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "aarch64" in capsys.readouterr().out


def test_layers_can_be_traced_but_not_timed() -> None:
    need("riscv64")
    graph, inputs = model("digits")
    native = bw.compile(graph, target="x86-avx2", recipe="int8", calibration=[inputs]).trace(*inputs)
    emulated = bw.emulate(bw.compile(graph, target="riscv64", recipe="int8", calibration=[inputs]))
    traced = emulated.trace(*inputs)
    assert traced.keys() == native.keys()
    assert all(traced[k].tobytes() == native[k].tobytes() for k in native)
    with pytest.raises(InvalidInput, match="cannot be timed"):
        emulated.profile(*inputs)


def test_a_batch_of_any_size() -> None:
    need("aarch64")
    graph, (x,) = model("digits")
    if not graph.symbols:
        module, example = ZOO["digits"]("tiny")
        graph = bw.capture(module, example, dynamic_batch=True)
    emulated = bw.emulate(bw.compile(graph, target="aarch64", recipe="int8", calibration=[(x,)], batch=2))
    native = bw.compile(graph, target="x86-avx2", recipe="int8", calibration=[(x,)], batch=2)
    five = np.concatenate([x, x, x, x, x])[:5]
    assert emulated(five).tobytes() == native(five).tobytes()


def test_compare_runs_them() -> None:
    need("aarch64")
    need("riscv64")
    graph, inputs = model("digits")
    rows = compare(graph, ["x86-avx2", "aarch64", "riscv64"], ["int8"], [inputs])
    assert agreement(rows) == "the same bits on x86-avx2, aarch64, riscv64"
    assert [r.how for r in rows] == ["measured", "predicted", "predicted"]
    assert rows[1].note == "emulated by qemu-aarch64"


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = model("digits")
    with pytest.raises(InvalidInput, match="programs for x86_64 are not emulated, those for aarch64, riscv64 are"):
        bw.emulate(bw.compile(graph, target="x86-portable"))
    with pytest.raises(BitwrightError, match="no cross compiler for sparc64 is known"):
        compiler_for("sparc64")
    need("aarch64")
    program = bw.compile(graph, target="aarch64", recipe="int8", calibration=[inputs])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        (row,) = compare(graph, ["aarch64"], ["int8"], [inputs])
        assert (row.outputs, row.note) == (None, TOOLCHAINS["aarch64"].missing())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BitwrightError, match=r"linking for aarch64: .* apt-get install gcc-aarch64-linux-gnu"):
        compiler_for("aarch64")
    with pytest.raises(BitwrightError, match=r"emulating aarch64: .* apt-get install"):
        bw.emulate(program)
