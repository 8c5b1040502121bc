"""How a ``wgmma`` kernel cuts a product (:class:`Cut`), what that costs by counting, and the default cut.

Counts of one Hopper multiprocessor (NVIDIA's H100 whitepaper; 132 of them): a dense 64 x N x 32 bytes product takes
N / 2 cycles of the tensor cores, a 2:4 one of twice the k as many; shared memory gives 128 bytes a cycle, of which an
instruction reads 2 KiB of A and 32 (2:4: 64) bytes of each of N rows of B; the L2 cache gives some 32 bytes a cycle,
memory 2735 to all of them (4.8 TB/s at 1.755 GHz).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from bitwright.codegen.cuda.instructions.wgmma import widths
from bitwright.codegen.tuning.space import Knob, Point, Rule, Setting
from bitwright.codegen.tvm.cuda.mma_spec import Product
from bitwright.codegen.tvm.cuda.operands import Window
from bitwright.codegen.tvm.cuda.wgmma_layout import ROWS, STEP, blob_bytes

PROCESSORS = 132
"""Multiprocessors of the H100 and H200 SXM; a device with others runs the same kernels."""
_CLUSTERS = {1: PROCESSORS, 2: PROCESSORS, 4: 120}
"""Blocks that surely run at once, by the size of clusters: a cluster lies in one GPC, whose multiprocessors may be no
multiple of four, and one that had to wait for the others would double the time."""
PITCH = ROWS + 4
"""Words of a row of sums in shared memory: neighbouring rows lie in other banks."""
_MEMORY = 2735.0
_CALL = 600.0
"""Cycles until a tile's first operands are there, partly hidden."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A block of one producer warpgroup and ``consumers`` (1 or 2) makes tiles of ``outs`` x ``rows`` sums.

    ``stages`` of operands in shared memory, of which the newest ``ahead`` are still being copied; ``split`` blocks
    share the sums of a tile; ``raster`` tiles of outputs run together; ``blocks`` run at once, each takes many tiles.
    ``cluster`` (1, 2 or 4) blocks with neighbouring rows fetch packed weights together, each a part for all.
    """

    outs: int
    rows: int
    consumers: int = 2
    stages: int = 4
    ahead: int = 2
    split: int = 1
    raster: int = 4
    blocks: int = PROCESSORS
    cluster: int = 1

    @property
    def threads(self) -> int:
        """Of a block; the first warpgroup is the producer."""
        return 128 * (1 + self.consumers)

    @property
    def each(self) -> int:
        """Instructions' worth of outputs of a consumer."""
        return self.outs // ROWS // self.consumers

    @property
    def words(self) -> int:
        """Sums of a thread."""
        return self.each * self.rows // 2

    @property
    def part(self) -> int:
        """Rows that go through shared memory at once."""
        return next(n for n in (32, 24, 16, 8) if self.rows % n == 0)

    def left_bytes(self, p: Product) -> int:
        """Of w in a stage, metadata included."""
        return -(-blob_bytes(self.outs, p.size, p.sparse) // 1024) * 1024

    def stage_bytes(self, p: Product) -> int:
        """Shared memory of a stage."""
        return self.left_bytes(p) + self.rows * STEP

    def steps(self, p: Product) -> int:
        """k-steps of a whole sum."""
        return max(-(-p.bytes_of_k // STEP), 1)

    def sums_at(self, p: Product) -> int:
        """Byte of shared memory from which sums pass; behind them are the barriers."""
        return self.stages * self.stage_bytes(p)

    def barriers_at(self, p: Product) -> int:
        """Byte of the first barrier."""
        return self.sums_at(p) + self.consumers * self.part * PITCH * 4

    def shared_bytes(self, p: Product) -> int:
        """Shared memory of a block."""
        return self.barriers_at(p) + 16 * self.stages + 16

    def tiles(self, p: Product) -> tuple[int, int]:
        """Along outputs and rows; of rows a multiple of the cluster."""
        return math.ceil(p.outs / self.outs), math.ceil(p.rows / self.rows / self.cluster) * self.cluster

    def tasks(self, p: Product) -> int:
        """Tiles of all batches and parts of sums."""
        return math.prod(self.tiles(p)) * p.batch * self.split

    def grid(self, p: Product) -> int:
        """Blocks of a launch."""
        return min(self.tasks(p), self.blocks // self.cluster * self.cluster)

    def fault(self, p: Product, shared: int) -> str:
        """Why no kernel is cut so; the empty string if one is. ``shared``: bytes a block may have."""
        if self.consumers not in (1, 2) or self.outs not in (64, 128, 256) or self.outs < ROWS * self.consumers:
            return "a consumer takes 64 or 128 outputs"
        if self.cluster not in (1, 2, 4) or (self.cluster > 1 and p.left != "packed"):
            return "clusters of two or four share packed weights"
        if self.blocks < self.cluster:
            return "fewer blocks than a cluster has"
        if self.rows not in widths(not p.is_integer):
            return f"no instruction has {self.rows} columns"
        if self.words > 128:
            return "a thread has more than 128 sums"
        if not 0 <= self.ahead <= min(self.stages - 2, 6):
            return "copies run ahead by at most two less than the stages: consumers hold one and wait for the next"
        if self.shared_bytes(p) > shared:
            return f"{self.shared_bytes(p)} bytes of shared memory"
        steps = self.steps(p)
        if self.split > steps or (self.split - 1) * math.ceil(steps / self.split) >= steps:
            return "parts of the sum are empty"
        return ""

    def cycles(self, p: Product) -> float:
        """Of one launch, by counting: waves of tiles, each as long as its slowest unit says."""
        blocks, instructions = self.outs // ROWS, 2 if p.sparse else 4
        tensor = instructions * blocks * self.rows / 2
        banks = instructions * blocks * (2048 + self.rows * (64 if p.sparse else 32)) / 128
        cache = (self.left_bytes(p) / self.cluster + self.rows * STEP) / 32
        end = self.outs * self.rows * (4 if self.split == 1 else 12) / 32
        steps = math.ceil(self.steps(p) / self.split)
        waves = math.ceil(self.tasks(p) / self.grid(p))
        return max(waves * (steps * max(tensor, banks, cache, 64.0) + end + _CALL), memory(p))


def memory(p: Product) -> float:
    """Cycles in which memory gives all operands once and takes the results."""
    bytes_of_w = p.outs * p.bytes_of_k * ((1 + 1 / (4 * p.size)) / 2 if p.sparse else 1)
    x = p.source
    elements = x.images * math.prod(x.space) * x.channels / x.groups if isinstance(x, Window) else x.rows * x.length
    return p.batch * (bytes_of_w + (elements + p.rows * p.outs) * p.size) / _MEMORY


def filled(cut: Cut, p: Product, shared: int) -> Cut:
    """As many stages as fit and are of use."""
    room = shared - (cut.barriers_at(p) - cut.sums_at(p)) - 128
    stages = min(room // cut.stage_bytes(p), 6, math.ceil(cut.steps(p) / cut.split) + 2)
    return replace(cut, stages=stages, ahead=_ahead(stages))


def _ahead(stages: int) -> int:
    """Stages whose copies may be under way: enough to hide memory, one left for consumers that are late."""
    return max(min(3, stages - 2), 0)


def cuts(p: Product, shared: int) -> Iterator[Cut]:
    """Cuts worth a thought."""
    for rows in (256, 192, 128, 96, 64, 48, 32, 16, 8):
        if (rows >= 2 * p.rows and rows > 8) or rows < p.rows <= 64:
            continue
        for outs, consumers in ((128, 2), (256, 2), (64, 1)):
            steps = Cut(outs, rows).steps(p)
            for split in (1, 2, 3, 4, 6, 8, 12, 16):
                if split > 1 and split * 4 > steps:
                    continue
                for cluster, blocks in _CLUSTERS.items():
                    if rows * cluster >= p.rows + rows and cluster > 1:
                        continue
                    cut = Cut(outs, rows, consumers, split=split, blocks=blocks, cluster=cluster)
                    cut = filled(cut, p, shared)
                    if not cut.fault(p, shared):
                        yield cut


@cache
def default(p: Product, shared: int) -> tuple[Cut, str]:
    """The cut of fewest cycles, and why."""
    best = min(cuts(p, shared), key=lambda c: (c.cycles(p), c.split, c.cluster))
    ideal = p.outs * p.rows * p.batch * p.bytes_of_k / 32 / (128 * PROCESSORS) / (2 if p.sparse else 1)
    why = f"tiles of {best.outs} outputs by {best.rows} rows, {best.tasks(p)} on {best.grid(p)} blocks"
    why += f", weights shared by {best.cluster} blocks" if best.cluster > 1 else ""
    why += f", sums in {best.split} parts" if best.split > 1 else ""
    bound, what = (ideal, "the tensor cores' peak") if ideal > memory(p) else (memory(p), "the memory's bandwidth")
    return best, f"{why}; {best.stages} stages of {STEP} bytes; {bound / best.cycles(p):.0%} of {what} by counting"


def knobs() -> tuple[Knob, ...]:
    """What the tuner may choose."""
    return (
        Knob("outs", (64, 128, 256)), Knob("rows", (8, 16, 32, 64, 96, 128, 192, 256)), Knob("consumers", (1, 2)),
        Knob("stages", (3, 4, 5, 6)), Knob("split", (1, 2, 3, 4, 6, 8, 12, 16)), Knob("raster", (2, 4, 8)),
        Knob("cluster", (1, 2, 4)), Knob("kernel", ("dense", "2:4")),
    )  # fmt: skip


def point_of(cut: Cut, p: Product) -> dict[str, Setting]:
    """The point of the space that is a cut."""
    return {
        "outs": cut.outs, "rows": cut.rows, "consumers": cut.consumers, "stages": cut.stages, "split": cut.split,
        "raster": cut.raster, "cluster": cut.cluster, "kernel": "2:4" if p.sparse else "dense",
    }  # fmt: skip


def cut_of(point: Point) -> Cut:
    """The cut of a point."""
    n = {k: int(v) for k, v in point.items() if k != "kernel"}
    return Cut(**n, ahead=_ahead(n["stages"]), blocks=_CLUSTERS[n["cluster"]])


def rules(p: Product, shared: int) -> tuple[Rule, ...]:
    """What points must obey."""

    def fits(point: Point) -> bool:
        return not cut_of(point).fault(replace(p, sparse=point["kernel"] == "2:4"), shared)

    return (Rule("the tile fits no block, or leaves a part of the sum empty", fits),)
