"""The program as C: pointer arithmetic and kernel calls from a plan, nothing else.

The generated file is plain C99 (``clock_gettime`` for profiling). It exports::

    const int32_t bw_abi_version;
    const char* bw_info(void);                    JSON: abi, openmp, features, versions, chunks, steps
    int bw_run(void** inputs, void** outputs, const uint8_t* weights, uint8_t* arena, uint8_t* scratch,
               int threads, int64_t rows);        0; 1: bad arguments; 2: fewer rows than the smallest chunk
    int bw_profile(..., double* seconds);         the same, adds the seconds of each step of each variant

``arena``, ``scratch`` (``threads`` times ``scratch_bytes``) and ``weights`` start at multiples of 64 bytes.
A program with a symbolic batch is planned for chunks of so many rows; ``rows`` is then the batch, inputs and
outputs advance by their bytes per row, and a last chunk that does not fit starts earlier and computes some
rows twice. Without a symbolic batch ``rows`` is 1.

``threads`` above 1 opens one OpenMP region for the whole call: every thread runs its fixed share
``[tasks*t/T, tasks*(t+1)/T)`` of each step and waits only where a step depends on another since the last
wait. Results do not depend on the number of threads. After a call, libgomp's idle threads spin for as long as
``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` say (about 5 ms when neither is set): ``OMP_WAIT_POLICY=PASSIVE``
makes them sleep at once, at 5 to 20 us more per wait. bitwright's own loader sets a spin count of 10000.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitwright.codegen.plan import COPY, Plan, Step
from bitwright.ir.errors import VerifyError

ABI_VERSION = 1


@dataclass(frozen=True, slots=True)
class Variant:
    """A plan, and the rows of the batch it computes at once.

    ``input_row_bytes``, ``output_row_bytes``: how far each input and output advances per row of the batch (0
    for one that does not depend on it). A static program has one variant of 1 row and advances nothing.
    """

    plan: Plan
    rows: int = 1
    input_row_bytes: tuple[int, ...] = ()
    output_row_bytes: tuple[int, ...] = ()


def arena_bytes(variants: Sequence[Variant]) -> int:
    """Bytes of arena the program needs."""
    return max(v.plan.arena_bytes for v in variants)


def scratch_bytes(variants: Sequence[Variant]) -> int:
    """Bytes of scratch the program needs for each thread."""
    return max(v.plan.scratch_bytes for v in variants)


def step_labels(variants: Sequence[Variant]) -> list[tuple[str, str, int]]:
    """(label, kernel symbol, rows of the variant) of every step, in the order ``bw_profile`` numbers them."""
    return [(s.label, s.kernel_symbol, v.rows) for v in _ordered(variants) for s in v.plan.steps]


def main_c(
    variants: Sequence[Variant], *, features: Sequence[str] = (), versions: Mapping[str, str] | None = None
) -> str:
    """The C text of a program; raises :class:`VerifyError` for variants or symbols that do not fit together.

    ``features``: processor features the kernels need (LLVM names such as ``avx512vnni``).
    """
    ordered = _ordered(variants)
    _check(ordered)
    steps = [s for v in ordered for s in v.plan.steps]
    info = {
        "abi": ABI_VERSION,
        "chunks": [v.rows for v in ordered],
        "features": sorted(features),
        "steps": len(steps),
        "versions": dict(versions or {}),
    }
    text = json.dumps(info, separators=(",", ":"))
    assert text.startswith("{")
    parts = [
        _HEAD,
        _prototypes(steps),
        f"#define BW_SCRATCH {scratch_bytes(ordered)}",
        f"BW_EXPORT const int32_t bw_abi_version = {ABI_VERSION};",
        'BW_EXPORT const char* bw_info(void) {\n  return "{\\"openmp\\":" BW_OPENMP ","\n    '
        + _c_string(text[1:])
        + ";\n}\n",
    ]
    first = 0
    for number, variant in enumerate(ordered):
        parts.append(_program(number, variant, first))
        first += len(variant.plan.steps)
    return "\n".join([*parts, _dispatch(ordered), _TAIL])


def _ordered(variants: Sequence[Variant]) -> list[Variant]:
    return sorted(variants, key=lambda v: -v.rows)


def _check(variants: Sequence[Variant]) -> None:
    if not variants:
        raise VerifyError("main_c: no variant given")
    head = variants[0].plan
    for v in variants:
        if (v.plan.inputs, v.plan.weight_offsets) != (head.inputs, head.weight_offsets):
            raise VerifyError("main_c: the variants differ in their inputs or weights")
        if len(v.plan.outputs) != len(head.outputs):
            raise VerifyError("main_c: the variants differ in their outputs")
        for given, names in ((v.input_row_bytes, v.plan.inputs), (v.output_row_bytes, v.plan.outputs)):
            if given and len(given) != len(names):
                raise VerifyError(f"main_c: {len(given)} row sizes for {len(names)} buffers")
        if v.rows < 1:
            raise VerifyError(f"main_c: a chunk has {v.rows} rows")
    if len({v.rows for v in variants}) != len(variants):
        raise VerifyError("main_c: two variants have the same number of rows")


def _prototypes(steps: Sequence[Step]) -> str:
    """One declaration per kernel; pointers are ``void*`` here, all data pointers are alike in the C ABI."""
    seen: dict[str, tuple[int, bool]] = {}
    for step in steps:
        name, shape = step.kernel_symbol, (len(step.args), step.scratch_bytes > 0)
        if name == COPY:
            continue
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name.startswith("bw_") or name in _KEYWORDS:
            raise VerifyError(f"main_c: {name!r} cannot be the name of a kernel")
        if seen.setdefault(name, shape) != shape:
            raise VerifyError(f"main_c: kernel {name} is called with {seen[name]} and {shape} arguments")
    lines = []
    for name, (count, scratch) in sorted(seen.items()):
        pointers = ["void*"] * count + ["uint8_t*"] * scratch
        lines.append(f"extern void {name}({', '.join(['int32_t', 'int32_t', *pointers])});")
    return "\n".join(lines) + "\n"


def _program(number: int, variant: Variant, first: int) -> str:
    """The function that runs one chunk; steps are numbered from ``first`` for profiling."""
    plan = variant.plan
    lines = [
        f"/* chunks of {variant.rows} row(s): {len(plan.steps)} steps, arena {plan.arena_bytes} bytes */",
        f"static void program_{number}(const bw_call* c, int64_t row, int t, int T) {{",
        "  int32_t b, e;",
    ]
    used = {(p.space, p.index) for spots in plan.places for p in spots}
    for space, letter, field, sizes in (
        ("input", "x", "inputs", variant.input_row_bytes),
        ("output", "y", "outputs", variant.output_row_bytes),
    ):
        for index in sorted(i for s, i in used if s == space):
            stride = sizes[index] if sizes else 0
            lines.append(f"  uint8_t* const {letter}{index} = (uint8_t*)c->{field}[{index}] + row * {stride};")
    if any(s == "weight" for s, _ in used):
        lines.append("  uint8_t* const w = (uint8_t*)c->weights;")
    if any(s == "arena" for s, _ in used):
        lines.append("  uint8_t* const a = c->arena;")
    if any(s.scratch_bytes for s in plan.steps):
        lines.append("  uint8_t* const s = c->scratch + (size_t)t * BW_SCRATCH;")
    lines.append("  (void)row; (void)b; (void)e; bw_clock(c, t, T, -1);")
    for index, step in enumerate(plan.steps):
        if plan.barriers[index]:
            lines.append("  bw_barrier(T);")
        call = _call(step, plan, index)
        share = f"b = bw_share({step.tasks}, t, T); e = bw_share({step.tasks}, t + 1, T);"
        lines.append(f"  /* {first + index}: {_comment(step.label)} */")
        lines.append(f"  {share} if (b < e) {call};")
        lines.append(f"  if (c->seconds) bw_clock(c, t, T, {first + index});")
    return "\n".join([*lines, "}", ""])


def _call(step: Step, plan: Plan, index: int) -> str:
    pointers = []
    for p in plan.places[index]:
        base = {"weight": "w", "arena": "a", "input": f"x{p.index}", "output": f"y{p.index}"}[p.space]
        pointers.append(f"{base} + {p.offset}" if p.offset else base)
    if step.kernel_symbol == COPY:
        arg = step.args[0]
        nbytes = arg.nbytes if arg.nbytes >= 0 else plan.sizes[arg.buffer] - arg.offset
        pointers.append(str(nbytes))
    elif step.scratch_bytes:
        pointers.append("s")
    return f"{step.kernel_symbol}({', '.join(['b', 'e', *pointers])})"


def _dispatch(variants: Sequence[Variant]) -> str:
    """Which chunk comes next: the largest that fits, or a larger one that starts earlier if half is new."""
    lines = ["static void bw_all(const bw_call* c, int64_t rows, int t, int T) {", "  int64_t row = 0;"]
    lines += ["  while (row < rows) {", "    const int64_t left = rows - row;", "    int64_t at = row, n;"]
    for number, variant in enumerate(variants):
        n, last = variant.rows, number == len(variants) - 1
        test = "" if last else f"if ({n} <= left || ({n} <= rows && {n} <= 2 * left)) "
        at = f"if ({n} > left) at = rows - {n};"
        lines.append(f"    {test}{{ n = {n}; {at} program_{number}(c, at, t, T); }}{'' if last else ' else'}")
    lines += ["    row = at + n;", "    if (row < rows) bw_barrier(T);", "  }", "}", ""]
    return "\n".join([f"#define BW_SMALLEST {variants[-1].rows}", *lines])


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("/*", "/ *").replace("\n", " ").replace("\\", "/")


def _c_string(text: str) -> str:
    """A C string literal of ASCII ``text`` (question marks escaped: C99 still has trigraphs)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?")
    return f'"{escaped}"'


