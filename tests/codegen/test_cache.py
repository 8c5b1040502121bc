"""The object cache: damage, eviction, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.codegen.cache import Cache, default_directory, key_of


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def entry(cache: Cache) -> Path:
    (path,) = cache.directory.glob("??/*.entry")
    return path


def test_what_was_put_comes_back(cache: Cache) -> None:
    key = key_of("kernel", (1, 2), b"\x00")
    assert cache.get(key) is None
    cache.put(key, b"object")
    assert cache.get(key) == b"object"
    assert cache.get_or_make(key, lambda: b"other") == b"object"
    assert cache.get_or_make(key_of("new"), lambda: b"made") == b"made"
    assert (cache.hits, cache.misses) == (2, 2)
    cache.clear()
    assert cache.get(key) is None
    assert cache.size() == 0


def test_keys_depend_on_every_part() -> None:
    keys = {key_of(), key_of("a"), key_of("a", "b"), key_of("ab"), key_of(b"a"), key_of(("a", "b")), key_of(1)}
    assert len(keys) == 7


def test_any_flipped_bit_is_a_miss_and_is_rebuilt(cache: Cache) -> None:
    key = key_of("k")
    cache.put(key, b"object bytes")
    good = entry(cache).read_bytes()
    for index in range(len(good)):
        path = cache.directory / key[:2] / f"{key}.entry"
        path.write_bytes(good[:index] + bytes([good[index] ^ 4]) + good[index + 1 :])
        assert cache.get(key) is None
        assert not path.exists()
        assert cache.get_or_make(key, lambda: b"object bytes") == b"object bytes"
        assert path.read_bytes() == good


@pytest.mark.parametrize("size", [0, 5, 20, 24, 30])
def test_truncated_entries_are_misses(cache: Cache, size: int) -> None:
    cache.put(key_of("k"), b"object bytes")
    path = entry(cache)
    path.write_bytes(path.read_bytes()[:size])
    assert cache.get(key_of("k")) is None


def test_an_entry_under_another_key_is_a_miss(cache: Cache) -> None:
    cache.put(key_of("a"), b"object of a")
    target = cache.directory / key_of("b")[:2] / f"{key_of('b')}.entry"
    target.parent.mkdir(exist_ok=True)
    entry(cache).rename(target)
    assert cache.get(key_of("b")) is None


def test_the_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10_000)
    keys = [key_of(i) for i in range(9)]
    for age, key in enumerate(keys):
        cache.put(key, bytes(1000))
        os.utime(cache._path(key), (1000 + age, 1000 + age))
    assert cache.get(keys[0]) is not None  # used just now
    cache.put(key_of("x"), bytes(1000))
    cache.evict()
    assert cache.size() <= 9_000
    assert cache.get(keys[0]) is not None
    assert cache.get(keys[1]) is None
    for i in range(100):
        cache.put(key_of("more", i), bytes(500))
    assert cache.size() <= 11_000


def test_leftovers_of_dead_processes_are_removed(cache: Cache) -> None:
    cache.put(key_of("k"), b"x")
    old, new = (entry(cache).with_name(f"{n}.tmp") for n in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    cache.evict()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    assert cache.get_or_make(key_of("k"), lambda: b"made") == b"made"
    assert "cannot be written" in cache.problem
    assert cache.size() == 0
    assert cache.evict() == 0


def test_strange_keys_stay_inside_the_directory(cache: Cache) -> None:
    cache.put("../../outside", b"x")
    assert cache.get("../../outside") == b"x"
    assert entry(cache).resolve().is_relative_to(cache.directory.resolve())


def test_the_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    assert default_directory() == Cache().directory == tmp_path
    monkeypatch.delenv("BITWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_directory() == Path("/x/bitwright")


def test_processes_share_a_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from bitwright.codegen.cache import Cache, key_of\n"
        "c = Cache(sys.argv[1], max_bytes=40_000)\n"
        "for r in range(3):\n"
        "  for i in range(60):\n"
        "    d = bytes([i]) * 1000\n"
        "    assert c.get_or_make(key_of(i), lambda: d) == d\n"
        "assert not c.problem, c.problem\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env) for _ in range(4)]
    assert [p.wait() for p in running] == [0] * 4
    assert not list(tmp_path.glob("??/*.tmp"))
    assert Cache(tmp_path, max_bytes=40_000).size() <= 60_000
