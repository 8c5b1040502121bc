"""``torch.compile(module, backend="bitwright")``: each graph that dynamo finds becomes a program.

Options are those of :func:`bitwright.compile`, as in ``options={"recipe": "int8", "calibration": data}``. Parameters
and buffers are taken as they are when a graph is compiled. Nothing falls back to torch: what bitwright cannot compile
raises :class:`Unsupported`. Where the graph breaks is dynamo's decision (``fullgraph=True`` forbids it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitwright.ir.errors import Problem, Unsupported

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

    from bitwright.runtime.program import Program


def bitwright_backend(
    module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., tuple[Any, ...]]:
    """The backend that torch's entry point names. A graph of fixed shapes is compiled at once, another when called."""
    import torch

    _refuse_training(example_inputs)
    compiled = _Compiled(module, example_inputs, dict(options or {}))
    if all(isinstance(x, torch.Tensor) for x in example_inputs):
        compiled.program_for(example_inputs)
    return compiled


def _refuse_training(inputs: Sequence[Any]) -> None:
    import torch

    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        cure = "call the compiled module under torch.no_grad() or torch.inference_mode()"
        raise Unsupported(Problem("autograd", "the call", "bitwright programs have no gradients", cure))
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.device.type != "cpu":
            raise Unsupported(
                Problem("input", "the call", f"a tensor on {x.device}", "move module and inputs to the cpu")
            )


class _Compiled:
    """Programs by the sizes they are for; weights are frozen, symbolic sizes become numbers."""

    def __init__(self, module: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> None:
        self.module = module
        self.options = options
        self.frozen = {i: x.detach() for i, x in enumerate(example_inputs) if _is_weight(x)}
        self.programs: dict[tuple[Any, ...], tuple[Program, list[Any]]] = {}

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        import torch

        program, outputs = self.program_for(args)
        made = program(*(x for i, x in enumerate(args) if isinstance(x, torch.Tensor) and i not in self.frozen))
        results = iter(made if isinstance(made, tuple) else (made,))
        return tuple(torch.from_numpy(next(results)) if o is _TENSOR else o for o in outputs)

    def program_for(self, args: Sequence[Any]) -> tuple[Program, list[Any]]:
        """The program for the sizes of ``args`` and what it returns: a marker for a tensor, or a constant."""
        import torch

        free = [x for i, x in enumerate(args) if i not in self.frozen]
        key = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in free)
        if key not in self.programs:
            self.programs[key] = self._compile(args)
        return self.programs[key]

    def _compile(self, args: Sequence[Any]) -> tuple[Program, list[Any]]:
        import torch

        from bitwright import driver

        module, outputs = _specialised(self.module, args, self.frozen)
        tensors = tuple(
            torch.zeros(tuple(map(int, x.shape)), dtype=x.dtype)
            for i, x in enumerate(args)
            if isinstance(x, torch.Tensor) and i not in self.frozen
        )
        if not tensors or not any(o is _TENSOR for o in outputs):
            why = "it has no tensor inputs" if not tensors else "it returns no tensor"
            raise Unsupported(Problem("graph", "dynamo", why, "compile the part that computes on tensors"))
        return driver.compile(driver.capture(module, tensors), **self.options), outputs


_TENSOR = object()


def _is_weight(value: Any) -> bool:
    """Parameters and buffers of a module, which dynamo passes as inputs with this mark."""
    import torch

    return isinstance(value, torch.nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


def _specialised(
    module: GraphModule, args: Sequence[Any], frozen: Mapping[int, torch.Tensor]
) -> tuple[GraphModule, list[Any]]:
    """A copy whose weights are attributes and whose sizes are numbers, and what its outputs are."""
    from torch.fx import Graph, GraphModule, Node

    graph, table, weights = Graph(), dict[Node, Any](), {}
    placeholders = iter(range(len(args)))
    outputs: list[Any] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            i = next(placeholders)
            if i in frozen:
                weights[f"weight_{i}"] = frozen[i]
                table[node] = graph.get_attr(f"weight_{i}")
            else:
                table[node] = args[i] if isinstance(args[i], int | float) else graph.placeholder(node.name)
        elif node.op == "output":
            outputs = [table[o] if isinstance(o, Node) else o for o in node.args[0]]
            graph.output(tuple(o for o in outputs if isinstance(o, Node)))
        else:
            table[node] = _copied(graph, node, table)
    root = {name: getattr(module, name) for name, _ in module.named_children()} | weights
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in root:
            root[node.target] = _attribute(module, str(node.target))
    made = GraphModule(root, graph, class_name="main")
    return made, [_TENSOR if isinstance(o, Node) else o for o in outputs]


def _copied(graph: Any, node: Node, table: dict[Any, Any]) -> Any:
    """The node in the new graph; one whose operands are all numbers (a size computation) is computed now."""
    from torch.fx.node import map_arg

    operands = [table[n] for n in node.all_input_nodes]
    if node.op == "call_function" and operands and all(isinstance(v, int | float) for v in operands):
        values = map_arg((node.args, node.kwargs), lambda n: table[n])
        result = node.target(*values[0], **values[1])  # type: ignore[operator]
        if isinstance(result, int | float):
            return result
    made = graph.create_node(
        node.op,
        node.target,
        map_arg(node.args, lambda n: table[n]),
        map_arg(node.kwargs, lambda n: table[n]),
        node.name,
    )
    made.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return made


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


__all__ = ["bitwright_backend"]
