"""Accumulator certificates in the artifact: complete, checkable by anybody, and damage to them is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bitwright as bw
from bitwright.certificates import check, witness_sum
from bitwright.cli import app
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.runtime.artifact import Contents
from bitwright.runtime.manifest import Certificate, parse_manifest


class Net(nn.Module):
    """A padded convolution, a depthwise one, a grouped one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.c3, self.fc = nn.Conv2d(8, 16, 3, groups=2, stride=2), nn.Linear(16 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c3(torch.relu(self.c2(torch.relu(self.c1(x))))))
        return self.fc(x[..., :2, :2].flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program() -> bw.Program:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    return bw.compile(Net().eval(), example_inputs=x, recipe="int8", calibration=[x])


def changed(contents: Contents, index: int, **fields: Any) -> Contents:
    cs = list(contents.manifest.certificates)
    cs[index] = cs[index].model_copy(update=fields)
    return replace(contents, manifest=contents.manifest.model_copy(update={"certificates": tuple(cs)}))


def test_every_integer_contraction_has_one_that_holds(program: bw.Program, tmp_path: Path) -> None:
    found = program.manifest.certificates
    assert len(found) == program.graph.count("= int_conv(") + program.graph.count("= int_linear(") == 4
    program.save(tmp_path / "m.bw")
    loaded = bw.load(tmp_path / "m.bw")
    assert loaded.manifest.certificates == found
    assert [(c.fault, c.certificate) for c in check(loaded.contents)] == [("", c) for c in found]
    assert parse_manifest(program.manifest.model_dump_json().encode()) == program.manifest
    for c in found:
        assert c.kind == "weights"
        assert c.bits <= c.partial_bits <= c.type_bits < c.acc_bits == 32
        row = next(x for x in program.report.layers if x.name == c.step)
        assert row.accumulator == f"needs {c.bits} of 32 bits (weights)"


def test_the_witness_runs_on_the_kernel(program: bw.Program) -> None:
    """The last layer's witness, as codes through a model of that layer alone, reaches the end of the range."""
    torch.manual_seed(3)
    fc = nn.Linear(70, 5, bias=False)
    x = torch.randn(64, 70)
    x[0, 0], x[0, 1] = -4.0, 4.0
    made = bw.compile(fc, example_inputs=x[:1], recipe="int8", calibration=[x])
    c = made.manifest.certificates[0]
    low, high = c.x
    scale = float(8 / 255)
    for side, bits, row in ((c.range[1], c.high, c.rows[1]), (c.range[0], c.low, c.rows[0])):  # type: ignore[index]
        up = np.unpackbits(np.frombuffer(__import__("base64").b64decode(bits), np.uint8))[:70]
        codes = np.where(up, high, low)
        y = made(((codes - c.x_zero) * np.float32(scale)).astype(np.float32)[None])
        w = fc.weight.detach().numpy()
        step = np.abs(w[row]).max() / 127 * scale
        assert y[0, row] == pytest.approx(side * step, rel=1e-5)


def test_a_changed_certificate_is_found(program: bw.Program) -> None:
    good = program.contents
    c = good.manifest.certificates[3]
    assert c.rows is not None
    flipped = "AAAA" + c.high[4:] if not c.high.startswith("AAAA") else "////" + c.high[4:]
    for fields, why in (
        ({"range": (c.range[0], c.range[1] + 1)}, "sums lie in"),
        ({"partial_range": (0, 1)}, "sums lie in"),
        ({"bits": c.bits - 1}, "says otherwise"),
        ({"headroom": 31}, "says otherwise"),
        ({"high": flipped}, "input given for the high end"),
        ({"low": "AA=="}, "bytes for"),
        ({"x": (3, 250)}, "inputs lie in 0..255"),
        ({"x_zero": c.x_zero + 1}, "another contraction"),
        ({"acc_bits": 64}, "another contraction"),
        ({"digest": "00"}, "not the ones that were certified"),
        ({"bits": 33}, "the accumulator has 32"),
    ):
        bad = [k for k in check(changed(good, 3, **fields)) if not k.ok]
        assert [k.certificate.value for k in bad] == [c.value]
        assert why in bad[0].fault
    none = good.manifest.model_copy(update={"certificates": good.manifest.certificates[1:]})
    assert "no certificate" in check(replace(good, manifest=none))[0].fault


@pytest.mark.parametrize("layer", range(4))
def test_changed_weights_are_found(program: bw.Program, layer: int) -> None:
    stored = program.manifest.certificates[layer].stored
    assert stored is not None
    for place in range(len(stored.places)):
        weights = program.contents.weights.copy()
        weights[stored.places[place][0]] ^= 1
        faults = [k.fault for k in check(replace(program.contents, weights=weights))]
        assert ("start values" if place else "packed") in faults[layer]
        assert not any(f for i, f in enumerate(faults) if i != layer)


def test_masked_weights_are_read_back_through_their_indices() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    target = "x86-avx512-vnni" if "avx512_vnni" in cpu_flags() else "host"
    program = bw.compile(
        nn.Linear(64, 32), example_inputs=x, recipe="nm-mask{pattern=1:4}, int8", calibration=[x], target=target
    )
    (found,) = check(program.contents)
    assert found.ok
    assert found.certificate.terms == 16


def test_a_proof_by_formats_names_its_pairs() -> None:
    class Scores(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b.transpose(1, 2)

    a, b = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    recipe = "observe-ranges, quantize-int8{matmul=true}"
    program = bw.compile(Scores(), example_inputs=(a, b), recipe=recipe, calibration=[(a, b)])
    (c,) = program.manifest.certificates
    assert c.kind == "type"
    assert c.high_pair is not None
    assert c.terms is not None
    assert c.terms * (c.high_pair[0] - c.x_zero) * (c.high_pair[1] - c.w_zero) == c.range[1]
    assert check(program.contents)[0].ok
    assert "sums lie in" in check(changed(program.contents, 0, range=(0, 5)))[0].fault
    assert "not the extreme" in check(changed(program.contents, 0, low_pair=(0, 0)))[0].fault


def test_the_command_line_shows_and_checks(program: bw.Program, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    torch.export.save(torch.export.export(Net().eval(), (x,)), tmp_path / "m.pt2")
    np.savez(tmp_path / "x.npz", x=x.numpy())
    run = CliRunner()
    made = run.invoke(
        app, ["compile", str(tmp_path / "m.pt2"), "--recipe", "int8", "--calibrate", str(tmp_path / "x.npz")]
    )
    assert made.exit_code == 0
    assert "(weights)" in run.invoke(app, ["inspect", str(tmp_path / "m.bw")]).stdout
    assert "of 32 bits (weights)" in run.invoke(app, ["inspect", str(tmp_path / "m.bw"), "--why", "c1"]).stdout
    command = ["verify", str(tmp_path / "m.bw"), str(tmp_path / "m.pt2"), "--input", str(tmp_path / "x.npz")]
    good = run.invoke(app, command)
    assert good.exit_code == 0
    loaded = bw.load(tmp_path / "m.bw")
    c = loaded.manifest.certificates[0]
    bad = changed(loaded.contents, 0, range=(c.range[0], c.range[1] + 5))
    bw.Program(bad).save(tmp_path / "m.bw")
    result = run.invoke(app, command)
    assert result.exit_code == 1
    assert f"do not hold: {c.value}" in result.stdout


def test_sums_of_huge_values_are_exact() -> None:
    c = Certificate(value="y", step="y", kind="weights", acc_bits=64, x=(-(2**62), 2**62), w=(-128, 127), x_zero=1)
    row = np.full(1000, 127, np.int8)
    assert witness_sum(row, __import__("base64").b64encode(b"\xff" * 125).decode(), c) == 1000 * 127 * (2**62 - 1)


def test_every_layer_of_a_wide_network_is_proved_from_its_packed_weights() -> None:
    """A sixth of BERT-base's weights, as they lie in the artifact."""
    torch.manual_seed(0)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                m for _ in range(2) for m in (nn.Linear(768, 768), nn.Linear(768, 3072), nn.Linear(3072, 768))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for m in self.layers:
                x = m(x)
            return x

    x = torch.randn(1, 768)
    program = bw.compile(Wide().eval(), example_inputs=x, recipe="int8", calibration=[x])
    found = check(program.contents)
    assert len(found) == 6
    assert all(k.ok for k in found)
    assert sum(c.stored.places[0][1] for c in program.manifest.certificates if c.stored) >= 2 * 9 * 768 * 768
