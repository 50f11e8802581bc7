"""The pack in a real ComfyUI, found by COMFYUI_PATH or in the home folder. No stand-in: without one these tests are skipped."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .server import COMFYUI, FOLDERS, ROOT, interpreter, needs_comfyui

pytestmark = needs_comfyui


@pytest.mark.slow
def test_the_pack_is_loaded_without_complaint(tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "custom_nodes" / "blended diffusion-1.0").symlink_to(ROOT, target_is_directory=True)
    command = [interpreter(), "main.py", "--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--base-directory", str(tmp_path)]
    command += ["--database-url", f"sqlite:///{tmp_path}/user/comfyui.db"]
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.0) > 0.3:  # other work can make a start longer, never shorter
        run = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True, timeout=400)
        said = run.stdout + run.stderr
        assert run.returncode == 0, said[-3000:]
        (line,) = [line for line in said.splitlines() if "seconds" in line and "blended diffusion-1.0" in line]
        assert "IMPORT FAILED" not in line
        seconds.append(float(line.split("seconds")[0].split()[-1]))
    assert min(seconds) <= 0.3
    assert "blended diffusion-1.0 module for custom nodes" not in said  # the warning that drops a pack
