"""reconstruct: solved layers kept on disk, layers left alone with the reason, bad calibration data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes._manager import PassFailed, run_pipeline
from bitwright.passes._spec import parse_passes
from bitwright.passes.sparsity import _reconstruction, _sweep
from bitwright.passes.sparsity._resume import Store
from bitwright.passes.sparsity.nm_mask import NMMask
from bitwright.passes.sparsity.reconstruct import Reconstruct

Read = Callable[..., Graph]
TWO = """
    graph @g (%x: f32[b, 16]) -> (y = %y) level=graph {
      %w1 = weight {ref="block/fc1.weight"} : f32[8, 16]
      %b1 = weight {ref="block/fc1.bias"} : f32[8]
      %h = linear(%x, %w1, %b1) : f32[b, 8]
      %w2 = weight {ref="fc2.weight"} : f32[8, 8]
      %y = linear(%h, %w2) : f32[b, 8]
    }
"""


def batches(*shape: int, count: int = 2) -> list[Any]:
    rng = np.random.default_rng(0)
    return [[rng.standard_normal(shape).astype(np.float32)] for _ in range(count)]


def run(graph: Graph, spec: str, data: list[Any]) -> tuple[Graph, Context]:
    context = Context(calibration=data)
    return run_pipeline(graph, parse_passes(spec), context, crash_dir=None)[0], context


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers solved so far, rather than read from disk."""
    names: list[str] = []

    def rebuild(layer: _reconstruction.Layer, *rest: Any) -> str:
        names.append(layer.name)
        return _reconstruction.rebuild(layer, *rest)

    monkeypatch.setattr(_sweep, "rebuild", rebuild)
    return names


def test_solved_layers_are_read_again(read: Read, tmp_path: Path, solved: list[str]) -> None:
    graph, data, place = read(TWO), batches(40, 16), tmp_path / "new" / "place"
    spec = f'nm-mask, reconstruct{{resume="{place}"}}'
    first, told = run(graph, spec, data)
    assert solved == ["block/fc1", "fc2"]
    assert sorted(p.name[:9] for p in place.iterdir()) == ["block_fc1", "fc2.npz"]
    second, again = run(graph, spec, data)
    assert len(solved) == 2
    assert second.fingerprint == first.fingerprint
    for (_, _, a), (_, _, b) in zip(told.remarks[2:], again.remarks[2:], strict=True):
        assert b["resume"] == "read"
        assert (a["error_before"], a["error_after"], a["rows"]) == (b["error_before"], b["error_after"], b["rows"])
    run(graph, "nm-mask, reconstruct", data)
    assert len(solved) == 4
    run(graph, f'nm-mask, reconstruct{{damping=0.1 resume="{place}"}}', data)
    assert len(solved) == 6
    run(graph, spec, batches(41, 16))
    assert len(solved) == 8
    run(graph, spec.replace("nm-mask,", "nm-mask{pattern=1:4},"), data)
    assert len(solved) == 10


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "shape", "nan"])
def test_a_damaged_file_is_ignored_and_replaced(read: Read, tmp_path: Path, solved: list[str], damage: str) -> None:
    graph, data, file = read(TWO), batches(40, 16), tmp_path / "fc2.npz"
    spec = f'nm-mask, reconstruct{{resume="{tmp_path}"}}'
    first, _ = run(graph, spec, data)
    with np.load(file) as saved:
        parts = dict(saved)
    if damage in ("empty", "cut", "noise"):
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"noise"}[damage])
    else:
        parts["weight"] = parts["weight"][4:] if damage == "shape" else np.full_like(parts["weight"], 0xFF)
        np.savez(file, **parts)
    after, context = run(graph, spec, data)
    assert solved == ["block/fc1", "fc2", "fc2"]
    assert context.remarks[-1][2]["resume"] == "fc2.npz is damaged and was ignored"
    assert after.fingerprint == first.fingerprint
    run(graph, spec, data)
    assert len(solved) == 3


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, values = Store(str(tmp_path)), {"weight": np.ones((2, 2), np.float16)}
    store.write("fc", "k", values, {"error_after": 0.5})
    before = (tmp_path / "fc.npz").read_bytes()

    def break_off(out: Any, **arrays: Any) -> None:
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", break_off)
    with pytest.raises(InvalidInput, match="No space left"):
        store.write("fc", "k2", values, {})
    assert [p.name for p in tmp_path.iterdir()] == ["fc.npz"]
    assert (tmp_path / "fc.npz").read_bytes() == before
    found = store.read("fc", "k", values)
    assert not isinstance(found, str)
    assert found[0]["weight"].tolist() == [[1, 1], [1, 1]]
    assert found[1] == {"error_after": 0.5}
    assert store.read("fc", "k2", values) == ""
    file = tmp_path / "a file"
    file.write_text("")
    with pytest.raises(InvalidInput, match="cannot be a directory"):
        Store(str(file / "below"))


