"""Devices by name: those that come with bitwright, and files of users."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from bitwright.codegen.devices.schema import Device

_FOLDER = Path(__file__).resolve().parent / "builtin"


@cache
def names() -> tuple[str, ...]:
    """The devices that come along, in alphabetical order."""
    return tuple(sorted(p.stem for p in _FOLDER.glob("*.toml")))


def is_device(name: str) -> bool:
    """Whether a target's name means a device: one that comes along, or a file ``*.toml`` of one."""
    return not is_processor(name) if name.endswith(".toml") else name in names()


def is_processor(name: str) -> bool:
    """Whether a target's name is a file ``*.toml`` that describes a processor: it says ``kind = "cpu"``."""
    if not name.endswith(".toml"):
        return False
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8")).get("kind") == "cpu"
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # whoever reads it as a device says what is wrong


def find_device(name: str) -> Device:
    """A device by name or by the path of its file; raises :class:`InvalidInput`."""
    from bitwright.codegen.devices.schema import load_device

    if is_processor(name):
        called = tomllib.loads(text_of(name)).get("name", name)
        raise InvalidInput(f"{called} is a processor: bitwright.compile compiles for it")
    if name.endswith(".toml"):
        return load_device(name)
    if name not in names():
        raise InvalidInput(f"unknown device {name!r}{did_you_mean(name, list(names()))}; a file ends in .toml")
    return load_device(_FOLDER / f"{name}.toml")


def text_of(name: str) -> str:
    """The file of a device as it is written; raises :class:`InvalidInput`."""
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"cannot read the device {name}: {e}") from e
