"""onnxruntime, OpenVINO and torch on the same models, each in its best settings: adapters for the benchmarks.

A :class:`Subject` is a model with inputs; :func:`contenders` turns it into named calls, all on one thread. What was
found to matter, each by measurement on this kind of machine:

- onnxruntime: QDQ models, weights per channel, u8 activations (BERT-base: s8 takes three times as long); in
  transformers only linear layers are quantized and ``MatMulAddFusion`` is off (it can hide MatMul from int8 fusion),
  and dynamic quantization runs too (BERT-base: up to 8 % faster than QDQ);
- OpenVINO: ``INFERENCE_PRECISION_HINT`` is bf16 by default on this processor: float is measured in f32, int8 with both
  (bf16 gains 3 % in BERT-base); int8 by nncf when an interpreter that has it is named in ``BITWRIGHT_NNCF_PYTHON``,
  and from onnxruntime's QDQ model;
- both: attention is exported as matmul, softmax, matmul; torch's own form carries an IsNaN guard that blocks fusion.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[], list[Array]]

FORMAT = b"1"
"""Raise it when a change here makes the files of earlier runs wrong."""

NNCF = """
import sys
import nncf, numpy as np, openvino as ov
source, data, output, transformer = sys.argv[1:]
stored = np.load(data)
numbers = range(int(stored["count"]))
batches = [{k.split("/", 1)[1]: stored[k] for k in stored.files if k.startswith(f"{i}/")} for i in numbers]
kind = nncf.ModelType.TRANSFORMER if transformer == "1" else None
model = nncf.quantize(ov.Core().read_model(source), nncf.Dataset(batches), model_type=kind, subset_size=len(batches),
                      target_device=nncf.TargetDevice.CPU)
ov.save_model(model, output, compress_to_fp16=False)
"""


INT4 = """
import sys
import nncf, openvino as ov
source, output, group = sys.argv[1:]
model = ov.Core().read_model(source)
kind = nncf.CompressWeightsMode.INT4_SYM
ov.save_model(nncf.compress_weights(model, mode=kind, group_size=int(group), all_layers=True), output)
"""


@dataclass
class Subject:
    """A model to race: ``module`` in eval mode, one call's inputs, calibration inputs in the same order."""

    name: str
    module: Any
    inputs: tuple[Any, ...]
    calibration: list[tuple[Array, ...]]
    transformer: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.names = tuple(f"x{i}" for i in range(len(self.inputs)))

    @property
    def arrays(self) -> list[Array]:
        return [x.numpy() for x in self.inputs]

    def reference(self) -> Array:
        import torch

        with torch.no_grad():
            result: Array = self.module(*self.inputs).numpy()
        return result

    def batches(self) -> Iterator[dict[str, Array]]:
        for batch in self.calibration:
            yield dict(zip(self.names, batch, strict=True))


@dataclass
class Contender:
    """One engine ready to run; ``error`` is the largest difference from eager over the largest output."""

    name: str
    call: Call
    error: float
    note: str = ""


