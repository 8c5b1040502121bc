"""Kernels as bytes: a zip of machine code, text and, for one kernel, how it is launched and what it takes.

``NAME.cubin`` is what a device runs, ``NAME.cu`` the text that the emulator runs.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bitwright.codegen.cuda.machine_code import Resources


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel. ``launch``: grid x, y, z, threads, bytes of shared memory."""

    name: str
    text: str
    cubin: bytes
    launch: tuple[int, ...]
    resources: Resources


def packed(kernel: Kernel) -> bytes:
    """One kernel as bytes, for the cache."""
    about = {"name": kernel.name, "launch": list(kernel.launch), "resources": asdict(kernel.resources)}
    return _zip({"kernel.json": json.dumps(about).encode(), "kernel.cu": kernel.text.encode(), "cubin": kernel.cubin})


def unpacked(data: bytes) -> Kernel:
    """The kernel of :func:`packed`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        about = json.loads(archive.read("kernel.json"))
        text, cubin = archive.read("kernel.cu").decode(), archive.read("cubin")
    return Kernel(about["name"], text, cubin, tuple(about["launch"]), Resources(**about["resources"]))


def bundle(kernels: Sequence[Kernel]) -> bytes:
    """A program's kernels; the same kernels give the same bytes."""
    return _zip(
        {f"{k.name}.{kind}": data for k in kernels for kind, data in (("cubin", k.cubin), ("cu", k.text.encode()))}
    )


def _zip(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # dated 1980
    return out.getvalue()
