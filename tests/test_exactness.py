"""The table of the README that compares nodes by the pixels that they change outside of a mask."""

from __future__ import annotations

import json

import pytest

from benchmarks import exactness

from .server import Server, needs_comfyui


def test_the_table_of_exactness_in_the_readme_is_the_recorded_one() -> None:
    record = json.loads(exactness.RECORD.read_text("utf-8"))
    assert exactness.table(record) in (exactness.ROOT / "README.md").read_text("utf-8")
    outside = int((exactness.masks()["binary"] == 0).sum())
    assert record["outside"] == outside and f"{outside:,} of them are outside" in (exactness.ROOT / "README.md").read_text("utf-8")
    half = exactness.masks()["half"].repeat(2, axis=0).repeat(2, axis=1)
    assert (half == exactness.masks()["binary"]).all()


@needs_comfyui
@pytest.mark.slow
def test_final_paste_changes_no_pixel_outside_and_others_do(comfyui: Server) -> None:
    changed = exactness.measure(comfyui)
    assert set(changed) == {"ImageCompositeMasked", "BlendedFinalPaste"}
    assert changed["BlendedFinalPaste"] == {"binary": 0, "half": 0, "gray": 0}
    core = changed["ImageCompositeMasked"]
    assert core["binary"] == 0 and all(isinstance(core[name], int) and core[name] > 0 for name in ("half", "gray"))
