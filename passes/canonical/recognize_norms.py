"""stub"""

from dataclasses import dataclass
from typing import ClassVar
from bitwright.passes._pass import Context, Pass
from bitwright.ir.graph import Graph


@dataclass(frozen=True)
class RecognizeNorms(Pass):
    """Stub."""

    name: ClassVar[str] = "recognize-norms"

    def run(self, graph: Graph, context: Context) -> Graph:
        return graph
