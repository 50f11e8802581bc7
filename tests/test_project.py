"""The project's own papers: what README, requirements and packaging promise is what is there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blended_core.cli.parser import build_parser
from blended_core.toy.world import BACKGROUNDS, OBJECTS, demo_scene

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def script(name: str) -> Any:
    """A script of the folder docs, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags_of_parser() -> set[str]:
    """Every option string of every command."""
    flags: set[str] = set()
    parsers = [build_parser()]
    while parsers:
        for action in parsers.pop()._actions:
            flags.update(action.option_strings)
            if isinstance(action.choices, dict):
                parsers.extend(action.choices.values())
    return flags


def our_words(text: str) -> str:
    """The README without the left column of the table that lists the original script's flags."""
    start = text.index("## From the original script")
    end = text.index("## ", start + 3)
    rows = [line.rsplit("|", 2)[1] if line.startswith("|") else line for line in text[start:end].splitlines()]
    return text[:start] + "\n".join(rows) + text[end:]


def test_every_flag_in_the_readme_exists() -> None:
    spans = re.findall(r"`([^`\n]+)`|```[a-z]*\n(.*?)```", our_words(README), flags=re.S)
    named = {flag for span in spans for part in span for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", part)}
    foreign = {"--help"}
    assert named - flags_of_parser() - foreign == set()
    assert len(named) > 20


def test_original_flags_map_to_existing_ones() -> None:
    start = README.index("## From the original script")
    rows = [line for line in README[start : README.index("## ", start + 3)].splitlines() if line.startswith("| `")]
    assert len(rows) >= 14
    for row in rows:
        for flag in re.findall(r"--[a-z][a-z-]+", row.rsplit("|", 2)[1]):
            assert flag in flags_of_parser(), row


def test_readme_names_the_world_as_it_is() -> None:
    section = README[README.index("## The embedded world") :]
    for name in (*OBJECTS, *BACKGROUNDS):
        assert re.search(rf"\b{name}\b", section), name


def test_the_documents_explain_the_error_of_core_nodes_about_channels() -> None:
    for file in ("README.md", "docs/nodes.md"):
        row = next(line for line in (ROOT / file).read_text("utf-8").splitlines() if "to have 4 channels, but got 3 channels" in line)
        assert "pixels" in row and "*Final Paste*" in row, file


def test_links_and_pictures_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), target


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_requirements_are_those_of_the_project_without_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = {d for d in project["project"]["dependencies"] if not d.startswith("torch")}
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == wanted
    assert project["project"]["scripts"]["blended-diffusion"] == "blended_core.cli:main"
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(project["tool"]["comfy"])


@pytest.mark.parametrize("name", ["ddpm.safetensors", "clip.safetensors", "lpips.safetensors"])
def test_embedded_weights_are_small_and_carded(name: str) -> None:
    data = ROOT / "blended_core" / "toy" / "data"
    assert (data / name).stat().st_size <= 12_000_000
    assert name in (data / "MODEL_CARDS.md").read_text("utf-8")


