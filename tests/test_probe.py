"""The calibration probe, what is kept of it, and the commands that show and use it."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blended_core.adm import probe as calibrate
from blended_core.adm.describe import as_table, summary
from blended_core.adm.detect import KNOWN_FILES, detect, settings_of_file
from blended_core.adm.load import inspect_checkpoint, load_ddpm, may_be_checkpoint
from blended_core.adm.probe import Probe, ProbeOptions
from blended_core.adm.unet import UNet, UNetConfig
from blended_core.cli import main
from blended_core.device import DeviceContext
from blended_core.diffusion import DiffusionConfig
from blended_core.errors import BlendedError, BlendedWarning
from blended_core.io.atomic import sha256
from blended_core.toy.models import DDPM as EMBEDDED

from . import kinds
from .tiny import tiny_unet

CPU = DeviceContext()
OPEN = ("num_heads", "num_head_channels", "use_new_attention_order", "schedule", "steps", "rescale_timesteps", "objective")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The embedded network without a word about what it is."""
    path = tmp_path / "bare.safetensors"
    save_file(load_file(EMBEDDED), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A random network, tried out in a moment."""
    path = tmp_path / "small.safetensors"
    save_file(tiny_unet(model_channels=64).state_dict(), path)
    return path


def test_the_embedded_network_is_found_out(bare: Path) -> None:
    truth = inspect_checkpoint("embedded")
    with pytest.warns(BlendedWarning, match=r"bare\.safetensors does not tell its .*objective.*finding out by trying"):
        found = load_ddpm(CPU, bare).found
    assert found is not None and found.probe is not None
    assert found.diffusion == truth.diffusion
    assert kinds.same_wiring(found.unet, truth.unet)
    assert {found.sources[name] for name in OPEN} == {"probe"}
    assert found.probe.margins["objective"] > 3 and found.probe.margins["schedule"] > 1.1 and found.probe.margins["heads"] > 1
    assert 4 < found.probe.forwards < 30
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = load_ddpm(CPU, bare).found
    assert again is not None and again.probe is not None and again.probe.forwards == 0
    assert (again.unet, again.diffusion) == (found.unet, found.diffusion)
    assert not any("finding out" in str(w.message) for w in told)


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_what_is_stated_is_not_tried(bare: Path) -> None:
    stated = load_ddpm(CPU, bare, {"schedule": "cosine", "objective": "v", "num_heads": 2}).found
    assert stated is not None
    assert (stated.diffusion.schedule, stated.diffusion.objective, stated.unet.num_heads) == ("cosine", "v", 2)
    assert {stated.sources[name] for name in ("schedule", "objective", "num_heads")} == {"override"}
    whole = load_ddpm(CPU, bare, dict.fromkeys(OPEN, None) | {"schedule": "linear", "steps": 1000, "rescale_timesteps": True, "objective": "x0",
        "num_head_channels": 32, "num_heads": 1, "use_new_attention_order": False, "image_size": 64}).found  # fmt: skip
    assert whole is not None and whole.probe is None and whole.guessed == ()


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_a_picture_of_the_person_is_taken_and_a_kept_decision_is_not(small: Path) -> None:
    picture = torch.rand(1, 3, 50, 90, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = load_ddpm(CPU, small).found
    second = load_ddpm(CPU, small, trial=ProbeOptions(picture)).found
    assert first is not None and second is not None and first.probe is not None and second.probe is not None
    assert second.probe.forwards > 0 and second.probe.error != first.probe.error
    with pytest.raises(BlendedError, match=r"picture of the probe is \(1, 4, 8, 8\)"):
        load_ddpm(CPU, small, trial=ProbeOptions(torch.zeros(1, 4, 8, 8)))


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_a_trial_runs_where_it_is_told_to_and_can_be_stopped(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLENDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    tried: list[tuple[int, int]] = []
    placed: list[DeviceContext] = []

    def place() -> DeviceContext:
        placed.append(DeviceContext(channels_last=True))
        return placed[0]

    def on_forward(done: int, expected: int) -> None:
        tried.append((done, expected))
        if len(tried) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_ddpm(CPU, small, trial=ProbeOptions(place=place, on_forward=on_forward))
    assert [done for done, _ in tried] == [1, 2, 3] and all(expected >= 10 for _, expected in tried)
    assert not calibrate.kept_decisions().exists()
    model = load_ddpm(CPU, small, trial=ProbeOptions(place=place))
    assert len(placed) == 2 and model.detection.probe is not None and model.detection.probe.forwards > 3
    load_ddpm(CPU, small, trial=ProbeOptions(place=place))
    assert len(placed) == 2, "a remembered decision moves nothing"


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}'])
def test_a_damaged_cache_costs_only_time(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("BLENDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    calibrate.kept_decisions().write_text(content)
    found = load_ddpm(CPU, small).found
    assert found is not None and found.probe is not None and found.probe.forwards > 0
    kept = json.loads(calibrate.kept_decisions().read_text())
    assert any(key.startswith(sha256(small)) for key in kept)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["probes.json"]


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_a_cache_that_cannot_be_written_is_no_error(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLENDED_DIFFUSION_CACHE", str(tmp_path / "file" / "cache"))
    assert load_ddpm(CPU, small).found is not None


def test_random_weights_are_said_to_know_nothing(small: Path) -> None:
    with pytest.warns(
        BlendedWarning, match=r"small\.safetensors: under none of the settings does the network know noise .*inspect --picture"
    ):
        found = load_ddpm(CPU, small).detection
    assert found.probe is not None and found.probe.clueless and found.probe.unsure
    assert found.probe.error > found.probe.blind
    assert ": hardly" in as_table(found, small)


def decided(margin: float, agreement: float, error: float = 0.05) -> Probe:
    return Probe({"num_heads": 2}, {"heads": margin}, {"heads": agreement}, {"heads": "4 heads, old qkv order"}, error, 0.25, 9, 1.0)


def test_what_is_unsure() -> None:
    assert decided(1.05, 0.7).unsure == {"heads": "4 heads, old qkv order"}
    assert decided(1.05, 0.9).unsure == decided(1.2, 0.6).unsure == {}
    assert decided(1.05, 0.7, 0.2).clueless and not decided(1.05, 0.7, 0.15).clueless


def test_a_small_margin_is_worth_a_warning(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blended_core.adm.load.probe", lambda *_: decided(1.05, 0.7))
    with pytest.warns(BlendedWarning, match=r"hardly decided heads \(1\.05 times better than 4 heads, old qkv order\)"):
        load_ddpm(CPU, small, trial=ProbeOptions(torch.zeros(1, 3, 8, 8)))


def test_every_wiring_is_tried_once() -> None:
    config = UNetConfig(image_size=16, model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_downsampling=(2,))
    found = calibrate._wirings(config, OPEN)
    counts = [(w.heads(128), w.use_new_attention_order and w.heads(128) > 1) for w in found]
    assert len(set(counts)) == len(counts)
    assert set(counts) == {(1, False), *((n, order) for n in (2, 4, 8) for order in (False, True))}
    assert calibrate._wirings(config, ()) == [config]
    assert len(calibrate._processes(DiffusionConfig(), OPEN)) == 4
    assert [p.schedule for p in calibrate._processes(DiffusionConfig(), ("schedule",))] == ["linear", "cosine"]


def test_rewiring_changes_the_answer_and_back() -> None:
    unet = tiny_unet(model_channels=64, num_head_channels=None, num_heads=4)
    x, t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    before = unet(x, t)
    config = unet.config
    for other in (replace(config, num_heads=2), replace(config, use_new_attention_order=True)):
        fresh = UNet(other)
        fresh.load_state_dict(unet.state_dict())
        assert torch.equal(unet.rewire(other)(x, t), fresh(x, t))
        assert not torch.equal(fresh(x, t), before)
    assert torch.equal(unet.rewire(config)(x, t), before)
    with pytest.raises(BlendedError, match="7 attention heads do not divide"):
        unet.rewire(replace(config, num_heads=7))
    assert torch.equal(unet(x, t), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
@pytest.mark.parametrize("kind", ["cosine"])
def test_a_network_trained_for_seconds_is_found_out(kind: str, tmp_path: Path) -> None:
    config, process = kinds.KINDS[kind]
    path = tmp_path / "trained.safetensors"
    save_file(kinds.train(config, process, 250).state_dict(), path)
    found = load_ddpm(CPU, path, {"image_size": kinds.SIDE}).found
    assert found is not None
    assert kinds.same_wiring(found.unet, config)
    assert kinds.same_curve(found.diffusion, process)
    assert found.diffusion.objective == process.objective


def test_a_published_file_is_known_by_its_hash() -> None:
    (digest, (family, settings)), *_ = KNOWN_FILES.items()
    config = UNetConfig(
        512, 256, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), resblock_updown=True, use_scale_shift_norm=True, num_head_channels=64
    )
    with torch.device("meta"):
        found = detect({k: tuple(v.shape) for k, v in UNet(config).state_dict().items()})
    assert found.family == family and found.guessed == ("objective",)
    assert settings_of_file(found, digest + "0" * 56) == settings == {"objective": "eps"}
    assert settings_of_file(found, "0" * 64) == {}
    assert found.decided(settings, "file").guessed == ()


# --- the commands -----------------------------------------------------------------------------------------------------


def test_inspect_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "embedded"]) == 0
    out = capsys.readouterr().out
    for words in ("setting", "decided by", "how sure", "objective", "x0", "the file's metadata", "the shapes of the weights", "certain"):
        assert words in out, words
    assert max(map(len, out.splitlines())) < 120


def test_inspect_as_json(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bare), "--json", "--set", "num_heads=4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["objective"] == {"value": "x0", "decided_by": "probe", "sure": told["settings"]["objective"]["sure"]}
    assert "times better than" in told["settings"]["objective"]["sure"]
    assert told["settings"]["num_heads"]["decided_by"] == "override"
    assert told["probe"]["margins"]["objective"] > 3 and told["guessed"] == ["image_size"]
    assert main(["inspect", str(bare), "--no-probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["objective"] == {"value": "eps", "decided_by": "default", "sure": "not sure"}


def test_inspect_takes_a_picture(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "mine.png")
    assert main(["inspect", str(small), "--picture", str(tmp_path / "mine.png")]) == 0
    assert "passes of the network" in capsys.readouterr().out
    assert main(["inspect", str(small), "--picture", str(tmp_path / "absent.png")]) == 2


def test_tables_of_every_kind_of_source(bare: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_ddpm(CPU, bare).found
    assert found is not None
    table = as_table(found, bare)
    assert "trying" in table and "times better than" in table and "guessed: image_size" in table
    assert "found by trying" in summary(found) and len(summary(found).splitlines()) <= 5


@pytest.mark.parametrize("half", [False, True])
def test_convert_writes_what_edits_as_the_original(bare: Path, tmp_path: Path, half: bool) -> None:
    sidecar = bare.with_suffix(".json")
    with safe_open(str(EMBEDDED), "pt") as file:
        texts: dict[str, Any] = file.metadata()
    sidecar.write_text(json.dumps({"unet": json.loads(texts["unet"]), "diffusion": json.loads(texts["diffusion"])}))
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(bare), str(out), *(["--half"] if half else [])]) == 0
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it as they may any new file"
    sidecar.unlink()
    bare.unlink()
    before, after = load_ddpm(CPU), load_ddpm(CPU, out)
    assert after.found is not None and after.found.guessed == () and after.config == before.config
    for name, value in before.network.state_dict().items():
        assert torch.equal(after.network.state_dict()[name], value), name  # the embedded weights are halves already
    assert (out.stat().st_size < 1.1 * EMBEDDED.stat().st_size) == half
    edits = []
    for number, ddpm in enumerate(("embedded", str(out))):
        folder = tmp_path / str(number)
        scene = tmp_path / "scene.png"
        Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(scene)
        mask = tmp_path / "mask.png"
        Image.fromarray(np.pad(np.full((30, 30), 255, np.uint8), 17)).save(mask)
        command = ["edit", str(scene), "--mask", str(mask), "--prompt", "a rose", "--ddpm", ddpm, "--out", str(folder)]
        assert main([*command, "--steps", "4", "--candidates", "1", "--views", "2", "--dtype", "fp32"]) == 0
        (result,) = (folder / "candidates").glob("*.png")
        edits.append(np.array(Image.open(result)))
    assert np.array_equal(*edits)


def test_convert_refuses_and_leaves_nothing(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    assert main(["convert", "embedded", str(there)]) == 2
    assert there.read_bytes() == b"mine" and "--overwrite" in capsys.readouterr().err
    assert main(["convert", "embedded", str(tmp_path / "x.pt")]) == 2 and ".safetensors" in capsys.readouterr().err
    assert main(["convert", "embedded", str(tmp_path / "no" / "x.safetensors")]) == 2 and "no folder" in capsys.readouterr().err
    large = load_file(EMBEDDED)
    large["out.2.bias"] = torch.full_like(large["out.2.bias"], 1e9, dtype=torch.float32)
    save_file(large, bare)
    assert main(["convert", str(bare), str(tmp_path / "x.safetensors"), "--half", "--no-probe"]) == 2
    assert "out.2.bias has values up to 1e+09" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.safetensors", "there.safetensors"]
    assert main(["convert", "embedded", str(there), "--overwrite"]) == 0 and load_ddpm(CPU, there).found is not None


def test_a_quick_look_tells_what_cannot_be_a_checkpoint(tmp_path: Path) -> None:
    network = {k: torch.zeros(v.shape) for k, v in tiny_unet().state_dict().items()}
    classifier = {k: v for k, v in network.items() if not k.startswith("output_blocks")}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    for name, content, may in (("net", network, True), ("classifier", classifier, False), ("opt", optimizer, False)):
        for zipped in (True, False):
            path = tmp_path / f"{name}{zipped}.pt"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert may_be_checkpoint(path) is may, path
    save_file(network, tmp_path / "net.safetensors")
    save_file(classifier, tmp_path / "classifier.safetensors")
    assert may_be_checkpoint(tmp_path / "net.safetensors") and not may_be_checkpoint(tmp_path / "classifier.safetensors")
    shutil.copy(EMBEDDED, tmp_path / "embedded.safetensors")
    assert may_be_checkpoint(tmp_path / "embedded.safetensors")
    assert may_be_checkpoint(tmp_path / "absent.pt")  # what cannot be read is told later, with a sentence
