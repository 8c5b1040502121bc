"""Devices on paper: what their files may say, which instruction runs what and why, bits equal to the reference."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitwright as bw
from bitwright import cli
from bitwright.codegen.devices import library
from bitwright.codegen.devices.check import steps_that_fit
from bitwright.codegen.devices.schema import Device, parse_device
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.codegen.devices.units import quantity
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import NM, TensorType, parse_dtype
from tests.zoo import ZOO

Array = np.ndarray[Any, Any]
NPU8 = library.text_of("npu8")
NARROW = """
name = "narrow"
source = "a test"
clock = "100 MHz"
[weights]
size = "1 MiB"
bandwidth = "8 B/cycle"
[activations]
size = "1 MiB"
bandwidth = "8 B/cycle"
[registers]
size = "4096 bits"
[[instruction]]
name = "dot4"
lanes = 4
depth = 8
meaning = '''
(%x: u4[b, 8], %w: s4[o, 8], %acc: s16[b, o]) -> (y = %y) level=integer {
  %p = int_linear(%x, %w) : s32[b, o]
  %a = cast(%acc) {dtype=s32} : s32[b, o]
  %s = add(%a, %p) : s32[b, o]
  %y = saturate(%s) {dtype=s16} : s16[b, o]
}'''
"""


@cache
def captured(name: str) -> tuple[Graph, tuple[Array, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, example = ZOO[name]("tiny")
        return bw.capture(module, example), tuple(np.asarray(x) for x in example)


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", library.names())
def test_devices_that_come_along_are_consistent(name: str) -> None:
    device = library.find_device(name)
    assert device.name == name
    assert device.target().kind == "device"
    assert all(len(i.spelling) < 200 for i in device.instruction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('clock = "400 MHz"', 'clock = "400 MB"'), r"npu:5: clock: .* is not a quantity such as \"200 MHz\""),
        (('bandwidth = "16 B/cycle"', 'bandwidth = "16"'), r"npu:10: weights.bandwidth: .*8 B/cycle"),
        (("lanes = 16", "lanes = 0"), r"npu:27: instruction.0.lanes: .*greater than or equal to 1"),
        (("lanes = 16", "lanes = 999"), r"npu:27: instruction.0.lanes: one step holds .* bits .* fewer lanes"),
        (("lanes = 16", "lanse = 16"), r"npu:2[78]: instruction.0.lan"),
        (("%x: u8[b, 32]", "%x: u8[b, 31]"), r"npu:30: instruction.0.meaning: the meaning is no graph"),
        (("int_linear(%x, %w)", "int_lineal(%x, %w)"), r"npu:30: instruction.0.meaning: the meaning is no graph"),
        (('name = "dot8.sp"', 'name = "dot8"'), r"npu:3\d: instruction.1.name: two instructions are called dot8"),
        (("nm<2:4, axis=1>", "nm<3:5, axis=1>"), r"64 terms a step are no whole groups of 5"),
        (("[registers]", "[registers"), r"npu is not TOML: .*line"),
        (('source = "no', 'sauce = "no'), r"source: Field required"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_line(change: tuple[str, str], message: str) -> None:
    assert change[0] in NPU8
    with pytest.raises(InvalidInput, match=message):
        parse_device(NPU8.replace(*change, 1), "npu")


def test_sums_that_one_step_overflows_need_a_word() -> None:
    tight = NARROW.replace("s16", "s10")
    assert parse_device(tight).instruction[0].parsed.saturates
    wrapping = tight.replace("%y = saturate(%s) {dtype=s10} : s10[b, o]", "%y = cast(%s) {dtype=s10} : s10[b, o]")
    assert steps_that_fit(parse_device(tight).instruction[0]) == 0
    with pytest.raises(InvalidInput, match=r"8 products of one step can exceed s10.*saturate, or a wider"):
        parse_device(wrapping)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("1.5 MiB", "bytes", 1.5 * 2**20), ("2 kB", "bytes", 2000), ("0.2 pJ/B", "joule/byte", 2e-13),
     ("1e3 Hz", "hertz", 1000), ("4 KiB/cycle", "bytes/cycle", 4096)],
)  # fmt: skip
def test_units(text: str, unit: Any, value: float) -> None:
    assert quantity(text, unit) == pytest.approx(value)


# --- selection -----------------------------------------------------------------------------------------------


def layer(x: str, w: Array, weight: str, nm: NM | None = None, rows: int = 3) -> Graph:
    """A kernel-level graph of one linear layer with sums in s32."""
    b = Builder("layer", "kernel")
    xt, wt = TensorType(parse_dtype(x), (rows, w.shape[1])), TensorType(parse_dtype(weight), w.shape, nm)
    given, ref = b.input("x", xt), b.weight("w", w, wt)
    inner = Builder("body", "integer")
    inner.input("x", xt)
    inner.input("w", wt)
    body = inner.finish([inner.emit(ops.IntLinear(), "x", "w", name="y")])
    return b.finish([b.emit_all(ops.Region(body, "contraction"), given, ref, names=("y",))[0]])


def chosen(graph: Graph, device: Device) -> str:
    (found,) = schedule(graph, device).chosen.values()
    return found.instruction.name if found.instruction else "vector"


def test_the_mask_decides() -> None:
    device, rng = parse_device(NPU8), np.random.default_rng(0)
    w = rng.integers(1, 9, (16, 128)).astype(np.int8)
    assert chosen(layer("u8", w, "s8"), device) == "dot8"
    w[:, ::4] = w[:, 1::4] = 0
    assert chosen(layer("u8", w, "s8", NM(2, 4, 1)), device) == "dot8.sp"


def test_formats_decide() -> None:
    with pytest.raises(Unsupported, match="dot8: takes x in u8, this is s8"):
        schedule(layer("s8", np.ones((4, 8), np.int8), "s8"), parse_device(NPU8))
    assert chosen(layer("u4", np.ones((4, 8), np.int8), "s4"), parse_device(NPU8)) == "dot8"


def test_sums_are_proved_before_a_narrow_accumulator_runs_them() -> None:
    device = parse_device(NARROW)
    assert chosen(layer("u4", np.ones((4, 64), np.int8), "s4"), device) == "dot4"
    heavy = np.full((4, 400), 7, np.int8)
    with pytest.raises(Unsupported, match=r"dot4: its s16 sums can overflow: 17 bits are needed \(constrain-weights"):
        schedule(layer("u4", heavy, "s4"), device)


def test_what_does_not_fit_the_memories_is_named() -> None:
    device = parse_device(NPU8.replace('size = "4 MiB"', 'size = "1 KiB"'))
    with pytest.raises(InvalidInput, match="its weights take 2048 bytes, the memory holds 1024; the largest: y 2048"):
        schedule(layer("u8", np.ones((16, 128), np.int8), "s8"), device)
    device = parse_device(NPU8.replace('size = "512 KiB"', 'size = "1 KiB"'))
    with pytest.raises(InvalidInput, match="exceed the 1024 bytes for activations: y"):
        schedule(layer("u8", np.ones((16, 128), np.int8), "s8", rows=16), device)


def test_steps_are_counted() -> None:
    made = schedule(layer("u8", np.ones((17, 65), np.int8), "s8", rows=5), parse_device(NPU8))
    assert made.layers[0].steps == 5 * 2 * 3  # rows, 17 outputs by 16, 65 terms by 32
    assert made.layers[0].macs == 5 * 17 * 65


# --- bits ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1 << 30), st.sampled_from(["npu8", "narrow"]))
def test_random_contractions_have_the_references_bits(seed: int, which: str) -> None:
    """2,000 rows each: more than 10^5 contractions."""
    rng = np.random.default_rng(seed)
    device = parse_device(NPU8 if which == "npu8" else NARROW)
    x, w = ("u8", "s8") if which == "npu8" else ("u4", "s4")
    k = int(rng.integers(1, 150))
    t = parse_dtype(w)
    weights = rng.integers(t.lo, t.hi + 1, (int(rng.integers(1, 20)), k)).astype(np.int8)
    graph = layer(x, weights, w, rows=2000)
    data = rng.integers(0, parse_dtype(x).hi + 1, (2000, k)).astype(np.uint8)
    data[0], data[1] = 0, parse_dtype(x).hi
    got = simulate(schedule(graph, device), [data])
    assert np.array_equal(got[0], to_numpy(evaluate(graph, [data])[0]))


@pytest.mark.parametrize("name", ["digits", "resnet18", "resnet50", "mobilenet_v2", "bert_base", "unet"])
@pytest.mark.parametrize("recipe", ["int8", "nm-mask{pattern=2:4}, int8"])
def test_models_have_the_references_bits(name: str, recipe: str) -> None:
    graph, example = captured(name)
    done = bw.simulate(graph, "npu8", recipe=recipe, calibration=[example])
    assert done.identical
    assert done.schedule.cycles > 0
    names = {x.instruction for x in done.schedule.layers}
    assert ("dot8.sp" in names) == ("2:4" in recipe)


def test_an_instruction_that_loses_bits_is_found_out() -> None:
    """The comparison can fail: a meaning that drops the last term is not the layer's."""
    broken = NPU8.replace("%p = int_linear(%x, %w) : s32[b, o]\n  %y = add(%acc, %p)", 
        "%p = int_linear(%x, %w) : s32[b, o]\n  %y = sub(%acc, %p)", 1)  # fmt: skip
    graph = layer("u8", np.ones((4, 8), np.int8), "s8")
    data = np.ones((3, 8), np.uint8)
    got = simulate(schedule(graph, parse_device(broken)), [data])
    assert not np.array_equal(got[0], to_numpy(evaluate(graph, [data])[0]))