_KEYWORDS = frozenset(
    """auto break case char const continue default do double else enum extern float for goto if inline int
    long register restrict return short signed sizeof static struct switch typedef union unsigned void
    volatile while main memcpy""".split()
)

_HEAD = """\
/* Generated by bitwright; do not edit. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 199309L
#endif
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#define BW_OPENMP "true"
#else
#define BW_OPENMP "false"
#endif
#if defined(__GNUC__)
#define BW_EXPORT __attribute__((visibility("default")))
#else
#define BW_EXPORT
#endif

typedef struct {
  void** inputs;
  void** outputs;
  const uint8_t* weights;
  uint8_t* arena;
  uint8_t* scratch;
  double* seconds;
  struct timespec* last;
} bw_call;

BW_EXPORT const char* bw_info(void);

static int32_t bw_share(int32_t tasks, int t, int T) { return (int32_t)((int64_t)tasks * t / T); }

static void bw_barrier(int T) {
  if (T > 1) {
#ifdef _OPENMP
#pragma omp barrier
#endif
  }
}

/* Profiling: waits for all threads, then books the time since the last call to a step (or to none). */
static void bw_clock(const bw_call* c, int t, int T, int step) {
  struct timespec now;
  if (!c->seconds) return;
  bw_barrier(T);
  if (t != 0) return;
  clock_gettime(CLOCK_MONOTONIC, &now);
  if (step >= 0)
    c->seconds[step] +=
        (double)(now.tv_sec - c->last->tv_sec) + 1e-9 * (double)(now.tv_nsec - c->last->tv_nsec);
  *c->last = now;
}

#define BW_COPY_BLOCK 65536
static inline void bw_copy(int32_t begin, int32_t end, uint8_t* to, const uint8_t* from, size_t nbytes) {
  size_t low = (size_t)begin * BW_COPY_BLOCK, high = (size_t)end * BW_COPY_BLOCK;
  if (high > nbytes) high = nbytes;
  if (low < high) memcpy(to + low, from + low, high - low);
}
"""

_TAIL = """\
static int bw_start(const bw_call* c, int threads, int64_t rows) {
  if (threads < 1 || rows < 0) return 1;
  if (rows > 0 && rows < BW_SMALLEST) return 2;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    bw_all(c, rows, omp_get_thread_num(), omp_get_num_threads());
    return 0;
  }
#endif
  bw_all(c, rows, 0, 1);
  return 0;
}

BW_EXPORT int bw_run(void** inputs, void** outputs, const uint8_t* weights, uint8_t* arena, uint8_t* scratch,
                     int threads, int64_t rows) {
  bw_call c = {inputs, outputs, weights, arena, scratch, NULL, NULL};
  return bw_start(&c, threads, rows);
}

BW_EXPORT int bw_profile(void** inputs, void** outputs, const uint8_t* weights, uint8_t* arena,
                         uint8_t* scratch, int threads, int64_t rows, double* seconds) {
  struct timespec last;
  bw_call c = {inputs, outputs, weights, arena, scratch, seconds, &last};
  return bw_start(&c, threads, rows);
}
"""
