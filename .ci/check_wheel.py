"""Check that a built wheel holds every module of the checkout: ``python .ci/check_wheel.py bitwright-*.whl``."""

import sys
import zipfile
from pathlib import Path

FOLDERS = ("ir", "passes", "frontends", "codegen", "runtime")
root = Path(__file__).resolve().parent.parent
want = {f"bitwright/{p.relative_to(root)}" for f in FOLDERS for p in (root / f).rglob("*.py")}
want |= {f"bitwright/{p.name}" for p in (root / "src/bitwright").glob("*.py")}
missing = want - set(zipfile.ZipFile(sys.argv[1]).namelist())
if missing:
    sys.exit("the wheel lacks " + ", ".join(sorted(missing)))
print(f"the wheel holds all {len(want)} modules")
