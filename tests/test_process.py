"""The memory that the terminal's process keeps. Each test runs a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from blended_core.cli import edit
from blended_core.options import preset

ROOT = Path(__file__).parent.parent
FRESH_PAGES = """
import resource, sys
from threading import Thread
from blended_core.cli.process import keep_freed_memory
print(keep_freed_memory() if "keep" in sys.argv else False)
import torch

def work():
    for number in range(24):
        if number == 18:  # for the first blocks the freed ones are slightly too small, because of alignment
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(16_000_000).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if "thread" in sys.argv:
    thread = Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


def fresh_pages(*how: str) -> tuple[bool, int]:
    """(whether freed memory is kept, page faults for six blocks of 64 MB, one after the other)."""
    run = subprocess.run([sys.executable, "-c", FRESH_PAGES, *how], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    kept, pages = run.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt"), reason="only glibc can be asked")
@pytest.mark.parametrize("where", ["", "thread"])
def test_freed_memory_is_reused(where: str) -> None:
    kept, few = fresh_pages("keep", where)
    asked, many = fresh_pages("", where)
    assert kept and not asked
    assert few < 0.2 * many


def test_freed_memory_is_kept_without_a_backward_pass_through_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(edit, "keep_freed_memory", lambda: asked.append(True))
    edit.keep_memory(preset("official"))
    assert not asked, "through the UNet it would need a third more"
    edit.keep_memory(preset("best"))
    assert asked == [True]
