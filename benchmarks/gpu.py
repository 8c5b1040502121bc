"""Kernels for NVIDIA GPUs on a device: every one against the reference, then timed beside torch's own.

    python benchmarks/gpu.py --prepare gpu-report.zip     here, without a GPU: compiles everything (TVM, NVRTC)
    python benchmarks/gpu.py gpu-report.zip               there: NumPy, ml_dtypes, pydantic, cuda-bindings; no TVM;
                                                          torch for what it is timed against

With ``src`` on PYTHONPATH. First programs of odd sizes are compared with outputs of the reference that were stored when
they were prepared: integers bit for bit, floats within a stated bound. Then the device's peaks are measured, and every
large program is timed by the device's events as a graph of many calls, over copies of its weights that no cache holds,
in rounds that alternate with its peer in the same process (cuBLAS, cuSPARSELt, scaled_dot_product_attention, torch's
int4 product): medians. ``--results FILE`` keeps the
table's numbers as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.types import parse_dtype
from bitwright.runtime.artifact import read
from bitwright.runtime.cuda import CudaProgram, Recorded
from bitwright.runtime.cuda_driver import CudaDriver, Driver, runs_on
from bitwright.runtime.manifest import TensorSpec

Array = np.ndarray[Any, Any]
BOUNDS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest difference over the largest value of a result, by its format."""
ROUNDS = 15
EACH = 32
"""Calls of one side in a round, all in one graph."""
_TOUCHED, _COPIES = 256 << 20, 16
"""Bytes of weights that calls go through before they come back to the same ones: several times the last cache; so many
copies of a layer at most."""


@dataclass(frozen=True)
class Row:
    """One timed program: its kernels, seconds of a call, its peers' (or why there are none), operations and bytes."""

    case: str
    kernels: str
    seconds: float
    against: dict[str, float | str]
    operations: float
    nbytes: float


