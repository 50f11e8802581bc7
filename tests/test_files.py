"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blended_core.io import atomic
from blended_core.io.atomic import replacing, write_bytes

WRITER = """
import sys
from pathlib import Path
from blended_core.io.atomic import replacing
with replacing(Path(sys.argv[1])) as part:
    part.write_bytes(b"half")
    (part.parent / ".tmpAbCdEf").write_bytes(b"of a library")  # safetensors writes to such a file first
    print("writing", flush=True)
    sys.stdin.readline()
    part.write_bytes(b"whole")
"""


def writer(path: Path) -> subprocess.Popen[str]:
    """A process that has begun to write a file, and ends when it gets a line."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_deleted_by_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".blended-mine.part").mkdir()  # not ours: it has no lock
    (tmp_path / ".blended-mine.part" / "x").touch()
    killed, alive = writer(tmp_path / "a.safetensors"), writer(tmp_path / "b.safetensors")
    killed.kill()
    killed.wait()
    hidden = [p for p in tmp_path.glob(".blended-*.part") if (p / atomic.LOCK).exists()]
    assert len(hidden) == 2
    for folder in hidden:
        os.utime(folder, (0, 0))
    write_bytes(tmp_path / "c", b"new")
    (left,) = (p for p in hidden if p.exists())
    assert names(left) == [".tmpAbCdEf", "b.safetensors", atomic.LOCK]
    alive.communicate("go\n", timeout=60)
    assert names(tmp_path) == [".blended-mine.part", "b.safetensors", "c"] and (tmp_path / "b.safetensors").read_bytes() == b"whole"


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(atomic.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_bytes(tmp_path / "x", b"data")
    assert order[:2] == ["fsync", "replace"] and names(tmp_path) == ["x"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_after_an_error_nothing_has_changed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), replacing(tmp_path / "x") as part:
        part.write_bytes(b"new")
        raise RuntimeError("stop")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"
    with pytest.raises(OSError):
        write_bytes(tmp_path / ("x" * 300), b"")
    write_bytes(tmp_path / ("가" * 84), b"")
    assert names(tmp_path) == ["x", "가" * 84]
