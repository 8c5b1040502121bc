"""``bitwright bench``: a program timed alone, by layer, or in interleaved rounds with onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitwright import cli_show
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime import units
from bitwright.runtime.bench import measure
from bitwright.runtime.program import Program

Arrays = Mapping[str, Any]


def bench(program: Program, arrays: Arrays, peer: Path | None, *, threads: int, rounds: int) -> None:
    """Print time per call: best and median of the rounds, and the ratio to the peer."""
    values = list(arrays.values())
    calls: dict[str, Callable[[], object]] = {"bitwright": lambda: program(*values, threads=threads)}
    if peer:
        calls["onnxruntime"] = onnxruntime_call(peer, arrays, threads)
    timings = measure(calls, rounds=rounds)
    rows = []
    for name in calls:
        series = timings[name]
        ratio = "" if name == "bitwright" else str(timings.ratio(name, "bitwright"))
        rows.append((name, units.seconds(series.best), units.seconds(series.median), ratio))
    heads = ["", ">best", ">median", ">time over bitwright's"]
    out = cli_show.console()
    out.print(cli_show.table(heads if peer else heads[:3], rows if peer else [r[:3] for r in rows]))
    shapes = ", ".join(f"{n} {list(getattr(a, 'shape', ()))}" for n, a in arrays.items())
    out.print(f"{threads} thread{'s' if threads > 1 else ''}, {rounds} rounds, {shapes}", markup=False)


def profile(program: Program, arrays: Arrays, *, threads: int) -> None:
    """Print time per step of the program."""
    steps = program.profile(*arrays.values(), threads=threads, repeats=20)
    total = sum(s.seconds for s in steps) or 1.0
    rows = ((s.label, s.kernel, units.seconds(s.seconds), units.percent(s.seconds / total)) for s in steps if s.seconds)
    cli_show.console().print(cli_show.table(["layer", "kernel", ">time", ">share"], rows))


def onnxruntime_call(model: Path, arrays: Arrays, threads: int) -> Callable[[], object]:
    """A call of onnxruntime's processor back end on the same inputs; raises :class:`InvalidInput`."""
    try:
        import onnxruntime as ort  # type: ignore[import-untyped]
    except ImportError as error:
        raise BitwrightError("onnxruntime is not installed: pip install onnxruntime") from error
    if not model.is_file():
        raise InvalidInput(f"there is no file {model}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        feed = dict(arrays) if set(names) == set(arrays) else dict(zip(names, arrays.values(), strict=True))
        session.run(None, feed)
    except Exception as error:  # onnxruntime raises its own classes, which have no common base
        raise InvalidInput(f"onnxruntime cannot run {model} on these inputs: {error}") from error
    return lambda: session.run(None, feed)
