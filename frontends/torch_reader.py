"""One walk over an exported program: every node through the operator table, problems collected, outputs named."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from bitwright.frontends import (
    torch_contract,
    torch_index,
    torch_norm,
    torch_pointwise,
    torch_quantized,
    torch_reduce,
    torch_shape,
)  # fmt: skip
from bitwright.frontends.torch_context import Context, Handler, Literal, Refusal, Size, origin_of, same_dim
from bitwright.frontends.torch_inputs import symbol_names
from bitwright.ir.build import Builder
from bitwright.ir.errors import Problem, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.infer import InferenceError

OPERATORS: Mapping[str, Handler] = {
    **torch_pointwise.TABLE, **torch_contract.TABLE, **torch_norm.TABLE, **torch_reduce.TABLE, **torch_shape.TABLE,
    **torch_index.TABLE, **torch_quantized.TABLE,
}  # fmt: skip
"""Every operator that is captured whole, by torch's name; torch decomposes the others."""

FOLD_LIMIT = 1 << 24
"""Elements of the largest constant that capture computes."""

_SIDE_EFFECTS = {
    "aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default", "aten._assert_async.msg",
}  # fmt: skip


class _Poison:
    """The result of a node that could not be captured and whose type has no name either."""


_POISON = _Poison()


class Reader:
    """One walk over an exported program; problems are collected and raised together at the end."""

    def __init__(self, program: ExportedProgram, named: list[dict[int, str]]) -> None:
        self.program = program
        self.placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        users = [n.meta["val"] for n, s in zip(self.placeholders, program.graph_signature.input_specs, strict=True)
                 if s.kind == InputKind.USER_INPUT and isinstance(n.meta["val"], torch.Tensor)]  # fmt: skip
        self.cx = Context(Builder(), symbol_names(users, named))
        self.env: dict[torch.fx.Node, Any] = {}
        self.stored: dict[torch.fx.Node, str] = {}
        self.problems: list[Problem] = []

    def read(self, name: str) -> Graph:
        self.cx.b.name = name
        sources = list(zip(self.placeholders, self.program.graph_signature.input_specs, strict=True))
        for node, spec in sorted(sources, key=lambda s: s[1].kind != InputKind.USER_INPUT):  # inputs keep their names
            self._guarded(node, lambda node=node, spec=spec: self._placeholder(node, spec))
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._guarded(node, lambda node=node: self._call(node))
            elif node.op == "get_attr":
                self._problem(node, "a nested graph (control flow)", "export one branch, or use torch.where")
        outputs = self._outputs()
        if self.problems:
            raise Unsupported(_merged(self.problems))
        return self.cx.b.finish([v for v, _ in outputs], [n for _, n in outputs])

    # --- problems ------------------------------------------------------------------------------------------

    def _problem(self, node: torch.fx.Node, why: str, cure: str = "", operator: str = "") -> None:
        operator = operator or str(node.target)
        self.problems.append(Problem(operator, origin_of(node) or node.name, why, cure))
        self.env[node] = self._stand_in(node)

    def _guarded(self, node: torch.fx.Node, step: Any) -> None:
        self.cx.node, self.cx.origin = node, origin_of(node)
        try:
            step()
        except Refusal as r:
            self._problem(node, r.why, r.cure)
        except InferenceError as e:
            self._problem(node, str(e), "make the sizes static; if they are, please report this model")

    def _stand_in(self, node: torch.fx.Node) -> Any:
        """A made-up input of the right type, so that the walk goes on and finds the other problems."""

        def one(fake: Any) -> Any:
            try:
                return self.cx.b.input(self.cx.b.fresh(f"{node.name}.missing"), self.cx.fake_type(fake))
            except (Refusal, AttributeError):
                return _POISON

        fake = node.meta.get("val")
        return tuple(map(one, fake)) if isinstance(fake, (tuple, list)) else one(fake)

    # --- sources -------------------------------------------------------------------------------------------

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> None:
        fake, target = node.meta["val"], spec.target
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(fake, torch.Tensor):
                self.env[node] = self.cx.b.input(node.name, self.cx.fake_type(fake))
            elif isinstance(fake, torch.SymInt):
                raise Refusal("an int argument is symbolic", "pass it as a tensor, or keep it fixed")
            else:
                self.env[node] = fake
            return
        if spec.kind == InputKind.PARAMETER:
            self.env[node] = self.cx.weight(target, self.program.state_dict[target])
        elif spec.kind == InputKind.BUFFER:
            held = self.program.state_dict.get(target)
            self.env[node] = Literal(self.program.constants[target] if held is None else held, target)
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            self.env[node] = Literal(self.program.constants[target], target)
        elif spec.kind == InputKind.TOKEN:
            self.env[node] = _POISON
        else:
            raise Refusal(f"the model holds a {spec.kind.name.lower()}", "only tensors can be captured")

    # --- operators -----------------------------------------------------------------------------------------

    def _call(self, node: torch.fx.Node) -> None:
        key, fake = str(node.target), node.meta.get("val")
        if node.target is operator.getitem:
            return self._item(node)
        if key == "with_effects":
            return self._effect(node)
        if key in _SIDE_EFFECTS or not _is_tensorial(fake):
            return None  # sizes are read off torch's own types; assertions hold by export's guards
        if any(self.env.get(n) is _POISON for n in node.all_input_nodes):
            self.env[node] = self._stand_in(node)
            return None
        if self._fold(node):
            return None
        handler = OPERATORS.get(key)
        if handler is None:
            if isinstance(fake, torch.Tensor):
                self.cx.fake_type(fake)  # a dtype without a name is the better reason
            return self._problem(node, "bitwright has no such operator", "replace it, or compute it outside the model")
        args, kwargs = (self._resolve(a) for a in (node.args, node.kwargs))
        self.env[node] = self._checked(node, handler(self.cx, *args, **kwargs), quantized="quant" in key)
        return None

    def _effect(self, node: torch.fx.Node) -> None:
        """An operator run for its effect (an assertion, a print) is dropped; one whose result is read is refused."""
        self.env[node] = _POISON
        if any(user.args[1] != 0 and user.users for user in node.users if user.target is operator.getitem):
            self._problem(node, "an operator with side effects gives a result", operator=str(node.args[1]))

    def _item(self, node: torch.fx.Node) -> None:
        source, index = node.args
        if self.env.get(source) is _POISON:  # type: ignore[arg-type]
            self.env[node] = _POISON
            return
        value = self.env[source][index]  # type: ignore[index]
        if value is None:
            raise Refusal(f"result {index} of {source.target} is used", "only its first result can be captured")  # type: ignore[union-attr]
        self.env[node] = value

    def _fold(self, node: torch.fx.Node) -> bool:
        """Compute a node whose operands are all known; parameters and quantized weights stay as they are."""
        key, fakes = str(node.target), node.meta["val"]
        fakes = fakes if isinstance(fakes, (tuple, list)) else [fakes]
        if not key.startswith(("aten.", "prims.")) or key in _NEVER_FOLDED:
            return False
        if not all(isinstance(self.env.get(n), Literal) for n in node.all_input_nodes):
            return False
        if not all(isinstance(d, int) for f in fakes for d in f.shape) or sum(f.numel() for f in fakes) > FOLD_LIMIT:
            return False
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.env[n].tensor)
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, torch.Tensor):
            source = next((v for n in node.all_input_nodes if _same_place((v := self.env[n]).tensor, result)), None)
            self.env[node] = source or Literal(result)
        else:
            self.env[node] = tuple(Literal(r) for r in result)
        return True

    def _resolve(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self._operand(arg)
        if isinstance(arg, (list, tuple)):
            return [self._resolve(a) for a in arg]
        if isinstance(arg, dict):
            return {k: self._resolve(v) for k, v in arg.items()}
        return arg

    def _operand(self, node: torch.fx.Node) -> Any:
        value = self.env.get(node)
        if isinstance(value, Literal):
            if node not in self.stored:
                self.stored[node] = self.cx.store(value)
            return self.stored[node]
        if value is not None or node in self.env:
            return value
        fake = node.meta.get("val")
        if isinstance(fake, torch.SymInt):
            try:
                size = self.cx.dim(fake)
            except Refusal:
                return None  # the result's own shape will say so, where it matters
            return Size(size) if isinstance(size, str) else size
        if isinstance(fake, (torch.SymFloat, torch.SymBool)):
            raise Refusal("a scalar is computed from a symbolic size", "make that dimension static")
        return fake

    def _checked(self, node: torch.fx.Node, result: Any, quantized: bool) -> Any:
        """The handler's result, cast to torch's dtype; shapes must agree."""
        fake = node.meta["val"]
        if isinstance(result, tuple):
            return tuple(None if r is None else self._same(r, f) for r, f in zip(result, fake, strict=False))
        return result if quantized else self._same(result, fake)

    def _same(self, value: str, fake: torch.Tensor) -> str:
        self.cx.learn(fake, value)
        want, have = self.cx.fake_type(fake), self.cx.type(value)
        if len(have.shape) != len(want.shape) or not all(map(same_dim, have.shape, want.shape)):
            raise Refusal(f"it was read as {have} where torch has {want}", "please report this model")
        return self.cx.cast(value, want.dtype)

    # --- results -------------------------------------------------------------------------------------------

    def _outputs(self) -> list[tuple[str, str]]:
        signature = self.program.graph_signature
        returned = next(n for n in self.program.graph.nodes if n.op == "output").args[0]
        values = []
        for spec, arg in zip(signature.output_specs, returned, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                values.append(arg)
            elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                if arg in self.placeholders:
                    continue  # written with its own value
                why = f"the model writes to {spec.target!r}, and a compiled program keeps no state"
                self.problems.append(Problem("mutation", origin_of(arg), why, "return the new value instead"))
        names = _output_names(self.program, len(values))
        found = []
        for name, arg in zip(names, values, strict=True):
            if isinstance(arg, torch.fx.Node) and isinstance(arg.meta["val"], torch.Tensor):
                value = self._operand(arg)
                if isinstance(value, str):
                    found.append((value, name))
                elif not self.problems:
                    self.problems.append(Problem(str(arg.target), origin_of(arg), "its result cannot be captured"))
        if not found and not self.problems:
            raise Unsupported(Problem("this model", "", "it returns no tensor"))
        return found


_NEVER_FOLDED = {k for k, h in torch_index.TABLE.items() if h is torch_index.random_numbers} | {
    k for k in torch_shape.TABLE if k.startswith(("aten.empty", "aten.new_empty"))
}


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _is_tensorial(fake: Any) -> bool:
    return isinstance(fake, torch.Tensor) or (
        isinstance(fake, (tuple, list)) and any(isinstance(f, torch.Tensor) for f in fake)
    )


def _output_names(program: ExportedProgram, count: int) -> list[str]:
    """Names by the place in the result: ``output``, ``output_0``, ``logits``, ``boxes_1``."""
    spec = program.call_spec.out_spec
    names: list[str] = []
    if spec is not None and spec.num_leaves == count:
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
        for path, _leaf in paths:
            parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
            text = "_".join(parts)
            names.append(text if text and not text[0].isdigit() else "_".join(filter(None, ("output", text))))
    if len(names) != count:
        names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    taken: set[str] = set()
    for i, n in enumerate(names):
        k = 0
        while names[i] in taken:
            k += 1
            names[i] = f"{n}_{k}"
        taken.add(names[i])
    return names


def _merged(problems: list[Problem]) -> list[Problem]:
    """One entry for each operator and reason, with the first place and how many more there are."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for p in problems:
        groups.setdefault((p.operator, p.why, p.cure), []).append(p.place)
    merged = []
    for (op, why, cure), places in groups.items():
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        merged.append(Problem(op, f"{places[0]}{more}", why, cure))
    return merged


__all__ = ["FOLD_LIMIT", "OPERATORS", "Reader"]
