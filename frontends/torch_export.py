"""Capture a torch module or ExportedProgram into a graph of the graph level."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.export import ExportedProgram

from bitwright.frontends.torch_context import origin_of
from bitwright.frontends.torch_inputs import (
    Batch,
    arguments_by_name,
    axis_names,
    batch_specs,
    split_inputs,
    torch_specs,
    widen_batch,
)
from bitwright.frontends.torch_reader import FOLD_LIMIT, OPERATORS, Reader
from bitwright.ir.errors import BitwrightError, InvalidInput, Problem, Unsupported
from bitwright.ir.graph import Graph

NODE_LIMIT = 100_000
"""Nodes of the largest program (an unrolled recurrence, say) that capture reads."""

STEP_LIMIT = 2048
"""Cells (time steps times layers) of the largest recurrence that capture unrolls."""

_MORE_DECOMPOSITIONS = (
    "grid_sampler_2d.default frac.default ldexp.Tensor _euclidean_dist.default sgn.default trace.default "
    "deg2rad.default rad2deg.default sinc.default special_expit.default"
).split()


def capture(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Any = (),
    *,
    dynamic_batch: Batch = False,
    dynamic_shapes: Any = None,
    name: str | None = None,
) -> Graph:
    """Read a model as it infers.

    ``example_inputs``: a tensor, a sequence of positional arguments, or a mapping of keyword arguments; not needed
    for an ExportedProgram. ``dynamic_batch`` makes axis 0 of every input with the first input's batch size the
    symbol ``b`` (or the name given); ``dynamic_shapes`` is torch.export's, with plain strings allowed for Dims.
    Weights are handles onto the module's own storage. Raises :class:`Unsupported` with every problem at once, and
    :class:`InvalidInput` when the module does not run on the inputs.
    """
    if isinstance(module, ExportedProgram):
        program: ExportedProgram = module
        named: list[dict[int, str]] = []
    elif isinstance(module, torch.nn.Module):
        program, named = _export(module, example_inputs, dynamic_batch, dynamic_shapes)
    else:
        raise InvalidInput(
            "a model is a torch.nn.Module, an ExportedProgram, a bitwright Graph, an ONNX file or ModelProto,"
            f" not {type(module).__name__}"
        )
    return Reader(_decomposed(program), named).read(name or _graph_name(module))


def _graph_name(module: torch.nn.Module | ExportedProgram) -> str:
    return "main" if isinstance(module, ExportedProgram) else type(module).__name__


@contextmanager
def _inference(module: torch.nn.Module) -> Iterator[None]:
    """eval() and no_grad, undone afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def _export(
    module: torch.nn.Module, example_inputs: Any, batch: Batch, dynamic_shapes: Any
) -> tuple[ExportedProgram, list[dict[int, str]]]:
    args, kwargs = split_inputs(example_inputs)
    arguments = arguments_by_name(module, args, kwargs)
    if batch and dynamic_shapes is not None:
        raise InvalidInput("give dynamic_batch or dynamic_shapes, not both")
    if batch:
        dynamic_shapes = batch_specs(arguments, "b" if batch is True else batch)
        args, kwargs = widen_batch(args, arguments), widen_batch(kwargs, arguments)
    specs = torch_specs(dynamic_shapes)
    with _inference(module):
        try:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=specs, strict=False)
        except Exception as error:  # torch raises anything from AssertionError to UserError here
            raise _export_failure(module, args, kwargs, error, dynamic_shapes is not None) from error
    return program, axis_names(arguments, dynamic_shapes)


def _export_failure(module: torch.nn.Module, args: Any, kwargs: Any, error: Exception, dynamic: bool) -> BitwrightError:
    try:
        module(*args, **kwargs)
    except Exception as e:  # the user's own failure
        return InvalidInput(f"{type(module).__name__} does not run on the example inputs: {_first_line(e)}")
    _, _, fixes = str(error).partition("Suggested fixes:\n")
    if fixes:
        why = f"a symbolic size is less free than declared: {_first_line(error)}"
        return Unsupported(Problem("torch.export", type(module).__name__, why, f"declare {_first_line(fixes)}"))
    cure = "make the sizes static, or " if dynamic else ""
    cure += "rewrite data-dependent Python control flow with torch.where or torch.cond; see the chained torch error"
    return Unsupported(Problem("torch.export", type(module).__name__, _first_line(error), cure))


def _first_line(error: BaseException | str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@lru_cache(maxsize=1)
def _decompositions() -> dict[Any, Any]:
    """torch's rules for every operator that is not captured whole."""
    from torch._decomp import global_decomposition_table

    defaults: Any = torch.export.default_decompositions()
    table = {op: rule for op, rule in defaults.items() if str(op) not in OPERATORS}
    extra = {f"aten.{n}" for n in _MORE_DECOMPOSITIONS} - OPERATORS.keys()
    table.update({op: r for op, r in global_decomposition_table["post_autograd"].items() if str(op) in extra})
    return table


def _check_recurrences(program: ExportedProgram) -> None:
    """Recurrent layers are unrolled step by step: refuse what would never end, before it starts."""
    problems = []
    for node in program.graph.nodes:
        if not re.match(r"aten\.(lstm|gru|rnn_tanh|rnn_relu)\.input", str(node.target)):
            continue
        x, batch_first = node.args[0].meta["val"], node.args[8]
        steps = x.shape[1 if batch_first and x.dim() == 3 else 0]
        if not isinstance(steps, int):
            why = "the number of time steps is symbolic, and recurrences are unrolled"
            problems.append(Problem(str(node.target), origin_of(node), why, "make the sequence length static"))
        elif steps * node.args[4] > STEP_LIMIT:
            why = f"{steps} time steps of {node.args[4]} layers unroll to more than {STEP_LIMIT} cells"
            problems.append(Problem(str(node.target), origin_of(node), why, "capture a shorter sequence"))
    if problems:
        raise Unsupported(problems)


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    _check_recurrences(program)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result: ExportedProgram = program.run_decompositions(dict(_decompositions()))
        except Exception as error:
            raise Unsupported(Problem("torch.export decompositions", "", _first_line(error))) from error
    if len(result.graph.nodes) > NODE_LIMIT:
        raise Unsupported(Problem("this model", "", f"it unrolls to {len(result.graph.nodes)} operations"))
    return result


__all__ = ["FOLD_LIMIT", "NODE_LIMIT", "OPERATORS", "capture"]