def test_root_is_importable_without_comfyui_under_any_name(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("some-folder.with dots", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.comfy_entrypoint)
    assert not hasattr(module, "NODE_CLASS_MAPPINGS")  # with it ComfyUI would never call the entry point


PACKAGES = """
import importlib, sys
def packages():  # that were installed, without this one
    ours = {name.partition(".")[0] for name, module in list(sys.modules.items()) if "site-packages" in (getattr(module, "__file__", None) or "")}
    return sorted(name for name in ours if not name.startswith(("_", "blended")))
"""
HELP = """
from blended_core.cli import main
for line in (["--help"], ["--version"], ["edit", "--help"], ["demo", "--help"]):
    try:
        main(line)
    except SystemExit as stop:
        assert stop.code == 0
print(packages())
"""
EDIT = """
from blended_core.cli import main
picture, mask, out, *names = sys.argv[1:]
short = ["--steps", "2", "--views", "2", "--candidates", "1"]
assert main(["edit", picture, "--mask", mask, "--prompt", "an apple", "--out", out, *short]) == 0
print([name for name in names if name in sys.modules])
"""


def imported(program: str, *arguments: str) -> list[str]:
    """What a program prints last in a new interpreter: the installed packages that it has imported."""
    run = [sys.executable, "-c", PACKAGES + program, *arguments]
    out = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: list[str] = ast.literal_eval(out.stdout.splitlines()[-1])
    return found


def test_help_and_version_import_no_package() -> None:
    assert imported(HELP) == []


def test_the_nodes_import_only_what_comfyui_has_and_what_files_need() -> None:
    """No CLIP, no LPIPS, no augmentations before a node runs."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "nodes").glob("*.py")]
    inner = sorted(
        {str(n.module) for t in trees for n in t.body if isinstance(n, ast.ImportFrom) and str(n.module).startswith("blended_core")}
    )
    assert len(inner) > 15
    code = "import torch, numpy\nbefore = set(packages())\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    found = imported(code + "print(sorted(set(packages()) - before))", *inner)
    assert set(found) <= {"PIL", "filelock", "platformdirs", "safetensors"}, found
    outer = {a.name for t in trees for n in t.body if isinstance(n, ast.Import) for a in n.names}
    outer |= {str(n.module) for t in trees for n in t.body if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert {name.partition(".")[0] for name in outer} - set(sys.stdlib_module_names) <= {
        "PIL", "comfy", "comfy_api", "comfy_execution", "folder_paths", "torch",
    }  # fmt: skip


def test_an_embedded_edit_imports_no_package_for_other_models(tmp_path: Path) -> None:
    heavy = ("open_clip", "torchvision", "lpips", "timm", "transformers", "huggingface_hub", "sympy", "torch._dynamo")
    files = [str(tmp_path / name) for name in ("source.png", "mask.png", "out")]
    for file, pixels in zip(files, demo_scene(), strict=False):
        Image.fromarray(pixels).save(file)
    assert imported(EDIT, *files, *heavy) == []
    assert (tmp_path / "out" / "report.json").is_file()


def test_the_page_of_options_is_current() -> None:
    assert script("make_options").page() == (ROOT / "docs" / "options.md").read_text("utf-8"), "run: python docs/make_options.py"


def test_public_names_all_resolve() -> None:
    import blended_core
    import blended_core.api

    assert all(getattr(blended_core, name) is not None for name in blended_core.__all__)
    assert set(dir(blended_core)) == set(blended_core.__all__)
    assert {name for name, value in vars(blended_core.api).items() if not name.startswith("_") and name != "annotations"} == set(
        blended_core.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blended_core.nothing


@pytest.mark.slow
def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(block.strip().splitlines()) <= 11
    source, mask = demo_scene()
    Image.fromarray(source).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    quick = block.replace("candidates=4", 'candidates=1, steps="4", views=2').replace(
        "import DeviceContext", "import to_uint8, DeviceContext"
    )
    assert quick != block
    script = tmp_path / "example.py"
    script.write_text(quick + "\nimport numpy\nnumpy.save('best.npy', to_uint8(best))\n", "utf-8")
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    best = np.load(tmp_path / "best.npy")
    outside = mask[..., 0] < 128
    assert (best[outside] == source[outside]).all()
    assert (best[~outside] != source[~outside]).any()


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_publishing_adds_the_addresses_that_the_registry_wants() -> None:
    module = script("publish")
    published = tomllib.loads(module.with_addresses((ROOT / "pyproject.toml").read_text("utf-8"), "someone/fork", "abc123"))
    home = "https://github.com/someone/fork"
    urls = published["project"]["urls"]
    assert (urls["Repository"], urls["Bug Tracker"]) == (home, f"{home}/issues")
    assert (ROOT / urls["Documentation"].removeprefix(f"{home}/tree/abc123/")).is_dir()
    for key in ("Icon", "Banner"):
        assert (ROOT / published["tool"]["comfy"][key].removeprefix(f"{home}/raw/abc123/")).is_file()
    with pytest.raises(SystemExit, match="must be one"):
        module.with_addresses("[project]\n", "someone/fork", "abc123")


def test_publishing_passes_on_the_changes_of_the_version() -> None:
    module = script("publish")
    changelog = "# Changelog\n\n## [Unreleased]\n\n- later\n\n## [1.2.0] – 2026-01-02\n\n### Added\n\n- a node\n\n## [1.1.0]\n\n- old\n"
    assert module.changes_of(changelog, "1.2.0") == "### Added\n\n- a node"
    assert module.changes_of(changelog, "1.1.0") == "- old"
    for version in ("1.2", "1x2.0", "2.0.0"):
        with pytest.raises(SystemExit, match=f"no entries for version {version}"):
            module.changes_of(changelog, version)
    version = module.version_of((ROOT / "pyproject.toml").read_text("utf-8"))
    assert module.changes_of((ROOT / "CHANGELOG.md").read_text("utf-8"), version)
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text("utf-8")
    (written,) = re.findall(r'python docs/publish\.py "\S+" "\S+" "(\S+)"', workflow)
    assert f'node publish --token "$TOKEN" --changelog-file "{written}"' in workflow


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_the_classifiers_are_those_that_the_registry_reads() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["classifiers"]
    assert [c for c in classifiers if c.startswith("Operating System ::")] == ["Operating System :: OS Independent"]
    # The registry takes every classifier of an environment for a list of accelerators, which cannot name the CPU.
    assert [c for c in classifiers if c.startswith("Environment ::")] == []


def test_icon_and_banner_have_the_registry_s_sizes() -> None:
    with Image.open(ROOT / "docs" / "images" / "icon.png") as icon:
        assert icon.width == icon.height <= 400
    with Image.open(ROOT / "docs" / "images" / "banner.jpg") as banner:
        assert banner.width * 9 == banner.height * 21