def test_layers_whose_names_differ_in_signs_have_files_of_their_own(tmp_path: Path) -> None:
    store, one = Store(str(tmp_path)), np.ones(1, np.float32)
    for i, name in enumerate(("a/b", "a_b", "a b", "../a")):
        store.write(name, "k", {"weight": one * i}, {})
    for i, name in enumerate(("a/b", "a_b", "a b", "../a")):
        found = store.read(name, "k", {"weight": one})
        assert not isinstance(found, str)
        assert found[0]["weight"][0] == i
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("mask", "option", "layer", "reason"),
    [
        ("nm-mask{only=fc2}", "", "block/fc1", "its weight has no mask"),
        ("nm-mask{except=fc2}", "only=fc2", "fc2", "its weight has no mask"),
        ("nm-mask", "only=fc3", "model", "only=fc3 except= selects no contraction"),
    ],
)
def test_refused(read: Read, mask: str, option: str, layer: str, reason: str) -> None:
    _, context = run(read(TWO), f"{mask}, reconstruct{{{option}}}", batches(40, 16))
    assert [(r.place, r.reason) for r in context.refusals if r.pass_name == "reconstruct"] == [(layer, reason)]


def refusals(graph: Graph, data: list[Any], **facts: Any) -> list[str]:
    context = Context(calibration=data, facts=facts)
    assert Reconstruct().run(graph, context) is graph
    return [f"{r.place}: {r.reason}" for r in context.refusals]


def test_dense_values_must_be_known_and_the_weight_untouched(read: Read) -> None:
    text = """
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8] nm<2:4, axis=1>
          %y = linear(%x, %w) : f32[2, 4]
        }
    """
    graph, data = read(text), batches(2, 8)
    assert refusals(graph, data) == ["fc: the dense values of its weight are unknown"]
    assert refusals(graph, data, dense={"fc.weight": "lost"}) == ["fc: its weight was changed after it was masked"]
    other = read(text.replace(" nm<2:4, axis=1>", ""), {"fc.weight": np.ones((4, 8), np.float32)})
    changed = {"fc.weight": other.weights["fc.weight"]}
    assert refusals(graph, data, dense=changed) == ["fc: its weight was changed after it was masked"]


