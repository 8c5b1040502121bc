"""One peer in an interpreter of its own: reads commands as lines of JSON, answers each with a line of JSON.

Started by ``engines.py``; needs numpy and the engine only, so that an engine whose pins fit nobody else can take part.

- ``{"do": "load", "engine", "path", "inputs", "threads", "settings"}``: ``{"seconds": to load, "version"}``
- ``{"do": "run", "output"}``: writes the outputs of one call as .npz
- ``{"do": "sample", "seconds", "sweep"}``: repeats the call; ``{"wall", "cpu"}`` seconds a call, CPU of all threads.
  ``sweep``: bytes that are read between calls (outside the timing), so that weights come from memory.
- ``{"error": text}`` in place of any answer.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, Any]
Call = Callable[[], list[Any]]


def onnxruntime(path: str, arrays: Arrays, threads: int, settings: dict[str, Any]) -> Call:
    """Every graph optimisation; ``disable``: optimizers that hide a MatMul from int8 fusion."""
    import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=settings.get("disable", [])
    )
    feed = {i.name: arrays[i.name] for i in session.get_inputs()}
    return lambda: list(session.run(None, feed))


def openvino(path: str, arrays: Arrays, threads: int, settings: dict[str, Any]) -> Call:
    """Latency hint; ``precision`` f32 unless told (bf16 is the engine's default on such a core)."""
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]

    chosen = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": settings.get("precision", "f32"), **settings.get("more", {}),
    }  # fmt: skip
    request = ov.Core().compile_model(path, "CPU", chosen).create_infer_request()
    feed = {n: arrays[n] for i in request.model_inputs for n in i.names if n in arrays}

    def call() -> list[Any]:
        result = request.infer(feed, share_inputs=True, share_outputs=True)
        return [result[o] for o in request.model_outputs]

    return call


def deepsparse(path: str, arrays: Arrays, threads: int, settings: dict[str, Any]) -> Call:
    """Of the 1.8.0 that is left; ``batch``: the first dimension of the inputs."""
    from deepsparse import Engine  # type: ignore[import-not-found,unused-ignore]

    engine = Engine(path, batch_size=settings["batch"], num_cores=threads)
    feed = [arrays[n] for n in engine.input_names]
    return lambda: list(engine.run(feed))


def torch(path: str, arrays: Arrays, threads: int, settings: dict[str, Any]) -> Call:
    """An exported program (.pt2): ``mode`` eager, inductor or int8 (static pt2e through inductor); ``bf16``."""
    import torch as t
    from torch._inductor import config

    t.set_num_threads(threads)
    inputs = tuple(t.from_numpy(a) for a in arrays.values())
    module: Any = t.export.load(path).module()
    if settings.get("bf16"):
        module = module.to(t.bfloat16)
        inputs = tuple(x.to(t.bfloat16) if x.is_floating_point() else x for x in inputs)
    if settings.get("mode") == "int8":
        from torchao.quantization.pt2e import (  # type: ignore[import-not-found,unused-ignore]
            move_exported_model_to_eval,
            quantize_pt2e,
        )
        from torchao.quantization.pt2e.quantizer import (  # type: ignore[import-not-found,unused-ignore]
            x86_inductor_quantizer as x86,
        )

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        module = quantize_pt2e.prepare_pt2e(module, quantizer)
        module(*inputs)
        module = move_exported_model_to_eval(quantize_pt2e.convert_pt2e(module))
    if settings.get("mode", "eager") != "eager":
        config.freezing = True
        module = t.compile(module)

    def call() -> list[Any]:
        with t.inference_mode():
            result = module(*inputs)
        return [x.float().numpy() for x in (result if isinstance(result, list | tuple) else [result])]

    return call


ENGINES: dict[str, Callable[[str, Arrays, int, dict[str, Any]], Call]] = {
    "onnxruntime": onnxruntime, "openvino": openvino, "deepsparse": deepsparse, "torch": torch,
}  # fmt: skip


def sample(call: Call, seconds: float, sweep: Any) -> dict[str, float]:
    """Repeat for about so many seconds; per call. ``sweep``: an array that is read before each call, or None."""
    wall = cpu = 0.0
    count, end = 0, time.perf_counter() + seconds
    while count == 0 or time.perf_counter() < end:
        if sweep is not None:
            sweep.sum()
        own, began = time.process_time(), time.perf_counter()
        for _ in range(1 if sweep is not None else 4):
            call()
            count += 1
        wall += time.perf_counter() - began
        cpu += time.process_time() - own
    return {"wall": wall / count, "cpu": cpu / count}


class Session:
    """What one process holds between commands."""

    call: Call
    sweep: Any = None

    def load(self, it: dict[str, Any]) -> dict[str, Any]:
        stored = np.load(it["inputs"])
        began = time.perf_counter()
        name = it["engine"]
        self.call = ENGINES[name](it["path"], {k: stored[k] for k in stored.files}, it["threads"], it["settings"])
        return {"seconds": time.perf_counter() - began, "version": importlib.metadata.version(name)}

    def run(self, it: dict[str, Any]) -> dict[str, Any]:
        np.savez(it["output"], *self.call())
        return {}

    def sample(self, it: dict[str, Any]) -> dict[str, Any]:
        if it["sweep"] and self.sweep is None:
            self.sweep = np.ones(it["sweep"] // 8)
        return sample(self.call, it["seconds"], self.sweep if it["sweep"] else None)


def main() -> None:
    """Answer until the commands end; what engines print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(session, command["do"])(command)
        except Exception as error:  # engines raise classes of their own, which have no common base
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
