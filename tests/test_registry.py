"""The archive that the ComfyUI registry publishes: small, complete, and with nothing in it that a scan flags without need."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pathspec
import pytest

from .server import COMFYUI, environment, interpreter, needs_comfyui

ROOT = Path(__file__).parent.parent
LARGEST = 15_000_000
TEXTS = {"", ".css", ".html", ".js", ".json", ".md", ".py", ".svg", ".toml", ".txt", ".typed", ".yaml", ".yml"}
FLAGGED = {
    "reads or changes the environment": r"\bos\.(environ|getenv|putenv|unsetenv)\b|\bimport environ\b",
    "imports by name": r"\bimport_module\b|__import__|\bimportlib\.(util|machinery)\b|\brunpy\b",
    "runs text as code": r"\b(eval|exec|execfile)\s*\(|(?<![\w.])compile\s*\(|\bnew Function\b",
    "starts a process": r"\bsubprocess\b|\bos\.(system|popen|exec\w*|spawn\w*|startfile)\b|\bpty\.",
    "calls native code": r"\bctypes\b|\bcffi\b|\bdlopen\b",
    "opens a connection": r"\burlopen\b|\burllib\.request\b|\burlretrieve\b|\bhttp\.client\b|\b(import|from) (requests|httpx|aiohttp|socket|ftplib)\b"
    r"|\brequests\.(get|post|put|head|delete)\b|\.(connect|bind|sendall|sendto|recv)\s*\(",
    "hides text": r"\bb(16|32|64|85)(en|de)code\b|\bmarshal\b|\bunhexlify\b|\bfromhex\b|(?:[A-Za-z0-9+/]{4}){30,}={0,2}|(?:\\x[0-9a-fA-F]{2}){20,}",
    "names a host that is often abused": r"://(raw\.githubusercontent|pastebin|transfer)\.",
    "unpickles": r"\b(import|from) (_|c)?[Pp]ickle\w*|\b[Pp]ickle\.(loads?|Unpickler)\b|\bdill\b|\bjoblib\b|weights_only\s*=\s*False|allow_pickle\s*=\s*True",
}
"""What a scan of a text matches, comments and strings included → a pattern. ``network.eval()`` counts, although it runs no text."""
EXPLAINED = {"unpickles"}
"""What SECURITY.md explains, with the name of the file or of its folder."""


@pytest.fixture(scope="module")
def packed() -> list[str]:
    """The files of the archive as ``comfy node pack`` chooses them: those that git tracks, without the patterns of .comfyignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the archive holds files that git tracks, and this is no clone with git")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line.strip() for line in (ROOT / ".comfyignore").read_text("utf-8").splitlines()]
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", [line for line in lines if line and not line.startswith("#")])
    return [name for name in tracked if not ignored.match_file(name) and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def unpacked(packed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive in a folder of its own, as an installer leaves it."""
    folder = tmp_path_factory.mktemp("archive") / "blended-diffusion"
    for name in packed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def findings(name: str, text: str) -> list[str]:
    """What a scan says of a file, as 'kind: file:line: text'."""
    out = []
    for kind, pattern in FLAGGED.items():
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line):
                out.append(f"{kind}: {name}:{number}: {line.strip()[:100]}")
    return out


def module(parts: list[str]) -> Path | None:
    """The file of a module by its path below the root."""
    for name in ("/".join([*parts, "__init__.py"]), "/".join(parts) + ".py"):
        if (ROOT / name).is_file():
            return Path(name)
    return None


def imported(file: Path) -> Iterator[Path]:
    """The files that a module of the pack imports, at its head or inside a function."""
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(file.parent.parts)[: len(file.parent.parts) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
            names = [base[:n] for n in range(len(base) + 1)] + [[*base, alias.name] for alias in node.names]
            yield from (found for found in map(module, names) if found is not None)


def test_the_archive_is_small(packed: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in packed:
            archive.write(ROOT / name, name)
    assert (tmp_path / "node.zip").stat().st_size < LARGEST


def test_the_code_in_the_archive_is_what_the_nodes_import(packed: list[str]) -> None:
    todo, needed = [Path("__init__.py")], set()
    while todo:
        file = todo.pop()
        if file.as_posix() not in needed:
            needed.add(file.as_posix())
            todo.extend(imported(file))
    code = {name for name in packed if name.endswith(".py")}
    assert sorted(needed - code) == [], "imported, and left out by .comfyignore"
    assert sorted(code - needed) == [], "not imported by any node; add it to .comfyignore"


def test_the_archive_holds_the_texts_and_weights_and_nothing_for_developers(packed: list[str]) -> None:
    kept = {"README.md", "LICENSE", "SECURITY.md", "pyproject.toml", "requirements.txt"}
    assert kept <= set(packed)
    folders = {"blended_core", "locales", "nodes", "subgraphs", "web", "workflows"}
    assert {name.split("/")[0] for name in packed} - kept - {"node_list.json"} == folders | {"__init__.py"}
    for folder in folders - {"blended_core", "nodes"}:
        there = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        assert there <= set(packed)
    data = {name for name in packed if name.startswith("blended_core/") and not name.endswith((".py", "/py.typed"))}
    wanted = ("MODEL_CARDS.md", "LICENSE-sprites.txt", "clip.safetensors", "ddpm.safetensors", "lpips.safetensors", "sprites.png")
    assert data == {f"blended_core/toy/data/{name}" for name in wanted}, "what no node reads belongs into .comfyignore"


@pytest.mark.parametrize(
    "line",
    [
        'os.environ["A"]',
        "from os import environ",
        "importlib.import_module(name)",
        "network.eval()",
        'exec("x")',
        "import subprocess",
        "import ctypes",
        "urllib.request.urlopen(address)",
        "x = '" + "QUJD" * 30 + "'",
        "import pickletools",
        "x = pickle.loads(data)",
        "Icon = 'https://raw.githubusercontent.com/a/b/c.png'",
    ],
)
def test_the_search_finds_what_a_scan_flags(line: str) -> None:
    assert len(findings("file.py", f"# first\n{line}\n")) == 1
    assert findings("file.py", "pattern = re.compile('a')\nevaluate(x)\nmodel.train(False)\nfrom importlib.metadata import version\n") == []


def test_the_archive_holds_nothing_that_a_scan_flags(packed: list[str]) -> None:
    security = (ROOT / "SECURITY.md").read_text("utf-8")
    found = []
    for name in packed:
        if Path(name).suffix in TEXTS:
            for finding in findings(name, (ROOT / name).read_text("utf-8")):
                explained = f"`{name}`" in security or f"`{name.rpartition('/')[0]}/`" in security
                if finding.split(":")[0] not in EXPLAINED or not explained:
                    found.append(finding)
    assert not found, "\n".join(found)


LIBRARY = """
import importlib, importlib.util, sys, warnings
from pathlib import Path
folder = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("unpacked", folder / "__init__.py", submodule_search_locations=[str(folder)])
pack = sys.modules["unpacked"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
for file in sorted((folder / "blended_core").rglob("*.py")):
    importlib.import_module(".".join(("unpacked", *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"))
core = sys.modules["unpacked.blended_core"]
world = sys.modules["unpacked.blended_core.toy.world"]
assert "blended_core" not in sys.modules, "the library was imported from outside of the archive"
import torch
source, mask = (torch.from_numpy(p.copy()) for p in world.demo_scene("meadow", 0))
context = core.DeviceContext.choose("cpu")
models = core.Models(core.load_ddpm(context), core.load_clip(context), core.load_perceptual(context, "embedded"), context)
options = core.preset("best", steps="4", views=2, candidates=1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    result = core.edit_picture(source.permute(2, 0, 1)[None] / 255, mask[None, None, ..., 0] / 255, "an apple", models, options)
picture = result.picture(result.candidates[0])
outside = mask[None, None, ..., 0].expand_as(picture) < 128
assert (picture == source.permute(2, 0, 1)[None] / 255)[outside].all() and (picture != source.permute(2, 0, 1)[None] / 255)[~outside].any()
print("edited")
"""


def test_the_library_of_the_archive_edits_a_picture_by_itself(unpacked: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(unpacked)], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "edited"


@needs_comfyui
@pytest.mark.slow
def test_all_nodes_of_the_archive_are_defined_in_comfyui(unpacked: Path) -> None:
    checker = unpacked / "tests" / "contract.py"
    checker.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests" / "contract.py", checker)
    done = subprocess.run([interpreter(), str(checker)], cwd=COMFYUI, env=environment(), capture_output=True, text=True, timeout=300)
    shutil.rmtree(checker.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert sorted(told["nodes"]) == sorted(json.loads((ROOT / "schema.lock.json").read_text("utf-8")))
    assert told["differences"] == []


@pytest.mark.skipif(shutil.which("comfy") is None, reason="comfy-cli is not installed, so the registry's own tool has not checked the pack")
def test_the_registry_s_tool_accepts_and_packs_the_pack(packed: list[str], tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    for command in (["init", "-q"], ["add", "-A", "-f"]):
        subprocess.run(["git", *command], cwd=clone, check=True)

    def comfy(what: str) -> str:
        command = ["comfy", "--skip-prompt", "--no-enable-telemetry", "node", what]
        home = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "COLUMNS": "200"}
        done = subprocess.run(command, cwd=clone, env=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = comfy("validate")
    assert "All validation checks passed" in said and "arning" not in said, said
    comfy("pack")
    with zipfile.ZipFile(clone / "node.zip") as archive:
        assert sorted(archive.namelist()) == sorted(packed)
    assert (clone / "node.zip").stat().st_size < LARGEST
