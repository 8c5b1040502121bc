"""Processors described in TOML: what a file may say, mistakes with their line, models compiled for a new one."""

from __future__ import annotations

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
from bitwright.codegen.targets import BUILTIN, CROSS, resolve
from bitwright.codegen.targets.files import NEEDS, WIDTHS, parse_processor
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, S8, U8
from tests.zoo import ZOO

Array = np.ndarray[Any, Any]
KNOWN = BUILTIN | CROSS
SERVER = """
kind = "cpu"
name = "arm-server"
source = "a test"
like = "aarch64-dotprod"
llvm = "-mtriple=aarch64-linux-gnu -mcpu=neoverse-n1"
cores = 64
[memory]
bandwidth = "190 GB/s"
launch = "20 ns"
[costs]
linear = 0.9
[[sparse]]
x = "u8"
pattern = "1:4"
gain = 2.5
"""
WHOLE = """
kind = "cpu"
name = "small-core"
source = "a test"
isa = "avx2"
llvm = "skylake"
[vector]
bits = 256
registers = 16
speed = "10 Gop/s"
[memory]
l1 = "32 KiB"
l2 = "256 KiB"
l3 = "2 MiB"
bandwidth = "12 GB/s"
cache = "40 GB/s"
launch = "50 ns"
[[rate]]
x = "u8"
w = "s8"
acc = "s32"
speed = "90 Gop/s"
[[rate]]
x = "f32"
w = "f32"
acc = "f32"
speed = "60 Gop/s"
[[sparse]]
x = "u8"
pattern = "2:4"
gain = 1.5
[[lanes]]
x = "u8"
shared = 1
slope = 1.2
fixed = 0.1
"""


