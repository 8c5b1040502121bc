"""``python -m bitwright.passes crash.bw-ir`` runs the reproducer that a failing pass left behind."""

import sys

from bitwright.ir.text import show
from bitwright.passes._instruments import replay

if len(sys.argv) != 2:
    sys.exit("usage: python -m bitwright.passes crash.bw-ir")
print(show(replay(sys.argv[1])[0]))