def test_a_new_device_is_one_file(tmp_path: Path) -> None:
    """Two models on a device that bitwright has never seen, by the path of its file."""
    file = tmp_path / "mine.toml"
    file.write_text(NPU8.replace('name = "npu8"', 'name = "mine"').replace("lanes = 16", "lanes = 8"))
    for name in ("digits", "mobilenet_v2"):
        graph, example = captured(name)
        done = bw.simulate(graph, str(file), recipe="int8", calibration=[example])
        assert done.identical
        assert done.schedule.device.name == "mine"


def test_the_worked_example_of_the_docs(tmp_path: Path) -> None:
    """The device of docs/devices.md, as printed there, runs two models; masked layers get its masked instruction."""
    page = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()
    file = tmp_path / "mychip.toml"
    file.write_text(page.split("```toml\n")[1].split("```")[0])
    recipe = "nm-mask{pattern=1:4}, observe-ranges, quantize-weights{bits=4}, quantize-int8"
    for name in ("digits", "resnet18"):
        graph, example = captured(name)
        done = bw.simulate(graph, str(file), recipe=recipe, calibration=[example])
        assert done.identical
        assert "dot4.quarter" in {x.instruction for x in done.schedule.layers}


# --- the command line ----------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def test_targets_show_and_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "targets") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in library.names())
    assert run(monkeypatch, "targets", "show", "npu8") == 0
    assert "u8 x s8 2:4" in capsys.readouterr().out
    file = tmp_path / "bad.toml"
    file.write_text(NPU8.replace("depth = 32", "depth = -1"))
    assert run(monkeypatch, "targets", "check", file) == 2
    assert "instruction.0.depth" in capsys.readouterr().err
    assert run(monkeypatch, "targets", "show", "npu9") == 2
    assert "did you mean 'npu8'" in capsys.readouterr().err


def test_simulate_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitwright.ir.text import show

    graph, example = captured("digits")
    (tmp_path / "net.bw-ir").write_text(show(graph))
    graph.weights.save(tmp_path / "net.safetensors")
    named: dict[str, Any] = {graph.inputs[0].name: example[0]}
    np.savez(tmp_path / "x.npz", **named)
    arguments = ["simulate", tmp_path / "net.bw-ir", "-t", "npu8", "-c", tmp_path / "x.npz", "-o", tmp_path / "y.npz"]
    assert run(monkeypatch, *arguments) == 0
    assert "identical to the reference" in capsys.readouterr().out
    assert np.load(tmp_path / "y.npz").files == list(graph.output_names)


def test_compile_points_to_simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph, _ = captured("digits")
    with pytest.raises(InvalidInput, match="simulate"):
        bw.compile(graph, target="npu8")
