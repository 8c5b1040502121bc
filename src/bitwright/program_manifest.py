"""The manifest of a program just built."""

from __future__ import annotations

import platform

from bitwright._version import __version__
from bitwright.codegen.build import Built
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.runtime.manifest import Launch, Manifest, Pointer, Result, StepRow, TensorSpec


def manifest_of(
    graph: Graph,
    bound: Graph,
    target: Target,
    built: Built,
    symbol: str,
    rows: int,
    threads: int,
    results: dict[str, Result],
) -> Manifest:
    """Of the program that ``bound`` became for ``target``, captured as ``graph``.

    ``symbol``: the batch's, which has been fixed to ``rows`` for a chunk; ``results``: what each step leaves, by label.
    """
    ports = graph if symbol else bound
    inputs = tuple(TensorSpec(name=v.name, dtype=str(v.type.dtype), shape=v.type.shape) for v in ports.inputs)
    outputs = tuple(
        TensorSpec(name=n, dtype=str(ports.types[o].dtype), shape=ports.types[o].shape)
        for n, o in zip(ports.output_names, ports.outputs, strict=True)
    )
    steps = tuple(
        StepRow(label=s.label, kernel=s.kernel_symbol, rows=rows, result=results.get(s.label)) for s in built.plan.steps
    )
    return Manifest(
        name=graph.name, target=target.name, arch=target.arch, inputs=inputs, outputs=outputs, batch=symbol,
        chunks=(rows,), arena_bytes=built.plan.arena_bytes, scratch_bytes=built.plan.scratch_bytes,
        weights_bytes=built.plan.weights_bytes, threads=threads, features=target.features,
        versions={"bitwright": __version__, "python": platform.python_version()}, steps=steps,
        device="cuda" if target.kind == "gpu" else "", input_padding=0 if target.kind == "gpu" else 64,
        launches=_launches(built),
    )  # fmt: skip


def _launches(built: Built) -> tuple[Launch, ...]:
    return tuple(
        Launch(
            kernel=x.kernel, grid=x.grid, threads=x.threads, shared_bytes=x.shared_bytes, nbytes=x.nbytes,
            args=tuple(Pointer(space=p.space, index=p.index, offset=p.offset) for p in x.args),
        )
        for x in built.launches
    )  # fmt: skip
