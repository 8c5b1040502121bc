"""Runs the ONNX backend test suite on bitwright: pass, noise (wider tolerance), refused, wrong, error; writes JSON.

python benchmarks/onnx_suite.py [-k WORD] [--executor interpreter|compiled] [--json FILE] [--list CATEGORY]
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from bitwright.frontends.onnx.backend import Backend, Executor, interpreter
from bitwright.ir.errors import Unsupported

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
SECONDS = 30
NOISE = {
    "test_dft_inverse": (1e-3, 1e-6),  # expected: the 2e-7 rounding noise of an f32 FFT around an exact 0
    "test_dft_inverse_opset19": (1e-3, 1e-6),
    "test_attention_4d_causal_fp16_expanded": (2e-3, 1e-7),  # rtol 1e-3 is less than two f16 roundings
}
"""Cases that pass at this (rtol, atol) only, each with its reason; reported apart from the passes."""


class TimedOut(BaseException):
    """A case ran past its limit."""


def cases(word: str = "") -> Iterator[Any]:
    """Every case of the suite whose name contains ``word``, once each."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            yield from (c for c in load_model_tests(kind=kind) if word in c.name)


def data_of(case: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Inputs and expected outputs of a case."""
    if case.data_sets is not None:
        for inputs, outputs in case.data_sets:
            yield [_array(x) for x in inputs], [_array(x) for x in outputs]
        return
    model = onnx.load(Path(case.model_dir) / "model.onnx")
    for folder in sorted(Path(case.model_dir).glob("test_data_set*")):
        yield (
            [
                _read(folder / f"input_{i}.pb", v)
                for i, v in enumerate(model.graph.input)
                if (folder / f"input_{i}.pb").exists()
            ],
            [_read(folder / f"output_{i}.pb", v) for i, v in enumerate(model.graph.output)],
        )


def _array(x: Any) -> Any:
    return numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


def _read(path: Path, v: onnx.ValueInfoProto) -> Any:
    data = path.read_bytes()
    if v.type.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if v.type.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def run_case(case: Any, executor: Executor) -> tuple[str, str]:
    """Category and detail of one case."""
    from onnx.backend.test.runner import Runner

    rtol, atol = NOISE.get(case.name, (case.rtol, case.atol))
    try:
        model = case.model or onnx.load(Path(case.model_dir) / "model.onnx")
        prepared = Backend.prepare(model, "CPU", executor)
        for inputs, expected in data_of(case):
            outputs = prepared.run(inputs)
            Runner.assert_similar_outputs(expected, list(outputs), rtol, atol)
    except Unsupported as e:
        return "refused", "; ".join(str(p) for p in e.problems)
    except AssertionError as e:
        return "wrong", str(e)[:600]
    except Exception as e:
        if any(not isinstance(x, np.ndarray | np.generic) for s in data_of(case) for x in s[0]):
            return "refused", "an input that is no tensor"
        return "error", f"{type(e).__name__}: {e}"[:600]
    return ("noise" if case.name in NOISE else "pass"), ""


def timed(case: Any, executor: Executor) -> tuple[str, str]:
    """:func:`run_case` with a time limit."""

    def stop(*_: object) -> None:
        raise TimedOut

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return run_case(case, executor)
    except TimedOut:
        return "error", f"ran past {SECONDS} s"
    finally:
        signal.alarm(0)


def executor_of(name: str) -> Executor:
    """The reference interpreter, or the whole compiler."""
    if name == "interpreter":
        return interpreter
    from bitwright.driver import onnx_executor

    return onnx_executor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only cases whose name contains this")
    parser.add_argument("--executor", choices=("interpreter", "compiled"), default="interpreter")
    parser.add_argument("--json", type=Path, help="write the categories with their cases here")
    parser.add_argument("--list", default="", help="print the cases of these categories (comma separated)")
    options = parser.parse_args()
    executor = executor_of(options.executor)
    results: dict[str, dict[str, str]] = {"pass": {}, "noise": {}, "refused": {}, "wrong": {}, "error": {}}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases(options.k):
            category, detail = timed(case, executor)
            results[category][f"{case.kind}/{case.name}"] = detail
    for category in options.list.split(","):
        for name, detail in results.get(category, {}).items():
            print(f"{category}: {name}: {detail}")
    counts = Counter({k: len(v) for k, v in results.items()})
    print(f"{sum(counts.values())} cases in {time.perf_counter() - start:.0f} s: {dict(counts)}")
    if options.json:
        versions = {"onnx": onnx.__version__, "executor": options.executor}
        options.json.write_text(json.dumps({"versions": versions, "counts": counts, **results}, indent=1) + "\n")
    return 1 if counts["wrong"] or counts["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
