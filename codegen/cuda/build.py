"""From a kernel-level graph to a GPU program: choose kernels, compile them, plan memory and launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bitwright.codegen.build import Built, blob_of, program_of, row_of, select
from bitwright.codegen.cache import Cache
from bitwright.codegen.cuda.launches import check_shape, launches_of
from bitwright.codegen.cuda.machine_code import require_compiler
from bitwright.codegen.cuda.package import Kernel, bundle, unpacked
from bitwright.codegen.jobs import Job, compile_all
from bitwright.codegen.plan import plan
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target

if TYPE_CHECKING:
    from bitwright.codegen.tuning.space import Records
    from bitwright.codegen.tvm.select import Choice

Progress = Callable[[str, float], None]


def build_gpu(
    graph: Graph,
    target: Target,
    *,
    cache: Cache | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    records: Records | None = None,
) -> Built:
    """Build a static kernel-level graph for a GPU ``target``; no device, driver or CUDA toolkit is needed.

    Raises :class:`Unsupported` listing every region without a kernel, :class:`InvalidInput` without NVRTC.
    """
    require_compiler()
    from bitwright.codegen.tvm.cuda.compile import compile_gpu
    from bitwright.codegen.tvm.select import Order

    graph, choices = select(graph, target, records)
    orders = {c.key: c for c in choices.values()}
    jobs = [Job(c.key, c.symbol, Order(c.template, c.body, c.config, c.symbol)) for c in orders.values()]
    before = cache.misses if cache else 0

    def report(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress(f"compile {name}", done / max(total, 1))

    made = compile_all(compile_gpu, jobs, workers, cache=cache, progress=report)
    kernels = {c.symbol: unpacked(made[c.key]) for c in orders.values()}
    for name, kernel in kernels.items():
        check_shape(name, kernel.launch, target)
    steps, buffers, data = program_of(graph, choices)
    planned = plan(steps, buffers, graph.outputs)
    scratch = {c.symbol: len(c.config.args) for c in choices.values() if c.config.scratch_bytes}
    launches = launches_of(planned, {name: k.launch for name, k in kernels.items()}, scratch)
    rows = tuple(row_of(n, choices[n.output]) for n in graph.nodes if n.output in choices)
    compiled = cache.misses - before if cache else len(jobs)
    notes = tuple(_spilling(kernels, choices))
    library = bundle(list(kernels.values()))
    return Built(library, blob_of(planned, data), planned, graph, rows, "", compiled, notes, launches)


def _spilling(kernels: Mapping[str, Kernel], choices: Mapping[str, Choice]) -> list[str]:
    """A note for every kernel that keeps registers in memory: it is slower than it should be."""
    places = {c.symbol: output for output, c in reversed(list(choices.items()))}
    return [
        f"kernel {name} of {places[name]} keeps {k.resources.spill_stores} bytes of its registers in memory"
        for name, k in kernels.items()
        if k.resources.spill_stores
    ]
