"""The engine against recorded numbers of the reference implementation, and whether the replay can tell when they differ."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import replay

GOLDEN = Path(__file__).with_name("golden")
UNET = "unet/u1_updown_ssn_learnsigma_headch16_legacy"


def manifest() -> dict[str, Any]:
    return dict(json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8")))


def copied(target: Path, *names: str) -> Path:
    """A folder with some cases only."""
    content = manifest()
    content["cases"] = {name: content["cases"][name] for name in names}
    for case in content["cases"].values():
        (target / case["file"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(GOLDEN / case["file"], target / case["file"])
    (target / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.fixture(scope="module")
def report() -> replay.Report:
    return replay.replay(GOLDEN)


@pytest.mark.parametrize("group", replay.REPLAYS)
def test_a_group_stays_within_its_tolerances(report: replay.Report, group: str) -> None:
    rows = {quantity: row for (g, quantity), row in report.rows.items() if g == group}
    assert rows, f"no case of {group} was compared"
    above = {quantity: (row.worst, str(row.tolerance), row.where) for quantity, row in rows.items() if row.failed}
    assert not above
    assert not [f for f in report.failures if f.startswith(f"{group}/")]


def test_every_recorded_tensor_is_looked_at(report: replay.Report) -> None:
    assert report.cases == len(manifest()["cases"])
    assert not report.notes


def test_the_table_names_groups_quantities_and_the_worst_case(report: replay.Report) -> None:
    lines = list(report.lines())
    assert lines[0].split() == ["group", "quantity", "cases", "worst", "error", "tolerance", "worst", "case"]
    gradient = next(line for line in lines if line.split()[:1] == ["gradient"] and "32_" in line)
    assert "0.001 × max" in gradient
    assert "0 quantities above tolerance" in lines[-1]


# One number of one tensor: (case, what it needs besides, tensor, change relative to the tensor's largest magnitude).
ONE_NUMBER = [
    ("schedule/respaced_linear_ddim25", (), "posterior_mean_coef1", 1e-10),
    ("schedule/respaced_cosine_50-25-10", (), "timestep_map", 0.01),
    (UNET, (), "out", 1e-3),
    ("diffusion_step/learned_range_50-25-10_cosine", (UNET,), "ddim_reverse.sample", 0.01),
    ("losses/range", (), "grad_x", 0.01),
    ("losses/d_clip", (), "d_cosine", 1e-3),
    ("clip/tiny_A", (), "text_embed", 1e-3),
    ("augment/b1_20x28_to_24_n6", (), "out", 0.01),
    ("preprocess/prep_50x40_to_32", (), "mask", 1.0),
    ("guided_step/quirk_unscale_50-25-10", (UNET, "clip/tiny_A"), "grad", 0.01),
    ("loop/32_local_ddim", (UNET, "clip/tiny_A"), "x_after", 0.01),
    ("loop/32_local_ddim", (UNET, "clip/tiny_A"), "final_distance", 0.01),
]


@pytest.mark.parametrize(("name", "needs", "tensor", "share"), ONE_NUMBER, ids=[f"{c[0]}:{c[2]}" for c in ONE_NUMBER])
def test_one_changed_number_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, needs: tuple[str, ...], tensor: str, share: float
) -> None:
    folder = copied(tmp_path, name, *needs)
    file = folder / manifest()["cases"][name]["file"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[tensor].reshape(-1).clone()
        flat[len(flat) // 2] += share * float(flat.abs().max()) if flat.is_floating_point() else 1
        tensors[tensor] = flat.view_as(tensors[tensor])

    rewrite(file, change)
    assert replay.main([str(folder)]) == 1
    above = [line for line in capsys.readouterr().out.splitlines() if "ABOVE TOLERANCE" in line]
    assert above
    assert all(name.split("/")[1] in line for line in above)


def test_another_shape_among_the_published_names_is_found(tmp_path: Path) -> None:
    folder = copied(tmp_path, "unet_keys/adm_64_imagenet_cond")
    assert replay.main([str(folder)]) == 0
    file = folder / "unet_keys" / "adm_64_imagenet_cond.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["state_dict_shapes"]["label_emb.weight"] = [1001, 768]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert replay.main([str(folder)]) == 1


def test_nan_where_a_number_was_recorded_is_found(tmp_path: Path) -> None:
    folder = copied(tmp_path, "losses/range")
    rewrite(folder / "losses" / "range.safetensors", lambda t: t["x"].view(-1)[:1].fill_(torch.nan))
    assert replay.main([str(folder)]) == 1


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "losses" / "range.safetensors").unlink(), "its file range.safetensors is missing"),
        (lambda folder: (folder / "losses" / "range.safetensors").write_bytes(b"nothing"), "cannot be read"),
        (
            lambda folder: rewrite(folder / "losses" / "range.safetensors", lambda t: t.pop("range_loss")),
            "tensor 'range_loss' of the manifest is missing",
        ),
        (
            lambda folder: rewrite(folder / "losses" / "range.safetensors", lambda t: t.update(grad_x=t["grad_x"][:1].clone())),
            "and the manifest says",
        ),
    ],
    ids=["no file", "no safetensors", "no tensor", "another shape"],
)
def test_what_is_missing_is_a_failure_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], sentence: str
) -> None:
    folder = copied(tmp_path, "losses/range")
    spoil(folder)
    assert replay.main([str(folder)]) == 1
    failure = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: losses/range: "))
    assert sentence in failure


def test_a_case_without_its_network_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(tmp_path, "loop/32_local_ddim", "clip/tiny_A")
    assert replay.main([str(folder)]) == 1
    assert f"it needs {UNET}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "not a folder with a manifest.json"),
        ("{", "not valid JSON"),
        ("{}", "format_version"),
        ('{"format_version": 1, "cases": {}}', "lists no cases"),
        ('{"format_version": 1, "cases": {"a/b": {"group": "a"}}}', "lacks its group, file, config or tensors"),
        ('{"format_version": 1, "cases": {"a/b": {"group": "a", "file": "b", "config": {}, "tensors": {}}}}', "of the group a;"),
    ],
)
def test_another_format_is_refused_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    assert replay.main([str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif("BLENDED_GOLDEN" not in os.environ, reason="BLENDED_GOLDEN names no whole recording")
def test_a_whole_recording() -> None:
    assert replay.main([os.environ["BLENDED_GOLDEN"]]) == 0
