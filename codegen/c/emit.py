"""The files of a C program: model.h, model.c, weights.h, weights.c, selftest.c, Makefile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright.codegen.c.program import Array, Call, Source
from bitwright.codegen.c.text import identifier, integer, literal, memory_type
from bitwright.codegen.c.values import Table
from bitwright.ir.types import F32, F64

_HELPERS: dict[str, str] = {
    "bw_requantize": """
/* saturate(zero + round_half_up(acc * multiplier / 2^shift)), exact */
static int32_t bw_requantize(int32_t acc, int32_t multiplier, int32_t shift, int32_t zero, int32_t lo, int32_t hi)
{
    const int64_t sum = (int64_t)acc * multiplier + ((int64_t)1 << (shift - 1));
    const int64_t down = sum >= 0 ? sum >> shift : -((-sum + (((int64_t)1 << shift) - 1)) >> shift);
    const int64_t y = down + zero;
    return y < lo ? lo : y > hi ? hi : (int32_t)y;
}
""",
    "bw_roundf": """
/* to the nearest whole number, halves to even */
static float bw_roundf(float x)
{
    const float big = 8388608.0f;
    if (x >= big || x <= -big || x != x) { return x; }
    const int32_t whole = (int32_t)x;
    const float part = x - (float)whole;
    if (part > 0.5f || (part == 0.5f && (whole & 1))) { return (float)(whole + 1); }
    if (part < -0.5f || (part == -0.5f && (whole & 1))) { return (float)(whole - 1); }
    return (float)whole;
}
""",
    "bw_round(": """
/* to the nearest whole number, halves to even */
static double bw_round(double x)
{
    const double big = 4503599627370496.0;
    if (x >= big || x <= -big || x != x) { return x; }
    const int64_t whole = (int64_t)x;
    const double part = x - (double)whole;
    if (part > 0.5 || (part == 0.5 && (whole & 1))) { return (double)(whole + 1); }
    if (part < -0.5 || (part == -0.5 && (whole & 1))) { return (double)(whole - 1); }
    return (double)whole;
}
""",
    "bw_to_intf": """
/* clamp a whole number to [lo, hi]; NaN gives 0, clamped */
static int32_t bw_to_intf(float q, int32_t lo, int32_t hi)
{
    if (q != q) { return lo > 0 ? lo : hi < 0 ? hi : 0; }
    return q <= (float)lo ? lo : q >= (float)hi ? hi : (int32_t)q;
}
""",
    "bw_to_int(": """
/* clamp a whole number to [lo, hi]; NaN gives 0, clamped */
static int32_t bw_to_int(double q, int32_t lo, int32_t hi)
{
    if (q != q) { return lo > 0 ? lo : hi < 0 ? hi : 0; }
    return q <= (double)lo ? lo : q >= (double)hi ? hi : (int32_t)q;
}
""",
    "bw_popcount": """
/* ones of a word */
static int32_t bw_popcount(uint32_t x)
{
#if defined(__GNUC__) && (defined(__POPCNT__) || defined(__riscv_zbb) || defined(__aarch64__))
    return __builtin_popcount(x);
#else
    x -= (x >> 1) & 0x55555555u;
    x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
    return (int32_t)((((x + (x >> 4)) & 0x0F0F0F0Fu) * 0x01010101u) >> 24);
#endif
}
""",
    "bw_clampf": """
static float bw_clampf(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }
""",
    "bw_clamp(": """
static double bw_clamp(double x, double lo, double hi) { return x < lo ? lo : x > hi ? hi : x; }
""",
    "bw_index": """
/* a position: negative counts from the end, clamped to be inside */
static int32_t bw_index(int32_t i, int32_t size)
{
    const int32_t at = i < 0 ? i + size : i;
    return at < 0 ? 0 : at >= size ? size - 1 : at;
}
""",
    "bw_infinity": """
static float bw_infinity(void)
{
    const union { uint32_t bits; float value; } u = { 0x7F800000u };
    return u.value;
}
""",
    "bw_nan": """
