"""Two layers of a Llama-like decoder (width 2048, 5632 inside, 32 heads on 4 key heads): a token, and a prompt.

    python benchmarks/decoder.py [--quick] [--keys 128] [--tokens 128] [--rounds 25] [--core 1] [--parts decode] [--dry]

Decode: one token against a cache of keys and values that the caller holds, as torch.export gives it: the cache goes in,
the longer one comes out. Prefill: a prompt with a causal mask. Weights are random; every program's output is compared
with torch (cosine). Peers: onnxruntime in float and with MatMulNBits of 4 bits (blocks of 32 and 128, products of 8-bit
integers: accuracy level 4), OpenVINO with 4-bit and 8-bit weights where it and nncf are installed. "MB": of the weights
as they are stored. "bandwidth": of these bytes over the time, as a share of what this run reads from memory (what stays
in a large cache passes it).
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import tables
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.codegen.targets import resolve
from bitwright.codegen.targets.machine import peaks
from bitwright.runtime.bench import pinned

WIDTH, INSIDE, HEADS, KEY_HEADS, LAYERS = 2048, 5632, 32, 4, 2
SIZE = WIDTH // HEADS
DECODE = {
    "ours 8-bit": "weight-only{bits=8 group=0}",
    "ours 4-bit": "weight-only{group=128}",
    "ours 4-bit 2:4": "nm-mask{pattern=2:4}, weight-only{group=0}",
    "ours 2-bit": "weight-only{bits=2 group=128}",
}
PREFILL = {"ours 8-bit": "weight-only{bits=8 group=0}", "ours 4-bit": "weight-only{group=128}"}
TARGETS = {
    "decode": (("ours 4-bit", "ort 4-bit", 1.2), ("ours 4-bit 2:4", "ort 4-bit", 2.0)),
    "prefill": (("ours 8-bit", "openvino 8-bit", 1.1), ("ours 4-bit", "ort 4-bit", 1.2)),
}
"""Ours, beginning of a peer's names (its fastest counts), how many times as fast."""


class Layer(nn.Module):
    """Attention with rotary positions and grouped keys, then a gated linear unit; norms before both."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.q, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, KEY_HEADS * SIZE, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, INSIDE, bias=False) for _ in range(2))
        self.down = nn.Linear(INSIDE, WIDTH, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        def heads(z: Tensor, n: int) -> Tensor:
            return z.view(1, z.shape[1], n, SIZE).transpose(1, 2)

        def turned(z: Tensor) -> Tensor:
            a, b = z.chunk(2, -1)
            return z * cos + torch.cat((-b, a), -1) * sin

        y = self.before(x)
        q, k = turned(heads(self.q(y), HEADS)), turned(heads(self.k(y), KEY_HEADS))
        v = heads(self.v(y), KEY_HEADS)
        if past:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        a = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).reshape(x.shape))
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)), k, v


class Decoder(nn.Module):
    """x, cos, sin, then the cache of each layer (decode) or a mask (prefill) -> x and the caches."""

    def __init__(self, layers: nn.ModuleList, *, prompt: bool) -> None:
        super().__init__()
        self.layers, self.prompt = layers, prompt

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        caches: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            past = () if self.prompt else rest[2 * i : 2 * i + 2]
            x, *made = layer(x, cos, sin, rest[0] if self.prompt else None, past)
            caches += made
        return (x, *caches)


def subject(part: str, size: int) -> peers.Subject:
    """Decode against ``size`` keys (the new one included), or a prompt of ``size`` tokens."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    prompt = part == "prefill"
    angle = torch.arange(size if prompt else 1)[:, None] * 0.03 + torch.arange(SIZE)[None] / 40
    inputs = [torch.randn(1, size if prompt else 1, WIDTH), angle.cos(), angle.sin()]
    if prompt:
        inputs.append(torch.full((size, size), float("-inf")).triu(1))
    else:
        inputs += [torch.randn(1, KEY_HEADS, size - 1, SIZE) for _ in range(2 * LAYERS)]
    return peers.Subject(f"decoder-{part}", Decoder(layers, prompt=prompt).eval(), tuple(inputs), [], False)


def cosine(a: peers.Array, b: peers.Array) -> float:
    x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def onnx_file(it: peers.Subject, folder: Path) -> Path:
    path = folder / f"{it.name}.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            it.module, it.inputs, str(path), dynamo=True, external_data=False, verbose=False,
            input_names=[f"x{i}" for i in range(len(it.inputs))],
        )  # fmt: skip
    return path


