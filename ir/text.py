"""The text form: what prints parses and comes back identical.

::

    graph @mlp (%x: f32[b, 768]) -> (logits = %y) level=graph {
      %w = weight {ref="fc1.weight"} : f32[10, 768]
      %y = linear(%x, %w) : f32[b, 10]  # fc1, model.py:41
    }
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.ir.graph import LEVELS, Graph, Node, Value
from bitwright.ir.ops import Op, Region, spellings
from bitwright.ir.types import parse_dtype, parse_type
from bitwright.ir.weights import Weights

_PLAIN = re.compile(r"[A-Za-z_0-9.$]+")


def _name(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else _quote(name)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text[1:-1])


def _attribute(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_attribute(v) for v in value)}]"
    return "none" if value is None else repr(value) if isinstance(value, (int, float)) else str(value)


def show_node(node: Node, indent: str = "  ") -> str:
    """One node as text (several lines for a region)."""
    attributes = node.op.attributes()
    body = attributes.pop("body", None)
    text = f"{', '.join('%' + _name(o) for o in node.outputs)} = {node.op.spelling}"
    if node.inputs:
        text += f"({', '.join('%' + _name(x) for x in node.inputs)})"
    if attributes:
        text += " {" + ", ".join(f"{k}={_attribute(v)}" for k, v in attributes.items()) + "}"
    text += " : " + "; ".join(map(str, node.types))
    if node.origin:
        text += "  # " + node.origin.replace("\n", " ").strip()
    lines = [indent + text]
    if body is not None:
        lines += [indent + "  " + line for line in show(body).splitlines()]
    return "\n".join(lines)


def show(graph: Graph) -> str:
    """The graph as text; :func:`parse` reads it back."""
    inputs = ", ".join(f"%{_name(v.name)}: {v.type}" for v in graph.inputs)
    outputs = ", ".join(f"{_name(n)} = %{_name(v)}" for n, v in zip(graph.output_names, graph.outputs, strict=True))
    head = f"graph @{_name(graph.name)} ({inputs}) -> ({outputs}) level={graph.level} {{"
    return "\n".join([head, *(show_node(n) for n in graph.nodes), "}"]) + "\n"


_ID = r'(?:"(?:[^"\\]|\\.)*"|[A-Za-z_0-9.$]+)'
_TYPE = r"\w+\[[^\]]*\](?:\s*(?:nm|block|unstructured|codebook)<[^>]*>)?"
_HEAD = re.compile(rf"graph @({_ID}) \((.*)\) -> \((.*)\) level=(\w+) \{{")
_NODE = re.compile(
    rf"(%{_ID}(?:, %{_ID})*) = (\w+)(?:\((%{_ID}(?:, %{_ID})*)\))?(?: \{{(.*)\}})?"
    rf" : ({_TYPE}(?:; {_TYPE})*)(?:  # (.*))?"
)
_INPUT = re.compile(rf"%({_ID}): ({_TYPE})")
_OUTPUT = re.compile(rf"({_ID}) = %({_ID})")
_TOKEN = re.compile(rf'({_ID})=|"(?:[^"\\]|\\.)*"|\[|\]|,\s*|[^\s,\[\]"]+')


def _plain(text: str) -> str:
    return _unquote(text) if text.startswith('"') else text


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(_plain(m[1]) for m in re.finditer(rf"%({_ID})", text or ""))


def _scalar(token: str) -> Any:
    if token.startswith('"'):
        return _unquote(token)
    if token in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[token]
    if re.fullmatch(r"-?\d+", token):
        return int(token)
    if re.fullmatch(r"-?(\d[\d.]*(e[+-]?\d+)?|inf|nan)", token):
        return float(token)
    return parse_dtype(token)


def _parse_value(tokens: Iterator[str], token: str) -> Any:
    if token != "[":
        return _scalar(token)
    items: list[Any] = []
    for t in tokens:
        if t == "]":
            return tuple(items)
        if not t.startswith(","):
            items.append(_parse_value(tokens, t))
    raise InvalidInput("a list is not closed")


def _parse_attributes(text: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    tokens = iter(m[0] for m in _TOKEN.finditer(text))
    for token in tokens:
        if token.startswith(","):
            continue
        if not token.endswith("="):
            raise InvalidInput(f"{token!r} is not name=value")
        value = next(tokens, None)
        if value is None:
            raise InvalidInput(f"{token!r} has no value")
        out[token[:-1]] = _parse_value(tokens, value)
    return out


class _Lines:
    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.at = 0

    def next(self) -> str:
        while self.at < len(self.lines):
            line = self.lines[self.at].strip()
            self.at += 1
            if line and not line.startswith("#"):
                return line
        raise InvalidInput("the text ends before the graph's closing brace")

    def error(self, why: str) -> InvalidInput:
        return InvalidInput(f"line {self.at}: {why}\n    {self.lines[self.at - 1].strip()}")


def _make_op(word: str, attributes: dict[str, Any]) -> Op:
    table = spellings()
    if word not in table:
        raise InvalidInput(f"unknown operator {word!r}{did_you_mean(word, table)}")
    cls, fixed = table[word]
    known = {f.name for f in fields(cls)}
    for key in attributes:
        if key not in known:
            raise InvalidInput(f"{word} has no attribute {key!r}{did_you_mean(key, known)}")
    return cls(**{**attributes, **fixed})


def _parse_graph(lines: _Lines, weights: Weights) -> Graph:
    head = _HEAD.fullmatch(lines.next())
    if not head:
        raise lines.error("expected 'graph @name (inputs) -> (outputs) level=... {'")
    if head[4] not in LEVELS:
        raise lines.error(f"unknown level {head[4]!r}{did_you_mean(head[4], LEVELS)}")
    nodes = []
    while (line := lines.next()) != "}":
        m = _NODE.fullmatch(line)
        if not m:
            raise lines.error("expected '%result = operator(%operand, ...) {attributes} : type'")
        try:
            attributes = _parse_attributes(m[4] or "")
            types = tuple(parse_type(t) for t in re.findall(_TYPE, m[5]))
            if m[2] == Region.name:
                attributes["body"] = _parse_graph(lines, Weights())
            nodes.append(Node(_make_op(m[2], attributes), _names(m[3]), _names(m[1]), types, (m[6] or "").strip()))
        except InvalidInput as e:
            raise e if str(e).startswith("line ") else lines.error(str(e)) from e
    inputs = tuple(Value(_plain(m[1]), parse_type(m[2])) for m in _INPUT.finditer(head[2]))
    outputs = [(_plain(m[1]), _plain(m[2])) for m in _OUTPUT.finditer(head[3])]
    return Graph(
        _plain(head[1]), inputs, tuple(nodes), tuple(v for _, v in outputs), tuple(n for n, _ in outputs), weights,
        head[4],
    )  # fmt: skip


def parse(text: str, weights: Weights | None = None) -> Graph:
    """Read a graph; raises :class:`InvalidInput` naming the line. The verifier judges the result."""
    lines = _Lines(text)
    graph = _parse_graph(lines, weights or Weights())
    rest = [line for line in lines.lines[lines.at :] if line.strip() and not line.strip().startswith("#")]
    if rest:
        raise InvalidInput(f"line {lines.at + 1}: text after the graph\n    {rest[0].strip()}")
    return graph


__all__ = ["parse", "show", "show_node"]