static float bw_nan(void)
{
    const union { uint32_t bits; float value; } u = { 0x7FC00000u };
    return u.value;
}
""",
}


def files(source: Source, name: str, samples: Sequence[tuple[Sequence[Array], Sequence[Array]]]) -> dict[str, str]:
    """File name to text. ``samples``: (inputs, expected outputs) that the self-test runs."""
    prefix = identifier(name)
    return {
        "model.h": header(source, prefix),
        "model.c": code(source, prefix),
        "weights.h": _weights_header(source, prefix),
        "weights.c": _weights(source, prefix),
        "selftest.c": self_test(source, prefix, samples),
        "Makefile": makefile(source),
    }


def _ports(source: Source) -> list[tuple[str, str, str, int]]:
    """(C parameter, parameter name, macro name, bytes) of every input and output."""
    g, taken = source.graph, set[str]()
    out = []
    for v in g.inputs:
        n = identifier(v.name, taken)
        out.append((f"const {memory_type(v.type.dtype)} *{n}", n, n.upper(), v.type.size))
    for label, value in zip(g.output_names, g.outputs, strict=True):
        n = identifier(label, taken)
        t = g.types[value]
        out.append((f"{memory_type(t.dtype)} *{n}", n, n.upper(), t.size))
    return out


def _signature(source: Source, prefix: str) -> str:
    return f"void {prefix}_run({', '.join(p[0] for p in _ports(source))})"


def header(source: Source, prefix: str) -> str:
    """``model.h``: the one function, the sizes of its arguments, of its arena and of its tables."""
    guard, up = f"{prefix.upper()}_H", prefix.upper()
    shapes = [*(str(v.type) for v in source.graph.inputs), *(str(source.graph.types[o]) for o in source.graph.outputs)]
    sizes = [
        f"#define {up}_{macro} {size} /* elements of {shape} */"
        for (_, _, macro, size), shape in zip(_ports(source), shapes, strict=True)
    ]
    libm = ", ".join(source.libm) if source.libm else "none"
    kind = "integers only" if source.integer_only else "integers and floating point"
    return "\n".join([
        f"/* {prefix}, generated by bitwright: freestanding C99, {kind}.", " *",
        f" * Functions of the C library that are called: {libm}. No dynamic memory, no recursion.",
        " * Not re-entrant: values between layers lie in one static arena. Compile with -fno-strict-aliasing, for the",
        " * arena holds values of several types, and with -ffp-contract=off for the reference's bits. */",
        f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "", *sizes,
        f"#define {up}_ARENA_BYTES {source.arena_bytes} /* static RAM */",
        f"#define {up}_TABLE_BYTES {source.table_bytes} /* weights and other constants, in flash */", "",
        "/* Arrays are row-major; the outputs must not overlap the inputs. */", f"{_signature(source, prefix)};", "",
        "#endif", "",
    ])  # fmt: skip


def _weights_header(source: Source, prefix: str) -> str:
    guard = f"{prefix.upper()}_WEIGHTS_H"
    rows = [f"extern const {t.ctype} {prefix}_{t.name}[{max(1, t.values.size)}];" for t in source.tables]
    return "\n".join([f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "", *rows, "", "#endif", ""])


def _weights(source: Source, prefix: str) -> str:
    out = ['#include "weights.h"', ""]
    out += [array(f"const {t.ctype} {prefix}_{t.name}", t) for t in source.tables]
    return "\n".join([*out, "typedef int bw_weights_file_is_not_empty;", ""])


def array(declaration: str, t: Table) -> str:
    """The definition of an array with its values, at most 120 characters a line."""
    flat = np.ascontiguousarray(t.values).reshape(-1)
    words = [_element(v, t.ctype) for v in flat.tolist()] or ["0"]
    lines, line = [], "   "
    for word in words:
        if len(line) + len(word) + 2 > 118:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([f"{declaration}[{len(words)}] = {{", *lines, line, "};", ""])


def _element(v: object, ctype: str) -> str:
    if ctype in ("float", "double"):
        return literal(v, F32 if ctype == "float" else F64)
    return integer(int(v), ctype if ctype in ("uint32_t", "int64_t", "uint64_t") else "int32_t")  # type: ignore[call-overload]


def code(source: Source, prefix: str) -> str:
    """``model.c``."""
    body = [line for n, f in enumerate(source.functions) for line in _function(n, f.parameters, f.body)]
    run = _run(source, prefix)
    text = "\n".join([*body, *run])
    helpers = [h for word, h in _HELPERS.items() if word in text]
    includes = ['#include "model.h"', '#include "weights.h"', *(["#include <math.h>"] if source.libm else [])]
    arena = []
    if source.arena_bytes:
        arena = [
            f"static union {{ uint64_t align; uint8_t bytes[{prefix.upper()}_ARENA_BYTES]; }} arena;", "",
        ]  # fmt: skip
    return "\n".join([*includes, "", *arena, *(h.strip("\n") + "\n" for h in helpers), text, ""])


def _function(number: int, parameters: Sequence[str], body: Sequence[str]) -> list[str]:
    return [f"static void k{number}({', '.join(parameters)})", "{", *body, "}", ""]


def _run(source: Source, prefix: str) -> list[str]:
    lines = []
    for c in source.calls:
        args = [_place(source, x, writes=False) for x in c.inputs]
        args += [f"{prefix}_{source.tables[t].name}" for t in c.tables]
        args += [_place(source, o, writes=True) for o in c.outputs]
        lines += [f"    /* {_comment(c)} */", f"    k{c.function}({', '.join(args)});"]
    return [_signature(source, prefix), "{", *lines, "}"]


def _comment(c: Call) -> str:
    return c.label.replace("*/", "* /").replace("/*", "/ *")


def _place(source: Source, value: str, *, writes: bool) -> str:
    """The C expression for the pointer to a value."""
    g = source.graph
    ports = [p[1] for p in _ports(source)]
    outputs = ports[len(g.inputs) :]
    if value.startswith("out") and value[3:].isdigit() and value not in g.types:
        return outputs[int(value[3:])]
    root = source.root(value)
    if (writes and value in g.outputs) or (root in g.outputs and root not in source.offsets and root in g.producers):
        return outputs[g.outputs.index(root if root in g.outputs else value)]
    names = [v.name for v in g.inputs]
    if root in names:
        return ports[names.index(root)]
    kind = memory_type(g.types[value].dtype)
    return f"({kind} *)(void *)(arena.bytes + {source.offsets[root]})"


def self_test(source: Source, prefix: str, samples: Sequence[tuple[Sequence[Array], Sequence[Array]]]) -> str:
    """``selftest.c``: ``PREFIX_selftest()`` runs the samples and returns the number of wrong elements; with
    ``-DBW_HOSTED`` there is a ``main`` that prints it."""
    g = source.graph
    ports = _ports(source)
    out = ['#include "model.h"', "", f"int {prefix}_selftest(void);", ""]
    for s, (inputs, outputs) in enumerate(samples):
        for v, a in zip(g.inputs, inputs, strict=True):
            kind = memory_type(v.type.dtype)
            out.append(array(f"static const {kind} in{s}_{identifier(v.name)}", Table("", np.asarray(a), kind)))
        for k, (o, a) in enumerate(zip(g.outputs, outputs, strict=True)):
            kind = memory_type(g.types[o].dtype)
            out.append(array(f"static const {kind} want{s}_{k}", Table("", np.asarray(a), kind)))
    for k, o in enumerate(g.outputs):
        out.append(f"static {memory_type(g.types[o].dtype)} got_{k}[{ports[len(g.inputs) + k][3]}];")
    out += ["", f"int {prefix}_selftest(void)", "{", "    int wrong = 0;"]
    for s in range(len(samples)):
        args = [f"in{s}_{identifier(v.name)}" for v in g.inputs] + [f"got_{k}" for k in range(len(g.outputs))]
        out.append(f"    {prefix}_run({', '.join(args)});")
        for k, o in enumerate(g.outputs):
            out += _compare(s, k, ports[len(g.inputs) + k][3], g.types[o].dtype in (F32, F64) and not source.exact)
    out += ["    return wrong;", "}", "", "#ifdef BW_HOSTED", "#include <stdio.h>", "int main(void)", "{"]
    out += [f"    const int wrong = {prefix}_selftest();", '    printf("%d wrong\\n", wrong);']
    return "\n".join([*out, "    return wrong != 0;", "}", "#endif", ""])


def _compare(sample: int, k: int, count: int, real: bool) -> list[str]:
    """Exact, or (where library functions or float sums may differ in the last bit, and a code that follows by one) the
    root mean square of the error within 1 % of that of the result."""
    got, want = f"got_{k}[i]", f"want{sample}_{k}[i]"
    loop = f"for (int32_t i = 0; i < {count}; ++i)"
    if not real:
        return [f"    {loop} {{ wrong += {got} != {want}; }}"]
    return [
        "    {", "        double error = 0.0, size = 0.0;",
        f"        {loop} {{",
        f"            const double w = (double){want}, d = (double){got} - w;",
        "            error += d * d;", "            size += w * w;", "        }",
        "        wrong += !(error <= 1e-4 * size + 1e-12);", "    }",
    ]  # fmt: skip


def makefile(source: Source) -> str:
    """``make``: libmodel.a; ``make selftest``: the self-test for this machine; CC, AR and CFLAGS as usual."""
    libs = " -lm" if source.libm else ""
    return f"""CFLAGS ?= -O2
STRICT := -std=c99 -Wall -Wextra -Wconversion -Werror -pedantic -fno-strict-aliasing -ffp-contract=off

libmodel.a: model.o weights.o
\t$(AR) rcs $@ $^

%.o: %.c model.h weights.h
\t$(CC) $(CFLAGS) $(STRICT) -ffreestanding -c -o $@ $<

selftest: selftest.c libmodel.a
\t$(CC) $(CFLAGS) $(STRICT) -DBW_HOSTED -o $@ selftest.c libmodel.a{libs}

test: selftest
\t./selftest

clean:
\trm -f *.o libmodel.a selftest

.PHONY: test clean
"""
