"""What torch has for the products of ``benchmarks/gpu.py``, on the same device; a peer that is missing says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], Any]


def peers(name: str) -> tuple[str, ...]:
    """What there is beside ours for a kind of case, by the names :func:`peer` takes."""
    return (name, f"triton {name}") if name in ("f16", "bf16") else (name,)


def peer(name: str, sizes: list[int]) -> tuple[str, Call]:
    """The peer's name and a call of it on random values. Raises whatever torch raises where it has none."""
    import torch

    kinds = {"f16": torch.float16, "bf16": torch.bfloat16}
    head, _, tail = name.partition(" ")
    if head == "triton":
        import gpu_triton

        m, n, k = sizes
        x, w = (torch.randn(s, device="cuda").to(kinds[tail]) for s in ((m, k), (n, k)))
        return "Triton", gpu_triton.linear(x, w)
    if head in kinds and not tail:
        return _dense(sizes, kinds[head])
    if head == "s8" and not tail:
        m, n, k = sizes
        x, w = (torch.randint(-127, 128, s, dtype=torch.int8, device="cuda") for s in ((m, k), (n, k)))
        return "cuBLAS _int_mm", lambda: torch._int_mm(x, w.t())
    if tail == "2:4":
        return _sparse(sizes, kinds.get(head, torch.int8))
    if name == "int4":
        return _int4(sizes)
    if name.startswith("attention"):
        return _attention(sizes, causal=name.endswith("causal"))
    return _rows(name, sizes)


def _dense(sizes: list[int], kind: Any) -> tuple[str, Call]:
    import torch

    m, n, k = sizes
    x, w = (torch.randn(s, device="cuda").to(kind) for s in ((m, k), (n, k)))
    return "cuBLAS", lambda: torch.nn.functional.linear(x, w)


def _sparse(sizes: list[int], kind: Any) -> tuple[str, Call]:
    import torch
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    m, n, k = sizes
    mask = torch.tensor([0, 0, 1, 1], device="cuda").tile((n, k // 4))
    if kind == torch.int8:
        w, x = (torch.randint(-127, 128, s, dtype=kind, device="cuda") for s in ((n, k), (m, k)))
    else:
        w, x = (torch.randn(s, device="cuda").to(kind) for s in ((n, k), (m, k)))
    packed = to_sparse_semi_structured(w * mask.to(kind))
    return "cuSPARSELt", lambda: torch.mm(packed, x.t())


def _int4(sizes: list[int]) -> tuple[str, Call]:
    """torch's weight-only product of bf16 activations and 4-bit weights in groups of 64."""
    import torch

    m, n, k = sizes
    x = torch.randn(m, k, device="cuda").bfloat16()
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.randn(k // 64, n, 2, device="cuda").bfloat16()
    return "torch int4 (tinygemm)", lambda: torch.ops.aten._weight_int4pack_mm(x, packed, 64, scales)


def _attention(sizes: list[int], causal: bool) -> tuple[str, Call]:
    import torch

    q, k, v = (torch.randn(sizes, device="cuda").bfloat16() for _ in range(3))
    run = torch.nn.functional.scaled_dot_product_attention
    return "torch sdpa", lambda: run(q, k, v, is_causal=causal)


def _rows(name: str, sizes: list[int]) -> tuple[str, Call]:
    import torch

    x = torch.randn(sizes[:2], device="cuda").half() if name != "conv" else None
    if name == "softmax":
        return "torch softmax", lambda: torch.softmax(x, 1)  # type: ignore[arg-type]
    if name == "rms_norm":
        return "torch rms_norm", lambda: torch.nn.functional.rms_norm(x, (sizes[1],))  # type: ignore[arg-type]
    if name == "conv":
        size, inside, outside, kernel, stride = sizes
        image = torch.randn(1, inside, size, size, device="cuda").half().to(memory_format=torch.channels_last)
        layer = torch.nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False).cuda().half()
        layer = layer.to(memory_format=torch.channels_last)
        return "torch conv2d (cuDNN)", lambda: torch.relu(layer(image))
    raise LookupError(f"nothing in torch is {name}")


def recorded(calls: Sequence[Call]) -> Callable[[], float]:
    """The calls as one graph: what replays it and gives the seconds that took by the device's events."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for call in calls:
            call()

    def seconds() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return seconds


def peaks() -> dict[str, float]:
    """Bytes a second of a copy of 1 GiB (read and written), operations a second of products of f16 and bytes."""
    import torch

    source = torch.empty(1 << 28, device="cuda")
    copy = torch.empty_like(source)
    found, n = {"bytes": 2.0 * source.nbytes / _best(lambda: copy.copy_(source))}, 8192
    for name in ("f16", "s8"):
        _, call = peer(name, [n, n, n])
        found[name] = 2.0 * n**3 / _best(call)
    return found


def _best(call: Call) -> float:
    seconds = recorded([call] * 4)
    return min(seconds() for _ in range(10)) / 4