@cache
def captured(name: str) -> tuple[Graph, tuple[Array, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, example = ZOO[name]("tiny")
        return bw.capture(module, example), tuple(np.asarray(x) for x in example)


def test_what_is_not_given_is_that_of_another_target() -> None:
    made, base = parse_processor(SERVER, KNOWN), CROSS["aarch64-dotprod"]
    assert (made.name, made.cores, made.memory_bandwidth, made.launch_seconds) == ("arm-server", 64, 190e9, 2e-8)
    assert (made.isa, made.rates, made.l1_bytes, made.features) == (base.isa, base.rates, base.l1_bytes, base.features)
    assert made.costs.linear == 0.9
    assert made.costs.conv == base.costs.conv
    assert [s.gain for s in made.sparse] == [2.5]
    assert made.sparse_gain(U8, NM(1, 4, 1)) == 2.5
    assert made.sparse_gain(F32, NM(1, 4, 1)) == 0.0


def test_a_file_may_say_everything() -> None:
    made = parse_processor(WHOLE, KNOWN)
    assert isinstance(made, Target)
    assert (made.mcpu, made.arch, made.features, made.cores) == ("skylake", "x86_64", ("avx2", "fma"), 1)
    assert (made.rate(U8, S8), made.l3_bytes, made.vector_ops_per_second) == (90e9, 2 << 20, 1e10)
    assert made.lanes[0].slope == 1.2


@pytest.mark.parametrize("target", list(KNOWN.values()), ids=list(KNOWN))
def test_targets_that_come_along_hold_the_same_rules(target: Target) -> None:
    assert target.vector_bits in WIDTHS[target.isa]
    assert set(NEEDS.get(target.isa, ())) <= set(target.features)
    text = f'kind = "cpu"\nname = "copy"\nsource = "a test"\nlike = "{target.name}"\n'
    made = parse_processor(text, KNOWN)
    assert (made.mcpu, made.rates, made.sparse) == (target.mcpu, target.rates, target.sparse)


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (SERVER, '"190 GB/s"', '"190"', r"p:9: memory.bandwidth: .* is not a quantity such as \"20 GB/s\""),
        (SERVER, "cores = 64", "cores = 0", r"p:7: cores: .*greater than or equal to 1"),
        (SERVER, '"aarch64-dotprod"', '"aarch64-dotprot"', r"p:5: like: no target is called .* mean 'aarch64-dotprod'"),
        (SERVER, '"arm-server"', '"aarch64"', r"p:3: name: aarch64 is the name of a target that comes along"),
        (SERVER, "linear =", "liner =", r"p:12: costs.liner: no cost is called liner; did you mean 'linear'"),
        (SERVER, "neoverse-n1", "neoverse-n11", r"p:6: llvm: LLVM knows no processor 'neoverse-n11'; did you mean"),
        (SERVER, "aarch64-linux-gnu", "riscv64-linux-gnu", r"p: isa: neon-dot kernels are for aarch64"),
        (SERVER, '"-mtriple=aarch64-linux-gnu -mcpu=neoverse-n1"', '"-mtriple=z80 -mcpu=x"\nisa = "vector"',
         r"p:6: llvm: LLVM knows no architecture 'z80'"),
        (SERVER, "neoverse-n1", "cortex-a72", r"p:6: llvm: .* has no dotprod: add -mattr=\+dotprod, or a lesser isa"),
        (SERVER, "-mcpu=", "-mpcu=", r"p:6: llvm: LLVM takes no .*mpcu is none of mcpu"),
        (SERVER, "gain = 2.5", "gain = 25.0", r"arm-server: 1:4 cannot gain 25.0 times"),
        (SERVER, 'pattern = "1:4"', 'pattern = "1/4"', r"p:15: sparse.0.pattern"),
        (WHOLE, "bits = 256", "bits = 128", r"p:8: vector.bits: kernels of avx2 have vectors of 256 bits, not 128"),
        (WHOLE, '"skylake"', '"westmere"', r"p:6: llvm: westmere has no avx2, fma"),
        (WHOLE, 'isa = "avx2"', 'isa = "avx3"', r"p:5: isa: .*avx512-vnni"),
        (WHOLE, 'x = "f32"', 'x = "f33"', r"p:24: rate.1.x: 'f33' is not a number format"),
        (WHOLE, 'l3 = "2 MiB"\n', "", r"p:11: memory: l3 must be given where no like is"),
        (WHOLE, "[vector]", "[vector", r"p is not TOML: .*line"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_line(text: str, old: str, new: str, message: str) -> None:
    assert old in text
    with pytest.raises(InvalidInput, match=message):
        parse_processor(text.replace(old, new, 1), KNOWN, "p")


def test_the_file_of_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    (text,) = (block.split("```")[0] for block in page.split("```toml\n") if block.startswith('kind = "cpu"'))
    assert parse_processor(text, KNOWN).cores == 64


def test_missing_files_are_told() -> None:
    with pytest.raises(InvalidInput, match=r"cannot read the device nowhere\.toml"):
        resolve("nowhere.toml")


@pytest.mark.parametrize("name", ["digits", "mobilenet_v2"])
@pytest.mark.parametrize("kind", ["arm-server", "small-core"])
def test_a_new_processor_is_one_file(name: str, kind: str, tmp_path: Path) -> None:
    """Two models on processors that bitwright has never seen, by the path of a file; the bits of another machine."""
    file = tmp_path / "mine.toml"
    file.write_text(SERVER if kind == "arm-server" else WHOLE)
    if not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("this CPU has no AVX2")
    if kind == "arm-server" and (why := TOOLCHAINS["aarch64"].missing()):
        pytest.skip(why)
    graph, inputs = captured(name)
    recipe = "nm-mask{pattern=1:4}, int8"
    want = bw.compile(graph, target="x86-avx2", recipe=recipe, calibration=[inputs])(*inputs)
    program = bw.compile(graph, target=str(file), recipe=recipe, calibration=[inputs])
    assert program.report.target == kind
    got = (bw.emulate(program) if kind == "arm-server" else program)(*inputs)
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bitwright", *words])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, " ".join((captured.out + captured.err).split())

    file.write_text(SERVER)
    code, said = run("targets", "check", str(file))
    assert (code, "arm-server is consistent, neon-dot kernels" in said) == (0, True)
    code, said = run("targets", "show", str(file))
    assert (code, "u8: 1:4 x2.5" in said) == (0, True)
    file.write_text(SERVER.replace("cores = 64", "cores = -1"))
    code, said = run("targets", "check", str(file))
    assert (code, "cores: Input should be greater" in said) == (2, True)


def test_processors_are_not_simulated(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(SERVER)
    graph, _ = captured("digits")
    with pytest.raises(InvalidInput, match=r"arm-server is a processor: bitwright\.compile compiles for it"):
        bw.simulate(graph, str(file))