def test_other_contractions_are_refused(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8, 4, 4], %z: f32[4, 4]) -> (a = %a, b = %b, c = %c, d = %d) level=graph {
          %w1 = weight {ref="grouped.weight"} : f32[8, 4, 1, 1]
          %a = conv(%x, %w1) {groups=2} : f32[2, 8, 4, 4]
          %w2 = weight {ref="up.weight"} : f32[8, 4, 2, 2]
          %b = conv_transpose(%x, %w2) : f32[2, 4, 5, 5]
          %c = linear(%x, %z) : f32[2, 8, 4, 4]
          %w3 = weight {ref="batched.weight"} : f32[8, 4, 4]
          %d = matmul(%x, %w3) : f32[2, 8, 4, 4]
        }
    """)
    data = [[np.zeros((2, 8, 4, 4), np.float32), np.zeros((4, 4), np.float32)]]
    assert refusals(graph, data) == [
        "grouped: grouped convolution", "up: transposed convolution",
        "c: its weight is computed, not a float constant", "batched: weight of rank 3",
    ]  # fmt: skip


def test_a_weight_that_others_read_and_inputs_without_content(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[b, 8], %i: s64[2]) -> (y = %y, e = %e) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8]
          %y = linear(%x, %w) : f32[b, 4]
          %e = gather(%w, %i) : f32[2, 8]
        }
    """)
    index = np.zeros(2, np.int64)
    assert refusals(graph, [[np.ones((3, 8), np.float32), index]], dense=dict(graph.weights)) == [
        "fc: its weight is also read by %e"
    ]
    one = read(TWO)
    _, context = run(one, "nm-mask, reconstruct", [[np.zeros((4, 16), np.float32)]])
    assert context.refusals[0].reason == "its input is zero on all calibration data"
    _, context = run(one, "nm-mask, reconstruct", [[np.zeros((0, 16), np.float32)]])
    assert context.refusals[0].reason == "no calibration data reaches it"
    _, context = run(one, "nm-mask, reconstruct{method=sparsegpt damping=0}", batches(3, 16))
    assert "linearly dependent" in context.refusals[0].reason


def test_bad_input(read: Read) -> None:
    graph = read(TWO)
    with pytest.raises(InvalidInput, match=r"reconstruct needs calibration data.*--calibrate"):
        run(graph, "nm-mask, reconstruct", [])
    with pytest.raises(InvalidInput, match=r"reconstruct needs dense.*nm-mask"):
        run(graph, "reconstruct", batches(4, 16))
    with pytest.raises(InvalidInput, match="damping is a number from 0 up, not -1"):
        run(graph, "nm-mask, reconstruct{damping=-1}", batches(4, 16))
    data = batches(4, 16)
    data[1][0][2, 3] = np.nan
    with pytest.raises(InvalidInput, match=r"%x, the input of block/fc1, has NaN in calibration batch 1"):
        run(graph, "nm-mask, reconstruct", data)
    with pytest.raises(InvalidInput, match=r"%x, the input of block/fc1, has NaN in calibration batch 1"):
        run(graph, "nm-mask{score=wanda}", data)
    data[1][0][2, 3] = np.inf
    with pytest.raises(InvalidInput, match="has an infinity"):
        run(graph, "nm-mask, reconstruct", data)
    for wrong, message in (
        ([[np.zeros((2, 15), np.float32)]], "'x' has type"),
        ([[np.zeros((2, 16))]], "given dtype torch.float64"),
        ([[]], "has 0 arrays"),
        ([{"z": np.zeros((2, 16), np.float32)}], r"has inputs \['z'\]"),
    ):
        context = Context(calibration=wrong)
        masked = NMMask().run(graph, context)
        with pytest.raises(InvalidInput, match=message):
            Reconstruct().run(masked, context)


def test_progress_names_the_layers(read: Read) -> None:
    said: list[tuple[str, float]] = []
    context = Context(calibration=batches(40, 16), progress=lambda label, share: said.append((label, share)))
    run_pipeline(read(TWO), parse_passes("nm-mask, reconstruct"), context, crash_dir=None)
    assert [s for s in said if s[0].startswith("reconstruct ")] == [
        ("reconstruct block/fc1", 0.0), ("reconstruct fc2", 0.5)
    ]  # fmt: skip


def test_no_error_of_a_pass_is_hidden(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweep, "rebuild", lambda *_: 1 / 0)
    with pytest.raises(PassFailed, match="ZeroDivisionError"):
        run(read(TWO), "nm-mask, reconstruct", batches(4, 16))
