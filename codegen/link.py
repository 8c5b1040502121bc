"""Kernel objects and the generated main, joined into one shared library by the system's C compiler."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitwright.codegen.c.toolchain import TOOLCHAINS
from bitwright.ir.errors import BitwrightError

_FLAGS = ("-std=c99", "-O2", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-w")
_LINK = ("-shared", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,--build-id=none", "-Wl,--version-script=exports.map")
_EXPORTS = "{ global: bw_run; bw_profile; bw_trace; bw_info; bw_abi_version; local: *; };\n"
_TIMEOUT = 300.0


def find_compiler(cc: str | None = None) -> list[str]:
    """The compiler command: ``cc``, else $BITWRIGHT_CC, $CC, cc, gcc, clang; may carry flags.

    Raises :class:`BitwrightError` when none of them exists.
    """
    named = cc or os.environ.get("BITWRIGHT_CC") or os.environ.get("CC")
    for text in [named] if named else ["cc", "gcc", "clang"]:
        command = shlex.split(text or "")
        if command and shutil.which(command[0]):
            return command
    tried = named or "cc, gcc, clang"
    raise BitwrightError(
        f"no C compiler found (tried {tried}); linking a program needs one:"
        " install gcc or clang, or name it in BITWRIGHT_CC"
    )


def compiler_for(arch: str) -> str | None:
    """The cross compiler for another architecture, None for this machine's own compiler.

    Raises :class:`BitwrightError` that says what to install, or that no such compiler is known.
    """
    if arch == platform.machine():
        return None
    if arch not in TOOLCHAINS:
        raise BitwrightError(f"no cross compiler for {arch} is known; there are {', '.join(TOOLCHAINS)}")
    if shutil.which(TOOLCHAINS[arch].compiler) is None:
        raise BitwrightError(f"linking for {arch}: {TOOLCHAINS[arch].missing()}")
    return TOOLCHAINS[arch].compiler


def link(
    objects: Mapping[str, bytes],
    main_c: str,
    *,
    openmp: bool,
    cc: str | None = None,
    notes: list[str] | None = None,
) -> bytes:
    """The shared library made of ``objects`` (name -> ELF object) and the C text ``main_c``.

    Only the ``bw_`` symbols are exported; the same arguments give the same bytes. Without a working OpenMP the
    library is single-threaded and ``notes`` gets a line that says so. Raises :class:`BitwrightError` without a
    compiler, when a symbol is missing (anything that libc, libm and libgomp lack) or defined twice: by name.
    """
    command = find_compiler(cc)
    with tempfile.TemporaryDirectory(prefix="bitwright-link-") as name:
        folder = Path(name)
        files = []
        for number, data in enumerate(objects.values()):
            files.append(f"k{number}.o")
            (folder / files[-1]).write_bytes(data)
        (folder / "main.c").write_text(main_c, encoding="utf-8")
        (folder / "exports.map").write_text(_EXPORTS, encoding="utf-8")
        (folder / "objects.txt").write_text("\n".join(files), encoding="utf-8")
        if openmp and not _openmp_works(command, folder):
            openmp = False
            if notes is not None:
                notes.append(f"{command[0]} cannot link OpenMP: the program runs on one thread")
        threads = ["-fopenmp"] if openmp else []
        _run([*command, *_FLAGS, *threads, "-c", "main.c", "-o", "main.o"], folder, "compiling the main", objects)
        line = [*command, *_LINK, *threads, "main.o", "@objects.txt", "-lm", "-o", "program.so"]
        _run(line, folder, "linking", objects)
        return (folder / "program.so").read_bytes()


def _openmp_works(command: Sequence[str], folder: Path) -> bool:
    """True when a one-line OpenMP library compiles and links."""
    source = "#include <omp.h>\nint bw_probe(void) { return omp_get_max_threads(); }\n"
    (folder / "probe.c").write_text(source, encoding="utf-8")
    line = [*command, "-fPIC", "-fopenmp", "-shared", "-Wl,-z,defs", "probe.c", "-o", "probe.so"]
    return _call(line, folder).returncode == 0


def _call(line: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            line, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT,
            env=os.environ | {"LC_ALL": "C"}, check=False,
        )  # fmt: skip
    except OSError as error:
        raise BitwrightError(f"cannot run the C compiler {line[0]}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BitwrightError(f"the C compiler {line[0]} did not finish in {_TIMEOUT:.0f} s") from error


def _run(line: Sequence[str], folder: Path, doing: str, objects: Mapping[str, bytes]) -> None:
    result = _call(line, folder)
    if result.returncode == 0:
        return
    text = result.stderr
    for number, name in enumerate(objects):
        text = re.sub(rf"\bk{number}\.o\b", name, text)
    missing = sorted(set(re.findall(r"undefined (?:reference to|symbol:?) [`'\"]?([\w.@]+)", text)))
    if missing:
        raise BitwrightError(f"{doing} the program: no object defines {', '.join(missing)}")
    double = sorted(set(re.findall(r"(?:multiple definition of|duplicate symbol:?) [`'\"]?([\w.@]+)", text)))
    if double:
        raise BitwrightError(f"{doing} the program: two objects define {', '.join(double)}")
    raise BitwrightError(
        f"{doing} the program failed ({' '.join(line[:1])}, exit {result.returncode}):\n{text[-2000:]}"
    )
