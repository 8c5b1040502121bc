"""What the groups of ``must_reach.py`` share: programs of ours and engines as contenders, and one race of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import deepsparse_form
import engines
import peers
import tables
from claims import Row

import bitwright as bw
from bitwright.runtime.bench import pinned


@dataclasses.dataclass
class Run:
    """How to measure."""

    rounds: int
    seconds: float
    core: int

    def race(self, field: Sequence[engines.Contender], *, sweep: int = 0, wall: bool = False) -> tables.Times:
        with pinned(None if wall else self.core):
            return engines.race(field, rounds=self.rounds, seconds=self.seconds, sweep=sweep, wall=wall)


Found = tuple[list[Row], dict[str, Any]]
"""The rows of a group, and its times in seconds."""


def masked(recipe: str) -> bool:
    return "mask" in recipe


def compiled(
    name: str,
    it: peers.Subject,
    recipe: str,
    missing: dict[str, str],
    *,
    pruned: str = "",
    threads: int = 1,
    target: str = "host",
    calibration: Any = None,
) -> engines.Ours | None:
    """One of ours, or the reason into ``missing``; ``pruned``: weights get zeros before the compiler sees them."""
    module = it.module
    if pruned:
        module = copy.deepcopy(module)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.data[...] = parameter.data.new_tensor(
                    deepsparse_form.pruned(parameter.numpy(force=True), pruned, 1)
                )
    try:
        graph = bw.capture(module, it.inputs)
        data = it.calibration if "int8" in recipe else None
        program = bw.compile(graph, recipe=recipe, calibration=data, target=target)
    except Exception as error:  # a failure of ours is a row of the table too
        missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return None
    layers = [x for x in program.report.layers if x.operations]
    dense = [x for x in layers if x.reason.startswith(("dense", "runs dense"))]
    sparse = [x for x in layers if x.pattern or (x.density or 1.0) < 0.9]
    if (pruned or masked(recipe)) and (not sparse or len(dense) > len(layers) // 2):
        missing[name] = f"no kernel for the pattern: {layers[0].reason}" if layers else "no contraction"
        return None
    return engines.Ours(name, program, it.arrays, threads)


def int8_peers(it: peers.Subject, files: peers.Files, core: Sequence[int], *, sparse: Sequence[str] = (),
               threads: int = 1, deepsparse: bool = True) -> list[engines.Peer]:  # fmt: skip
    """The engines in their best settings, and DeepSparse on each way of pruning."""
    batch = int(it.arrays[0].shape[0])
    disable = {"disable": ["MatMulAddFusion"]} if it.transformer else {}
    kinds = ("", *sparse) if deepsparse else ()
    out: list[tuple[str, str, Callable[[], Any], dict[str, Any]]] = [
        ("ort int8 (qdq)", "onnxruntime", files.qdq, disable),
        ("openvino int8 (qdq)", "openvino", files.qdq, {}),
        ("openvino int8 (qdq, bf16)", "openvino", files.qdq, {"precision": "bf16"}),
        ("openvino int8 (nncf)", "openvino", files.nncf, {}),
        ("openvino int8 (nncf, bf16)", "openvino", files.nncf, {"precision": "bf16"}),
        *((f"deepsparse int8 {k or 'dense'}", "deepsparse", lambda k=k: files.deepsparse(k), {"batch": batch})
          for k in kinds),
        ("torch int8", "torch", files.exported, {"mode": "int8"}),
    ]  # fmt: skip
    if it.transformer:
        out.append(("ort int8 (dynamic)", "onnxruntime", files.dynamic, {}))
    return ready(out, it, core, threads)


def ready(
    wanted: Sequence[tuple[str, str, Callable[[], Any], dict[str, Any]]], it: peers.Subject, cores: Sequence[int],
    threads: int = 1,
) -> list[engines.Peer]:  # fmt: skip
    """Peers with their files made; one whose file cannot be made (no nncf) is left out with a line."""
    found = []
    for name, engine, make, settings in wanted:
        try:
            path = make()
        except Exception as error:  # converters raise classes of their own
            print(f"  {name}: no file: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        if path is not None:
            found.append(engines.Peer(name, engine, path, it.arrays, settings, threads, cores))
    return found


def measured(
    ours: Sequence[engines.Ours | None], others: Sequence[engines.Peer], missing: dict[str, str], run: Run,
    want: Any = None, **options: Any,
) -> tables.Times:  # fmt: skip
    """One race; every peer's outputs are compared with ``want`` first."""
    mine = [x for x in ours if x is not None]
    with engines.started(others, missing) as running:
        for peer in running if want is not None else ():
            error = peers.relative_error(peer.outputs()[0], want)
            print(f"  {peer.name}: {peer.version}, error {error:.3f}", flush=True)
        times = run.race([*running, *mine, *options.pop("more", ())], **options)
    for name, why in missing.items():
        print(f"  {name}: {why}", flush=True)
    return times
