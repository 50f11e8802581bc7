"""The pack in a real ComfyUI, found by COMFYUI_PATH or in the home folder. No stand-in: without one these tests are skipped."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .server import COMFYUI, FOLDERS, ROOT, Server, interpreter, needs_comfyui

pytestmark = needs_comfyui


@pytest.mark.slow
def test_the_pack_is_loaded_without_complaint(tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "custom_nodes" / "blended diffusion-1.0").symlink_to(ROOT, target_is_directory=True)
    command = [interpreter(), "main.py", "--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--base-directory", str(tmp_path)]
    command += ["--database-url", f"sqlite:///{tmp_path}/user/comfyui.db"]
    seconds = []
    while len(seconds) < 3 and min(seconds, default=9.0) > 1:  # other work can make a start longer, never shorter
        run = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True, timeout=400)
        said = run.stdout + run.stderr
        assert run.returncode == 0, said[-3000:]
        (line,) = [line for line in said.splitlines() if "seconds" in line and "blended diffusion-1.0" in line]
        assert "IMPORT FAILED" not in line
        seconds.append(float(line.split("seconds")[0].split()[-1]))
    assert min(seconds) <= 1
    assert "blended diffusion-1.0 module for custom nodes" not in said  # the warning that drops a pack


@pytest.mark.slow
def test_the_text_of_a_node_goes_to_the_client_that_runs_it_and_is_sent_again_while_it_is_cached(comfyui: Server) -> None:
    import websocket

    prompt = {
        "ddpm": {"class_type": "BlendedLoadDDPM", "inputs": {"checkpoint": "embedded", "overrides": "num_heads = 1"}},
        "scene": {"class_type": "BlendedDemoScene", "inputs": {"width": 64, "height": 64}},
        "start": {
            "class_type": "BlendedNoiseBackground",
            "inputs": {
                "image": ["scene", 0], "mode": "start", "mode.ddpm": ["ddpm", 0], "mode.steps": 2, "mode.strength": 1.0, "mode.seed": 0, "mode.batch": 1,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["start", 0], "filename_prefix": "text"}},
    }  # fmt: skip
    told: list[str] = []

    def listen(kind: str, data: dict[str, Any]) -> None:
        if kind == "executed" and data["node"] == "ddpm":
            told.extend(data["output"]["text"])

    other = websocket.create_connection(f"ws://127.0.0.1:{comfyui.port}/ws?clientId=somebody-else", timeout=2)
    with contextlib.closing(other):
        first = comfyui.run(prompt, listen)
        heard = []
        with contextlib.suppress(websocket.WebSocketTimeoutException):
            while True:
                heard.append(other.recv())
    assert first.error is None and "ddpm" in first.executed
    assert len(told) == 1 and "64 px" in told[0] and first.outputs["ddpm"]["text"] == told
    assert heard and not any(b"64 px" in (m if isinstance(m, bytes) else m.encode()) for m in heard), "the text went to another client"
    again = comfyui.run(prompt, listen)  # as a page does that was reloaded
    assert "ddpm" in again.cached and "ddpm" not in again.executed
    if "has_intermediate_output" in comfyui.get("/object_info/BlendedLoadDDPM")["BlendedLoadDDPM"]:  # this ComfyUI can send it again
        assert told == told[:1] * 2 and again.outputs["ddpm"]["text"] == told[:1]