class Prepared:
    """The zip: cases of the target that runs on a device."""

    def __init__(self, path: Path) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
            self.cases: dict[str, list[dict[str, Any]]] = json.loads(self.archive.read("cases.json"))
        except (OSError, KeyError, zipfile.BadZipFile, ValueError) as error:
            raise InvalidInput(f"{path} was not written by --prepare: {error}") from error

    def program(self, case: dict[str, Any], driver: Driver) -> CudaProgram:
        """A case's program on the device."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.bw"
            path.write_bytes(self.archive.read(f"{case['file']}.bw"))
            contents = read(path)
        return CudaProgram(contents, driver)

    def reference(self, case: dict[str, Any]) -> dict[str, Array]:
        """Stored inputs and outputs, as bytes."""
        with np.load(io.BytesIO(self.archive.read(f"{case['file']}.npz"))) as stored:
            return {k: stored[k] for k in stored.files}


def check(prepared: Prepared, case: dict[str, Any], driver: Driver) -> str:
    """What differs from the reference, or the empty string."""
    program, stored = prepared.program(case, driver), prepared.reference(case)
    inputs = [_shaped(stored[f"x{i}"], t) for i, t in enumerate(program.inputs)]
    result = program(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    for i, (got, t) in enumerate(zip(results, program.outputs, strict=True)):
        if why := difference(got, _shaped(stored[f"y{i}"], t)):
            return why
    return ""


def checked(prepared: Prepared, target: str, driver: Callable[[], Driver]) -> int:
    """Check all programs of a target, a line for each; how many differ."""
    cases = [c for c in prepared.cases.get(target, []) if not c.get("timed", True)]
    wrong = 0
    for case in cases:
        try:
            why = check(prepared, case, driver())
        except BitwrightError as error:
            why = str(error)
        wrong += bool(why)
        told = f"{'WRONG' if why else 'right'}  {case['name']} ({', '.join(dict.fromkeys(case['kernels']))})"
        print(f"{told}: {why}" if why else told, flush=True)
    print(f"{len(cases) - wrong} programs give the reference's results, {wrong} do not", flush=True)
    return wrong


def _shaped(raw: Array, t: TensorSpec) -> Array:
    return raw.view(parse_dtype(t.dtype).numpy).reshape([int(d) for d in t.shape])


def difference(got: Array, want: Array) -> str:
    """Integers must be equal; floats as near as :data:`BOUNDS` says."""
    if want.dtype.kind in "iub":
        wrong = int((got != want).sum())
        return f"{wrong} of {want.size} integers differ" if wrong else ""
    wide, reference = got.astype(np.float64), want.astype(np.float64)
    if not np.array_equal(np.isfinite(wide), np.isfinite(reference)):
        return "NaN or infinities in other places"
    off = float(np.abs(wide - reference).max() / max(float(np.abs(reference).max()), 1e-30)) if want.size else 0.0
    return f"off by {off:.2g} of the largest value" if off > BOUNDS.get(want.dtype.name, 1e-6) else ""


def timed(prepared: Prepared, case: dict[str, Any], driver: Driver, with_torch: bool) -> Row:
    """Seconds of a case and of its peer, in rounds that alternate."""
    first = prepared.program(case, driver)
    copies = min(_COPIES, max(1, _TOUCHED // max(first.manifest.weights_bytes, 1)))
    programs = [first, *(CudaProgram(first.contents, driver) for _ in range(copies - 1))]
    rng = np.random.default_rng(0)
    runs = [p.record(*(_random(t, rng) for t in p.inputs)) for p in programs]
    chain = runs * max(1, EACH // copies)
    ours_all = Recorded.chained(chain)
    others = _others(case, copies) if with_torch and case["peer"] else {}
    ours, theirs = [], {name: [] for name, call in others.items() if callable(call)}
    for _ in range(ROUNDS):
        ours.append(ours_all.seconds() / len(chain))
        for name, times in theirs.items():
            times.append(others[name]() / len(chain))
    kernels = ", ".join(dict.fromkeys(case["kernels"]))
    found = {n: statistics.median(theirs[n]) if n in theirs else str(call) for n, call in others.items()}
    return Row(case["name"], kernels, statistics.median(ours), found, case["operations"], case["nbytes"])


def _others(case: dict[str, Any], copies: int) -> dict[str, Any]:
    """What a case is timed against: by name a call that gives seconds of all calls, or why there is none."""
    import gpu_peers

    found: dict[str, Any] = {}
    for kind in gpu_peers.peers(case["peer"]):
        try:
            made = [gpu_peers.peer(kind, case["sizes"]) for _ in range(copies)]
            found[made[0][0]] = gpu_peers.recorded([call for _, call in made] * max(1, EACH // copies))
        except Exception as error:  # torch's own refusals are of every type
            found[kind] = f"none: {str(error).splitlines()[0][:60] if str(error) else type(error).__name__}"
    return found


def _random(t: TensorSpec, rng: np.random.Generator) -> Array:
    shape, dtype = [int(d) for d in t.shape], parse_dtype(t.dtype).numpy
    if dtype.kind in "iu":
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def table(rows: list[Row], peaks: dict[str, float]) -> str:
    """One line per program."""
    lines = [f"{'program':<44}{'kernel':<16}{'us':>9}{'Top/s':>8}{'GB/s':>8}{'of peak':>9}  against"]
    for r in rows:
        ops, nbytes = r.operations / r.seconds, r.nbytes / r.seconds
        of = ""
        if peaks:
            kind = "s8" if r.case.startswith("s8") else "f16"
            gain = 2.0 if "2:4" in r.case and not r.case[0].isdigit() else 1.0
            of = f"{max(ops / (peaks[kind] * gain), nbytes / peaks['bytes']):.0%}"
        beside = ", ".join(f"{n} {t if isinstance(t, str) else f'{t / r.seconds:.2f}x'}" for n, t in r.against.items())
        lines.append(
            f"{r.case:<44}{r.kernels:<16}{r.seconds * 1e6:>9.1f}{ops / 1e12:>8.1f}{nbytes / 1e9:>8.0f}{of:>9}  {beside}"
        )
    return "\n".join(lines)


def report(path: Path, results: Path | None) -> int:
    """Check, measure, print; the number of programs that differ from the reference."""
    prepared = Prepared(path)
    targets = {"cuda-sm90": "sm_90a", "cuda-sm80": "sm_80"}
    probe = _device(targets)
    if probe is None:
        return 0
    target, device = probe
    wrong = checked(prepared, target, lambda: CudaDriver(targets[target]))
    with_torch = importlib.util.find_spec("torch") is not None
    peaks: dict[str, float] = {}
    if with_torch:
        import gpu_peers

        peaks = gpu_peers.peaks()
        told = {"bytes": f"{peaks['bytes'] / 1e12:.2f} TB/s", "f16": f"{peaks['f16'] / 1e12:.0f} Top/s"}
        print(f"measured peaks: copy {told['bytes']}, cuBLAS f16 {told['f16']}, bytes {peaks['s8'] / 1e12:.0f} Top/s")
    cases = [c for c in prepared.cases.get(target, []) if c.get("timed")]
    rows = [timed(prepared, c, CudaDriver(targets[target]), with_torch) for c in cases]
    print(table(rows, peaks))
    if results:
        kept = {"device": device, "target": target, "wrong": wrong, "peaks": peaks, "rows": [asdict(r) for r in rows]}
        results.write_text(json.dumps(kept, indent=1) + "\n")
    return wrong


def _device(targets: dict[str, str]) -> tuple[str, str] | None:
    """The target of the first device and the device's name; without one, says so."""
    last = ""
    for target, arch in targets.items():
        try:
            found = CudaDriver(arch)
            assert runs_on(arch, found.capability)
            return target, found.name
        except BitwrightError as error:
            last = str(error)
    print(f"nothing was run and nothing is claimed: {last}")
    return None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", nargs="?", type=Path, help="the zip to run")
    parser.add_argument("--prepare", type=Path, metavar="ZIP", help="compile everything into this file")
    parser.add_argument("--only", default="", help="prepare the cases whose name contains this")
    parser.add_argument("--checks", action="store_true", help="prepare only what is checked, not what is timed")
    parser.add_argument("--targets", default="cuda-sm90,cuda-sm80", help="prepare for these")
    parser.add_argument("--results", type=Path, help="JSON to write")
    given = parser.parse_args()
    try:
        if given.prepare:
            import gpu_prepare

            gpu_prepare.prepare(given.prepare, given.targets.split(","), given.only, given.checks)
        if given.prepared:
            return report(given.prepared, given.results)
    except BitwrightError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
