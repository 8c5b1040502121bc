"""Passes: graph in, graph out. ``run_pipeline`` runs them, ``parse_passes`` reads them, ``PASSES`` lists them."""

from bitwright.passes._manager import PassFailed, Pipeline, PipelineReport, run_pipeline
from bitwright.passes._pass import Context, Pass, Refusal
from bitwright.passes._spec import parse_pass, parse_passes

__all__ = [
    "Context",
    "Pass",
    "PassFailed",
    "Pipeline",
    "PipelineReport",
    "Refusal",
    "parse_pass",
    "parse_passes",
    "run_pipeline",
]