def versions() -> dict[str, str]:
    """Of every package that takes part."""
    out = {}
    for name in ("bitwright", "apache-tvm", "onnxruntime", "openvino", "torch", "onnx", "numpy", "transformers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    python = os.environ.get("BITWRIGHT_NNCF_PYTHON")
    if python:
        line = [python, "-c", "import importlib.metadata as m; print(m.version('nncf'))"]
        out["nncf"] = subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()
    return out


def relative_error(got: Array, want: Array) -> float:
    return float(np.abs(got.astype(np.float64) - want).max() / max(np.abs(want).max(), 1e-30))


def masked_reference(graph: Any, subject: Subject, recipe: str, dense: Array) -> Array:
    """The float output of the captured model under the mask that a recipe begins with (else ``dense``)."""
    from bitwright import driver
    from bitwright.ir.interpret import evaluate
    from bitwright.passes.pipelines import CANONICAL

    mask = recipe.partition(", ")[0]
    if not mask.startswith("nm-mask"):
        return dense
    masked, _ = driver.optimize(graph, f"{CANONICAL}, {mask}")
    result: Array = evaluate(masked, subject.arrays)[0].numpy()
    return result


class Files:
    """The subject's ONNX and OpenVINO files, made when asked for and kept between runs."""

    def __init__(self, subject: Subject, root: Path | None = None) -> None:
        source = FORMAT + (Path(__file__).parents[1] / "tests" / "zoo.py").read_bytes()
        shapes = repr([(x.shape, x.dtype) for x in subject.inputs]).encode()
        root = root or Path(tempfile.gettempdir()) / f"bitwright-bench-{os.getuid()}"
        self.subject = subject
        self.folder = root / f"{subject.name}-{hashlib.sha256(source + shapes).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        final = self.folder / name
        if not final.exists():
            make(final)
        return final

    def float32(self) -> Path:
        """The model by torch's exporter, attention spelled out."""
        return self._made("float.onnx", lambda path: self._export(path, {"dynamo": True}))

    def opset14(self) -> Path:
        """The same by torch's older exporter, for engines that read no later operator set."""
        return self._made("opset14.onnx", lambda path: self._export(path, {"dynamo": False, "opset_version": 14}))

    def _export(self, path: Path, options: dict[str, Any]) -> None:
        import torch

        s = self.subject
        inner: Any = getattr(s.module, "model", None)
        spelled = s.transformer and hasattr(inner, "set_attn_implementation")
        before = inner.config._attn_implementation if spelled else ""
        if spelled:
            inner.set_attn_implementation("eager")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                s.module, s.inputs, str(path), external_data=False, verbose=False, input_names=list(s.names), **options
            )
        if spelled:
            inner.set_attn_implementation(before)

    def exported(self) -> Path:
        """The exported program that torch's own compilers start from."""

        def make(path: Path) -> None:
            import torch

            with torch.no_grad():
                torch.export.save(torch.export.export(self.subject.module, self.subject.inputs), str(path))

        return self._made("exported.pt2", make)

    def int4_onnxruntime(self, group: int = 128) -> Path:
        """Linear layers as MatMulNBits: 4-bit weights with a scale a group, activations in 8 bits on the fly."""

        def make(path: Path) -> None:
            import onnx
            from onnxruntime.quantization import (  # type: ignore[import-untyped,unused-ignore]
                matmul_nbits_quantizer as q,
            )

            options = {"block_size": group, "is_symmetric": True, "accuracy_level": 4}
            quantizer = q.MatMulNBitsQuantizer(onnx.load(str(self._with_matmuls())), **options)
            quantizer.process()
            if not any(n.op_type == "MatMulNBits" for n in quantizer.model.model.graph.node):
                raise ValueError("the file has no MatMul to quantize")
            quantizer.model.save_model_to_file(str(path))

        return self._made(f"int4-{group}-nbits.onnx", make)

    def _with_matmuls(self) -> Path:
        """torch's older exporter writes a linear layer without bias as MatMul, the newer one as Gemm."""
        try:
            return self.opset14()
        except Exception:  # it does not know every operator
            return self.float32()

    def int4_openvino(self, group: int = 128) -> Path | None:
        """nncf's weight compression; None without an interpreter that has it."""
        python = os.environ.get("BITWRIGHT_NNCF_PYTHON")
        if not python:
            return None

        def make(path: Path) -> None:
            line = [python, "-c", INT4, str(self._with_matmuls()), str(path), str(group)]
            subprocess.run(line, check=True, capture_output=True)

        return self._made(f"int4-{group}.xml", make)

    def deepsparse(self, kind: str = "", *, integers: bool = True) -> Path:
        """The model in DeepSparse's own form, its weights pruned in a way of :func:`deepsparse_form.pruned`."""
        from deepsparse_form import Form, ranges_of

        def make(path: Path) -> None:
            form = Form(self.opset14())
            if kind:
                form.prune(kind)
            if integers:
                form.quantize(ranges_of(self.opset14(), form.tensors(), self.subject.batches()))
            form.save(path)

        return self._made(f"deepsparse-{'int8' if integers else 'float'}-{kind or 'dense'}.onnx", make)

    def qdq(self) -> Path:
        """onnxruntime's static quantization: u8 per tensor, s8 per channel."""

        def make(path: Path) -> None:
            from onnxruntime import quantization as q  # type: ignore[import-untyped,unused-ignore]
            from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped,unused-ignore]

            class Reader(q.CalibrationDataReader):  # type: ignore[misc,unused-ignore]
                def __init__(self, batches: Iterator[dict[str, Array]]) -> None:
                    self.batches = batches

                def get_next(self) -> dict[str, Array] | None:  # type: ignore[override,unused-ignore]
                    return next(self.batches, None)

            prepared = self.folder / "prepared.onnx"
            quant_pre_process(str(self.float32()), str(prepared), skip_symbolic_shape=True)
            q.quantize_static(
                str(prepared), str(path), Reader(self.subject.batches()), quant_format=q.QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm", "Conv"] if self.subject.transformer else None,
                per_channel=True, activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip

        return self._made("qdq.onnx", make)

    def dynamic(self) -> Path:
        """onnxruntime's dynamic quantization: activations' ranges are found at run time."""

        def make(path: Path) -> None:
            from onnxruntime import quantization as q  # type: ignore[import-untyped,unused-ignore]

            q.quantize_dynamic(str(self.float32()), str(path), per_channel=True, weight_type=q.QuantType.QInt8)

        return self._made("dynamic.onnx", make)

    def nncf(self) -> Path | None:
        """nncf's post-training quantization of the same model; None without an interpreter that has it."""
        python = os.environ.get("BITWRIGHT_NNCF_PYTHON")
        if not python:
            return None

        def make(path: Path) -> None:
            data: dict[str, Any] = {f"{i}/{k}": v for i, b in enumerate(self.subject.batches()) for k, v in b.items()}
            np.savez(self.folder / "data.npz", count=len(self.subject.calibration), **data)
            line = [python, "-c", NNCF, str(self.float32()), str(self.folder / "data.npz"), str(path)]
            subprocess.run([*line, str(int(self.subject.transformer))], check=True, capture_output=True)

        return self._made("nncf.xml", make)


def onnxruntime_call(path: Path, arrays: Sequence[Array], *, disable: Sequence[str] = ()) -> Call:
    """A session on one thread with every optimisation."""
    import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disable)
    )
    known = {i.name for i in session.get_inputs()}
    feed = {f"x{i}": a for i, a in enumerate(arrays) if f"x{i}" in known}

    def call() -> list[Array]:
        return list(session.run(None, feed))

    return call


