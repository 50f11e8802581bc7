"""Files of weights that were made to harm: none runs anything, and none makes a loader take more memory than its size allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHILD = {"OMP_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}

MEMORY = """
import json, resource, struct, sys
from pathlib import Path
import open_clip
from blended_core import BlendedError, DeviceContext, load_clip
from blended_core.clip.files import known_signatures

known = known_signatures()["ViT-bigG-14"]
text, vision, embed = known["text"], known["vision"], known["embed_dim"]
shapes = {
    "token_embedding.weight": [text["vocab_size"], text["width"]], "positional_embedding": [text["context_length"], text["width"]],
    "text_projection": [text["width"], embed], "logit_scale": [],
    "visual.conv1.weight": [vision["width"], 3, vision["patch_size"], vision["patch_size"]],
    "visual.positional_embedding": [(vision["image_size"] // vision["patch_size"]) ** 2 + 1, vision["width"]],
    f"transformer.resblocks.{text['layers'] - 1}.x": [0], f"visual.transformer.resblocks.{vision['layers'] - 1}.x": [0],
}
header, end = {}, 0
for name, shape in shapes.items():
    size = 1
    for n in shape:
        size *= n
    header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
    end += size
head = json.dumps(header).encode()
path = Path(sys.argv[1]) / "claims.safetensors"
with path.open("wb") as stream:
    stream.write(struct.pack("<Q", len(head)) + head)
    stream.truncate(8 + len(head) + end)
context = DeviceContext.choose("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
told = []
for spec in (str(path), f"ViT-bigG-14:{path}", f"RN50x64:{path}", f"coca_ViT-L-14:{path}"):
    try:
        load_clip(context, spec)
    except BlendedError as error:
        told.append(str(error))
taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps({"told": told, "taken": taken, "size": path.stat().st_size / 2**20}))
"""


def test_no_file_runs_anything_in_any_loader(tmp_path: Path) -> None:
    """Even where a variable of the environment turns off PyTorch's own protection."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", str(tmp_path)], cwd=ROOT, env={**os.environ, **CHILD}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    controls = {name: outcome for name, outcome in outcomes.items() if name.startswith("pickle ")}
    assert len(controls) == 9 and set(controls.values()) == {"RAN"}, f"the pickles would run something: {controls}"
    for name, outcome in outcomes.items():
        if name not in controls:
            assert outcome.startswith("BlendedError: ") or (outcome == "loaded" and name.startswith("may_be_checkpoint ")), (name, outcome)
    assert len(outcomes) > 1000 and not (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
def test_a_small_file_that_names_a_large_clip_takes_no_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, env={**os.environ, **CHILD}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["taken"] <= 3 * measured["size"] + 200, measured
    assert len(measured["told"]) == 4 and all(text.startswith("claims.safetensors: its tensors are not those") for text in measured["told"])
