"""The demo behind ``make demo-targets``: one network on this machine, as C, on other processors and on paper devices.

The digits network, trained here, is compiled for everything with one recipe and run on everything (emulated or
simulated where the machine is another), and all must give the same bits.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import digits
import torch

import bitwright as bw
from bitwright import cli_show
from bitwright.cli_compare import print_rows
from bitwright.codegen.c.toolchain import toolchain
from bitwright.compare import Row, agreement, compare, plot

OUT = Path("demo-out")
TARGETS = [
    "host", "x86-avx2", "x86-portable", "aarch64", "riscv64-v", "cuda-sm80", "c", "c:aarch64", "c:riscv64",
    "c:cortex-m4", "npu8", "bitword",
]  # fmt: skip
RECIPES = {
    "int8": "int8",
    "2:4 int8": "nm-mask{pattern=2:4}, int8",
    "2:4 int4": "nm-mask{pattern=2:4}, observe-ranges, quantize-weights{bits=4}, quantize-int8",
}


class Codes(torch.nn.Module):
    """A network whose results are integers: logits in eighths, so that bits can be compared."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(self.net(image) * 8), -128, 127).to(torch.int8)


def network(epochs: int) -> tuple[torch.nn.Module, torch.nn.Module, digits.Digits]:
    """The network as trained, and a copy that was trained on under a 2:4 mask."""
    data = digits.load()
    torch.manual_seed(0)
    dense = digits.Net()
    digits.train(dense, data, epochs, 4e-3, lambda: None, lambda epoch, loss: None)
    sparse = copy.deepcopy(dense)
    masks = digits.masks_2_4(sparse)
    digits.apply_masks(sparse, masks)
    digits.train(sparse, data, 1, 1e-3, lambda: digits.apply_masks(sparse, masks), lambda epoch, loss: None)
    return dense, sparse, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--targets", default=",".join(TARGETS))
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    dense, sparse, data = network(options.epochs)
    calibration = [(part.numpy(),) for part in data.x[:256].split(32)]
    graphs = [bw.capture(Codes(net.eval()), (data.x[:1],), name="digits") for net in (dense, sparse)]
    every: list[Row] = []
    for name, recipe in RECIPES.items():
        rows = compare(graphs["2:4" in name], options.targets.split(","), [recipe], calibration)
        print_rows(name, rows)
        if not agreement(rows).startswith("the same bits"):
            raise SystemExit("the targets disagree")
        every += rows
    plot(every, OUT / "targets.png")
    chains = [t.removeprefix("c:").removesuffix("-v") for t in TARGETS if t.startswith(("c:", "aarch64", "riscv64"))]
    for why in sorted({why for c in chains if (why := toolchain(c).missing())}):
        cli_show.console().print(f"left out: {why}", markup=False)
    cli_show.console().print(f"wrote {OUT / 'targets.png'}", markup=False)


if __name__ == "__main__":
    main()
