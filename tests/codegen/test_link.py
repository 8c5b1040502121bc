"""Linking: same bytes for the same input, only our symbols visible, missing ones named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.link import find_compiler, link
from bitwright.codegen.main_c import Variant, main_c
from bitwright.codegen.plan import Arg, Buffer, Step, plan
from bitwright.ir.errors import BitwrightError


def compile_c(source: str, folder: Path, name: str = "k") -> bytes:
    (folder / f"{name}.c").write_text(source)
    subprocess.run(["gcc", "-O2", "-fPIC", "-c", f"{name}.c"], cwd=folder, check=True)
    return (folder / f"{name}.o").read_bytes()


KERNEL = "#include <stdint.h>\nvoid k(int32_t b, int32_t e, float* x, float* y) { y[b] = x[b]; }\n"


@pytest.fixture
def main_text() -> str:
    steps = [Step("k", 1, (Arg("x"), Arg("y", access="w")))]
    return main_c([Variant(plan(steps, [Buffer("x", 4, "input"), Buffer("y", 4)], ["y"]))])


def symbols(library: bytes, folder: Path) -> tuple[set[str], set[str]]:
    """(exported, undefined) dynamic symbols."""
    (folder / "s.so").write_bytes(library)
    text = subprocess.run(["nm", "-D", "s.so"], cwd=folder, capture_output=True, text=True, check=True).stdout
    rows = [line.split()[-2:] for line in text.splitlines()]
    return {n for kind, n in rows if kind in "TRDBV"}, {n.split("@")[0] for kind, n in rows if kind in "Uw"}


def test_only_the_interface_is_exported(main_text: str, tmp_path: Path) -> None:
    library = link({"k": compile_c(KERNEL, tmp_path)}, main_text, openmp=False)
    exported, undefined = symbols(library, tmp_path)
    assert exported == {"bw_run", "bw_profile", "bw_trace", "bw_info", "bw_abi_version"}
    assert {n for n in undefined if not n.startswith("_")} <= {"clock_gettime", "memcpy"}


def test_linking_is_reproducible(main_text: str, tmp_path: Path) -> None:
    objects = {"k": compile_c(KERNEL, tmp_path)}
    assert link(objects, main_text, openmp=True) == link(objects, main_text, openmp=True)


def test_a_missing_kernel_is_named(main_text: str) -> None:
    with pytest.raises(BitwrightError, match=r"no object defines k$"):
        link({}, main_text, openmp=False)


def test_missing_helpers_are_all_named(main_text: str, tmp_path: Path) -> None:
    source = KERNEL.replace("y[b] = x[b];", "extern void TVMThing(void); extern float expf(float);")
    source = source.replace("; }", "; TVMThing(); y[0] = expf(x[0]); other(); }").replace(
        "void k", "void other();\nvoid k"
    )
    with pytest.raises(BitwrightError, match="no object defines TVMThing, other"):
        link({"k": compile_c(source, tmp_path)}, main_text, openmp=False)


def test_the_mathematics_library_is_there(main_text: str, tmp_path: Path) -> None:
    source = "#include <math.h>\n" + KERNEL.replace("x[b];", "expf(x[b]);")
    assert "expf" in symbols(link({"k": compile_c(source, tmp_path)}, main_text, openmp=False), tmp_path)[1]


def test_kernels_defined_twice_are_named(main_text: str, tmp_path: Path) -> None:
    data = compile_c(KERNEL, tmp_path)
    with pytest.raises(BitwrightError, match="two objects define k"):
        link({"a": data, "b": data}, main_text, openmp=False)


def test_weak_helpers_may_repeat(main_text: str, tmp_path: Path) -> None:
    weak = "\n__attribute__((weak)) int helper(void) { return 1; }\n"
    objects = {"a": compile_c(KERNEL + weak, tmp_path, "a"), "b": compile_c(weak, tmp_path, "b")}
    assert link(objects, main_text, openmp=False).startswith(b"\x7fELF")


def test_a_damaged_object_is_an_error(main_text: str, tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match="linking the program failed"):
        link({"k": b"\x7fELF" + bytes(100)}, main_text, openmp=False)


def test_no_compiler_is_a_clear_error(main_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BitwrightError, match=r"no C compiler found \(tried no-such-cc\)"):
        link({}, main_text, openmp=False, cc="no-such-cc")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("BITWRIGHT_CC", raising=False)
    assert find_compiler()[0] in ("cc", "gcc", "clang")
    monkeypatch.setenv("BITWRIGHT_CC", "gcc -m64")
    assert find_compiler() == ["gcc", "-m64"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BitwrightError, match="install gcc or clang"):
        find_compiler()


def test_without_openmp_the_program_is_single_threaded(main_text: str, tmp_path: Path) -> None:
    fake = tmp_path / "cc-no-openmp"
    fake.write_text('#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec gcc "$@"\n')
    fake.chmod(0o755)
    notes: list[str] = []
    library = link({"k": compile_c(KERNEL, tmp_path)}, main_text, openmp=True, cc=str(fake), notes=notes)
    assert b'"openmp":false' in library
    assert len(notes) == 1
    assert "one thread" in notes[0]
    assert not any("GOMP" in s for s in symbols(library, tmp_path)[1])


def test_a_program_that_was_linked_before_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {\n  %y = relu(%x) : f32[2, 8]\n}\n"
    (tmp_path / "g.bw-ir").write_text(text)
    linked: list[str] = []

    def counted(*args: Any, **options: Any) -> bytes:
        linked.append(args[1])
        return link(*args, **options)

    monkeypatch.setattr("bitwright.codegen.build.link", counted)
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    for _ in range(2):
        program = bw.compile(tmp_path / "g.bw-ir", cache_dir=tmp_path / "cache")
        assert np.array_equal(program(x), np.maximum(x, 0))
    assert len(linked) == 1
    bw.compile(tmp_path / "g.bw-ir", target="x86-avx2", cache_dir=tmp_path / "cache")
    assert len(linked) == 2
