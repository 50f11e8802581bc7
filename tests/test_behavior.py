"""Edits give the pictures and scores that were recorded before the code was reorganized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from . import behavior
from .server import Server, needs_comfyui

pytestmark = pytest.mark.slow
SCORE_TOLERANCE = 2e-3
"""Of a score: another processor rounds differently, and a few guided steps enlarge that."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The picture, the masks and the network of all edits."""
    return behavior.inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", list(behavior.EDITS))
def test_an_edit_gives_the_recorded_pictures_and_scores(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    pixel, score = behavior.difference(name, *behavior.edited(name, files, tmp_path / "out"))
    assert pixel <= 1, f"a pixel differs by {pixel}/255"
    assert score <= SCORE_TOLERANCE, f"a score differs by {score:.3g}"


def test_a_report_of_an_earlier_version_is_repeated(files: dict[str, Path], tmp_path: Path) -> None:
    """Its picture and mask lie beside it; the folder that it names is gone."""
    from blended_core.cli import main

    for name in ("picture", "mask"):
        shutil.copy(files[name], tmp_path)
    shutil.copy(behavior.FOLDER / "report.json", tmp_path)
    assert main(["edit", "--from", str(tmp_path / "report.json"), "--device", "cpu", "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text("utf-8"))
    options = again["request"]["options"]
    assert (options["preset"], options["steps"], options["sampler"]) == ("best", "8", "ddpm")
    for candidate in again["candidates"]:
        picture = np.array(Image.open(tmp_path / "again" / candidate["file"]).convert("RGB")).astype(int)
        assert np.abs(picture - behavior.recorded()[0]["ddpm"][candidate["candidate"]].astype(int)).max() <= 1


@needs_comfyui
def test_the_loop_of_step_nodes_gives_the_recorded_pictures(comfyui: Server, files: dict[str, Path]) -> None:
    pictures = step_loop(comfyui, files)
    known = behavior.recorded()[0][behavior.STEP_LOOP]
    assert np.abs(known.astype(int) - pictures.astype(int)).max() <= 1


def step_loop(server: Server, files: dict[str, Path]) -> Any:
    """The edit 'ddpm' with a feather, one node at a time; uint8 [2, H, W, 3]."""
    from .test_nodes import core, loop, node, start

    names = {name: server.put(f"behavior_{name}.png", np.array(Image.open(files[name]).convert("RGB"))) for name in ("picture", "mask")}
    prompt = loop(
        {
            "ddpm": node("LoadDDPM", checkpoint="embedded", precision="fp32"),
            "clip": node("LoadCLIP", weights="embedded"),
            "prompt": node("EncodePrompt", clip=["clip", 0], text="a pumpkin"),
            "picture": core("LoadImage", image=names["picture"]),
            "area": core("LoadImageMask", image=names["mask"], channel="red"),
            "start": start(("picture", 0), ("area", 0), steps=8),
        },
        ("picture", 0),
    )
    prompt["paste"]["inputs"]["feather"] = 3
    outcome = server.run(prompt)
    assert outcome.error is None, outcome.error
    return np.stack(server.pictures(outcome, "save"))
