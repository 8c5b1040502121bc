"""Whole models as freestanding C: the self-test of each runs here and, emulated, on Arm and RISC-V; budgets hold."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import bitwright as bw
from bitwright.c_program import CProgram, parse_size
from bitwright.cli import app
from bitwright.codegen.c.toolchain import TOOLCHAINS, toolchain
from bitwright.ir.errors import BitwrightError, InvalidInput
from tests.zoo import ZOO

INT4_2_4 = "nm-mask{pattern=2:4}, observe-ranges, quantize-weights{bits=4}, quantize-int8"
TERNARY = "observe-ranges, quantize-weights{bits=ternary}, quantize-int8"
FEW = ["digits", "resnet18", "mobilenet_v2"]


@cache
def compiled(name: str, recipe: str) -> CProgram:
    """A tiny zoo model, calibrated on its example inputs, one sample at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, example = ZOO[name]("tiny")
        graph = bw.capture(module, example)
    data = [tuple(np.asarray(x) for x in example)]
    return bw.compile_c(graph, recipe=recipe, calibration=data, name=name)


def usable(*names: str) -> list[Any]:
    """Toolchains as test parameters, skipped with the reason where they are not installed."""
    return [
        pytest.param(n, marks=pytest.mark.skipif(bool(why), reason=why))
        for n in names
        for why in (toolchain(n).missing(),)
    ]


@pytest.mark.parametrize("name", [n for n in ZOO if n != "bert_eager"])
def test_every_int8_model_runs_as_c(name: str) -> None:
    program = compiled(name, "int8")
    assert program.self_test() == 0
    assert program.source.arena_bytes <= 1.15 * program.source.bound_bytes


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("recipe", ["float", "nm-mask{pattern=2:4}, int8", INT4_2_4, TERNARY])
def test_masks_and_low_bits_run_as_c(name: str, recipe: str) -> None:
    assert compiled(name, recipe).self_test() == 0


@pytest.mark.parametrize("chain", usable("aarch64", "riscv64"))
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("recipe", ["int8", INT4_2_4])
def test_the_same_bits_on_other_machines(name: str, recipe: str, chain: str) -> None:
    program = compiled(name, recipe)
    assert program.source.exact  # the self-test compares bits
    assert program.self_test(chain) == 0


@pytest.mark.parametrize("chain", usable("cortex-m0", "cortex-m4", "cortex-m7", "cortex-m55"))
def test_sizes_on_small_cores(chain: str) -> None:
    program = compiled("digits", "int8")
    found = program.sizes(chain)
    assert found.tables == pytest.approx(program.source.table_bytes, abs=64)
    assert found.ram == program.source.arena_bytes
    assert 500 < found.code < 8000


def test_masks_and_bits_shrink_the_tables() -> None:
    sizes = [compiled("resnet18", r).source.table_bytes for r in ("int8", "nm-mask{pattern=2:4}, int8", INT4_2_4)]
    assert sizes[1] < 0.75 * sizes[0]
    assert sizes[2] < 0.62 * sizes[1]


def test_a_wrong_result_is_counted(tmp_path: Path) -> None:
    """The self-test can fail: with one weight changed it does."""
    program = compiled("digits", "int8")
    program.save(tmp_path / "m")
    file = tmp_path / "m" / "weights.c"
    text = file.read_text()
    start = text.index("int8_t digits_")
    at = text.index("{", start)
    file.write_text(text[: at + 1] + text[at + 1 :].replace(" 1,", " 99,", 40))
    from bitwright.codegen.c.toolchain import run_self_test

    assert run_self_test(tmp_path / "m", TOOLCHAINS["host"]) > 0


# --- budgets and errors --------------------------------------------------------------------------------------


def test_budgets_name_the_layers_that_do_not_fit() -> None:
    program = compiled("digits", "int8")
    found = program.check_budget(1 << 20, 1 << 20, "host")
    assert found.flash < 1 << 20
    with pytest.raises(InvalidInput, match=r"flash .* where 4\.0 KiB are allowed; the largest layers: .*KiB.*quantize"):
        program.check_budget(4096, None, "host")
    with pytest.raises(InvalidInput, match=r"RAM .* where 1\.0 KiB are allowed; layers whose .* KiB"):
        program.check_budget(None, 1024, "host")


@pytest.mark.parametrize("text", ["", "x", "-3K", "0", "4G"])
def test_sizes_are_checked(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not a size"):
        parse_size(text)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    program = compiled("digits", "int8")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"holds other files \(notes.txt\)"):
        program.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_toolchains_are_told() -> None:
    with pytest.raises(InvalidInput, match="no C compiler is known for 'z80'"):
        toolchain("z80")


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BitwrightError, match="apt-get install gcc-aarch64-linux-gnu"):
        compiled("digits", "int8").self_test("aarch64")


def test_programs_are_not_loaded_on_c() -> None:
    with pytest.raises(InvalidInput, match="compile_c"):
        bw.compile(compiled("digits", "int8").source.graph, target="c")


# --- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import torch

    module, example = ZOO["digits"]("tiny")
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, example, str(path), dynamo=False, input_names=["image"])
    np.savez(tmp_path / "x.npz", image=np.asarray(example[0]))
    return path


def test_the_command_line_writes_a_folder(model: Path) -> None:
    data = str(model.with_name("x.npz"))
    arguments = ["compile", str(model), "-t", "c", "-r", "int8", "-c", data, "--cc", "host", "--flash", "1M"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    folder = model.with_name("net_c")
    written = {p.name for p in folder.iterdir()}
    assert {"model.c", "model.h", "weights.c", "selftest.c", "Makefile", "report.json"} <= written
    assert "void net_run(const float *image" in (folder / "model.h").read_text()
    assert "of static RAM" in done.output


def test_budgets_belong_to_c(model: Path) -> None:
    done = CliRunner().invoke(app, ["compile", str(model), "--flash", "1M"])
    assert isinstance(done.exception, InvalidInput) or "budgets of --target c" in done.output
