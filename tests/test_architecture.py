"""The import contracts of pyproject.toml, and that they can fail; the code of docs/library.md."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blended_core.toy.world import demo_scene

ROOT = Path(__file__).parent.parent


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts of the project in a folder."""
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(folder / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests" / "mypy_path")])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


SLOW = {"kornia", "open_clip", "lpips", "huggingface_hub"}
"""Packages that the function imports which uses them."""
PLACES = {"blended_core/__init__.py": {""}, "blended_core/io/images.py": {"torch"}}
"""Where a function may import something else, besides the commands of the terminal: file → packages, '' for this one."""


def imports_of_functions(file: Path) -> set[str]:
    """The packages that functions of a file import in their bodies; '' for this package."""
    functions = [f for f in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    nodes = [node for function in functions for node in ast.walk(function)]
    found = {name.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return found | {"" if node.level else str(node.module).partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


def test_functions_import_only_where_the_rule_allows_it() -> None:
    found = {file.relative_to(ROOT).as_posix(): imports_of_functions(file) for file in (ROOT / "blended_core").rglob("*.py")}
    assert set.union(*found.values()) >= SLOW | {"", "torch"}
    for file, packages in found.items():
        assert file.startswith("blended_core/cli/") or packages - SLOW <= PLACES.get(file, set()), file
    nodes = [imports_of_functions(file) for file in (ROOT / "nodes").glob("*.py")]
    assert set.union(*nodes) == set()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the library, the nodes and their contracts."""
    for name in ("blended_core", "nodes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("data", "__pycache__"))
    shutil.copytree(ROOT / "tests" / "mypy_path", tmp_path / "tests" / "mypy_path", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_import_follows_the_layers(project: Path) -> None:
    checked = lint_imports(project)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("blended_core/mask.py", "from .edit import edit_picture", "Dependencies point one way"),
        ("blended_core/sample.py", "from .evaluation.judge import Judge", "Dependencies point one way"),
        ("blended_core/device.py", "import comfy.model_management", "The library knows nothing of ComfyUI"),
        ("nodes/load.py", "from ..blended_core.cli.app import main", "Nodes work without the terminal, training and evaluation"),
        ("nodes/rank.py", "from ..blended_core.evaluation.judge import Judge", "Nodes work without the terminal, training and evaluation"),
        (
            "blended_core/sample.py",
            "from .toy.world import OBJECTS",
            "Only loaders, the terminal, evaluation and training know the toy world",
        ),
    ],
)
def test_a_forbidden_import_breaks_its_contract(project: Path, module: str, line: str, contract: str) -> None:
    file = project / module
    file.write_text(f"{file.read_text('utf-8')}\n{line}\n", "utf-8")
    checked = lint_imports(project)
    assert checked.returncode != 0
    assert f"{contract} BROKEN" in checked.stdout, checked.stdout + checked.stderr


@pytest.mark.slow
def test_the_code_of_the_library_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "library.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) >= 3
    quick = "\n".join(blocks).replace("candidates=4", 'candidates=1, steps="4", views=2').replace('steps="25"', 'steps="10", views=2')
    picture, mask = demo_scene()
    Image.fromarray(picture).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    script = tmp_path / "page.py"
    check = "plain = edit_picture(picture.tensor(), mask, 'a rose', models, preset('best', steps='10', views=2, candidates=1))\n"
    check += "import numpy\nnumpy.save('means.npy', [float(r.candidates[0].edited.mean()) for r in (darker, plain)])\n"
    script.write_text(f"import torch\n{quick}\n{check}", "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    darker, plain = np.load(tmp_path / "means.npy")
    assert darker < plain, "the loss of the page darkens the region"
