"""Files of weights that were made to harm: none runs anything, and none makes a loader take more memory than its size allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/hostile.py found, where a variable of the environment turns off PyTorch's own protection."""
    folder = tmp_path_factory.mktemp("hostile")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    command = [sys.executable, "-m", "tests.hostile", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "ran").exists()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_file_runs_anything_in_any_loader(told: dict[str, Any]) -> None:
    outcomes = told["outcomes"]
    controls = {name: outcome for name, outcome in outcomes.items() if name.startswith("pickle ")}
    assert len(controls) == 9 and set(controls.values()) == {"RAN"}, f"the pickles would run something: {controls}"
    for name, outcome in outcomes.items():
        if name not in controls:
            assert outcome.startswith("BlendedError: ") or (outcome == "loaded" and name.startswith("may_be_checkpoint ")), (name, outcome)
    assert len(outcomes) > 1000


def test_a_small_file_that_names_a_large_clip_takes_no_memory(told: dict[str, Any]) -> None:
    measured = told["memory"]
    assert measured["taken"] <= 3 * measured["size"] + 200, measured
    assert len(measured["told"]) == 4
    for text in measured["told"]:
        assert text.startswith("claims.safetensors: its tensors are not those of this architecture; missing: ") and len(text) < 500