def few_bits(path: Path, block: int) -> Path:
    """onnxruntime's own weight quantizer: symmetric, 8-bit products allowed."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # type: ignore[import-untyped,unused-ignore]
        MatMulNBitsQuantizer,
    )

    logging.getLogger("onnxruntime").setLevel(logging.WARNING)
    made = MatMulNBitsQuantizer(onnx.load(str(path)), block_size=block, is_symmetric=True, accuracy_level=4)
    made.process()
    out = path.with_suffix(f".{block}.onnx")
    made.model.save_model_to_file(str(out))
    return out


def openvino_call(path: Path, arrays: list[peers.Array], mode: str) -> peers.Call:
    """4- or 8-bit weights by nncf, activations quantized at run time in groups."""
    import nncf  # type: ignore[import-not-found,unused-ignore]
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]

    kind = {"4": nncf.CompressWeightsMode.INT4_SYM, "8": nncf.CompressWeightsMode.INT8_SYM}[mode]
    options = {"group_size": 128, "ratio": 1.0, "all_layers": True} if mode == "4" else {}
    model = nncf.compress_weights(ov.Core().read_model(str(path)), mode=kind, **options)
    out = path.with_suffix(f".ov{mode}.xml")
    ov.save_model(model, str(out))
    return peers.openvino_call(out, arrays)


def contenders(it: peers.Subject, recipes: dict[str, str], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Name to (call, cosine, bytes of weights), and who does not run."""
    arrays = list(it.arrays)
    with torch.no_grad():
        want = it.module(*it.inputs)[0].numpy()
    graph = bw.capture(it.module, it.inputs)
    out: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def enter(name: str, make: Callable[[], tuple[peers.Call, int]]) -> None:
        try:
            call, size = make()
            out[name] = (call, cosine(call()[0], want), size)
            print(f"  {name}: cosine {out[name][1]:.4f}, {size / 1e6:.1f} MB", flush=True)
        except Exception as problem:  # an engine's failure is a line of the results
            text = str(problem).strip().splitlines()
            failed[name] = f"{type(problem).__name__}: {text[0][:160] if text else ''}"
            print(f"  {name}: {failed[name]}", flush=True)

    def ours(recipe: str) -> tuple[peers.Call, int]:
        program = bw.compile(graph, recipe=recipe)
        return peers.bitwright_call(program, arrays), program.manifest.weights_bytes

    for name, recipe in recipes.items():
        enter(name, lambda recipe=recipe: ours(recipe))  # type: ignore[misc]
    path = onnx_file(it, folder)
    enter("ort float", lambda: (peers.onnxruntime_call(path, arrays), path.stat().st_size))
    for block in (32, 128):

        def ort(block: int = block) -> tuple[peers.Call, int]:
            file = few_bits(path, block)
            return peers.onnxruntime_call(file, arrays), file.stat().st_size

        enter(f"ort 4-bit ({block})", ort)
    for mode in ("4", "8"):
        enter(f"openvino {mode}-bit", lambda mode=mode: (openvino_call(path, arrays, mode), 0))  # type: ignore[misc]
    return out, failed


def race(part: str, args: argparse.Namespace, top: dict[str, float]) -> tuple[str, dict[str, Any]]:
    print(part, flush=True)
    it = subject(part, args.keys if part == "decode" else args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        field, failed = contenders(it, DECODE if part == "decode" else PREFILL, Path(folder))
        calls: dict[str, Callable[[], object]] = {n: c for n, (c, _, _) in field.items()}
        rounds = 7 if args.quick else args.rounds
        times = tables.race(calls, rounds=rounds, sample=0.05 if part == "decode" else 0.2, core=args.core)
    rows, bests = [], {p: times.fastest([n for n in calls if n.startswith(p)]) for p in ("ort 4", "openvino")}
    for n in calls:
        rate = field[n][2] / times.median(n) / top["memory"]
        rows.append([
            n, f"{times.median(n) * 1e3:.3f}", f"{times.best(n) * 1e3:.3f}", f"{field[n][2] / 1e6:.1f}",
            f"{rate:.0%}" if part == "decode" and n.startswith("ours") else "",
            *(f"{times.ratio(b, n):.2f}x" for b in bests.values() if b), f"{field[n][1]:.4f}",
        ])  # fmt: skip
    heads = ["", "median ms", "best ms", "MB", "bandwidth", *(f"over {b}" for b in bests.values() if b), "cosine"]
    text = f"\n## {part}\n\n{tables.markdown(heads, rows)}\n"
    checks = []
    for mine, start, want in TARGETS[part]:
        peer = times.fastest([n for n in calls if n.startswith(start)])
        if mine in calls and peer is not None:
            gain = times.ratio(peer, mine)
            checks.append([f"{part}: {mine} over {peer}", gain, want])
            text += f"- {mine} is {gain:.2f}x as fast as {peer} (at least {want}): {tables.verdict(gain >= want)}\n"
    text += "".join(f"- {n} did not run: {why}\n" for n, why in failed.items())
    data = {"median": {n: times.median(n) for n in calls}, "best": {n: times.best(n) for n in calls}}
    return text, data | {"checks": checks, "failed": failed, "cosine": {n: c for n, (_, c, _) in field.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=128, help="length of the cache with the new token")
    parser.add_argument("--tokens", type=int, default=128, help="length of the prompt")
    parser.add_argument("--parts", default="decode,prefill")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="7 rounds")
    parser.add_argument("--core", type=int, default=tables.last_core())
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    env = tables.environment(peers.versions())
    with pinned(args.core):
        top = peaks(resolve("host").isa)
    parts = {p: race(p, args, top) for p in args.parts.split(",")}
    text = tables.heading("A Llama-like decoder", env)
    text += f"\nReads from memory at {top['memory'] / 1e9:.0f} GB/s, from the cache at {top['cache'] / 1e9:.0f} GB/s.\n"
    text += "".join(t for t, _ in parts.values())
    print(text)
    if not args.dry:
        data = {"environment": env, "peaks": top, "parts": {p: d for p, (_, d) in parts.items()}}
        tables.save("decoder", text, data)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