def openvino_call(path: Path, arrays: Sequence[Array], *, precision: str = "f32") -> Call:
    """A latency request on one thread, inputs and outputs shared."""
    import openvino as ov  # type: ignore[import-not-found,import-untyped,unused-ignore]

    settings = {
        "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    known = {n for i in request.model_inputs for n in i.names}
    feed = {f"x{i}": a for i, a in enumerate(arrays) if f"x{i}" in known}

    def call() -> list[Array]:
        result = request.infer(feed, share_inputs=True, share_outputs=True)
        return [result[o] for o in request.model_outputs]

    return call


def torch_call(subject: Subject, *, inductor: bool = False) -> Call:
    """torch eager, or its own compiler with frozen weights."""
    import torch

    torch.set_num_threads(1)
    module, inputs = subject.module, subject.inputs
    if inductor:
        from torch._inductor import config

        config.freezing = True
        module = torch.compile(module)

    def call() -> list[Array]:
        with torch.inference_mode():
            return [module(*inputs).numpy()]

    return call


def bitwright_call(program: Any, arrays: Sequence[Array]) -> Call:
    """A compiled program on one thread."""
    values = tuple(arrays)

    def call() -> list[Array]:
        result = program(*values)
        return list(result) if isinstance(result, tuple) else [result]

    return call


def peer_calls(subject: Subject, files: Files, *, torch: bool = False) -> dict[str, Callable[[], Call]]:
    """How to make each peer's call; a maker raises what its engine raises."""
    arrays = subject.arrays
    disable = ["MatMulAddFusion"] if subject.transformer else []
    out: dict[str, Callable[[], Call]] = {
        "ort float": lambda: onnxruntime_call(files.float32(), arrays),
        "openvino float": lambda: openvino_call(files.float32(), arrays),
        "ort int8 (qdq)": lambda: onnxruntime_call(files.qdq(), arrays, disable=disable),
        "openvino int8 (qdq)": lambda: openvino_call(files.qdq(), arrays),
        "openvino int8 (qdq, bf16)": lambda: openvino_call(files.qdq(), arrays, precision="bf16"),
    }
    if subject.transformer:
        out["ort int8 (dynamic)"] = lambda: onnxruntime_call(files.dynamic(), arrays)
    if os.environ.get("BITWRIGHT_NNCF_PYTHON"):
        out["openvino int8 (nncf)"] = lambda: openvino_call(_must(files.nncf()), arrays)
        out["openvino int8 (nncf, bf16)"] = lambda: openvino_call(_must(files.nncf()), arrays, precision="bf16")
    if torch:
        out["torch eager"] = lambda: torch_call(subject)
        out["torch inductor"] = lambda: torch_call(subject, inductor=True)
    return out


def _must(path: Path | None) -> Path:
    assert path is not None
    return path


def contend(name: str, make: Callable[[], Call], want: Array) -> Contender | str:
    """The engine ready to run, or why it is not (a peer's failure is a finding, not a reason to stop)."""
    try:
        call = make()
        return Contender(name, call, relative_error(call()[0], want))
    except Exception as error:  # engines raise classes of their own, which have no common base
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
