"""The calibration probe, its cache, and the commands that show and use its decisions."""

from __future__ import annotations

import json
import random
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

from blended_core.adm import cache, load
from blended_core.adm.cache import cache_file
from blended_core.adm.describe import as_dict, as_table, summary
from blended_core.adm.detect import Detection, detect
from blended_core.adm.families import KNOWN_FILES
from blended_core.adm.load import inspect_checkpoint, load_checkpoint, load_ddpm, may_be_checkpoint
from blended_core.adm.probe import ProbeOptions, ProbeResult, head_candidates, process_candidates
from blended_core.adm.unet import UNet, UNetConfig
from blended_core.cli import main
from blended_core.device import DeviceContext
from blended_core.diffusion import DiffusionConfig
from blended_core.errors import BlendedError, BlendedWarning
from blended_core.io.atomic import sha256
from blended_core.toy.models import DDPM as EMBEDDED
from blended_core.weights.open import json_object, read_sidecar

from . import kinds
from .fuzz import mutated
from .tiny import tiny_unet

CPU = DeviceContext()
OPEN = ("num_heads", "num_head_channels", "use_new_attention_order", "schedule", "steps", "rescale_timesteps", "objective")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The embedded network without metadata."""
    path = tmp_path / "bare.safetensors"
    save_file(load_file(EMBEDDED), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A random network that is probed quickly."""
    path = tmp_path / "small.safetensors"
    save_file(tiny_unet(model_channels=64).state_dict(), path)
    return path


def detected(path: Path, overrides: dict[str, Any] | None = None, probe: ProbeOptions | None = None) -> tuple[Detection, ProbeResult]:
    """The detection of a file and the result of its probe."""
    detection = load_checkpoint(CPU, path, overrides, probe=probe or ProbeOptions()).detection
    assert detection.probe is not None
    return detection, detection.probe


def test_the_embedded_network_is_determined_without_its_metadata(bare: Path) -> None:
    truth = inspect_checkpoint("embedded")
    with pytest.warns(BlendedWarning, match=r"bare\.safetensors does not state its .*objective.*probe determines them, once"):
        found, result = detected(bare)
    assert found.diffusion == truth.diffusion
    assert kinds.same_wiring(found.unet, truth.unet)
    assert {found.sources[name] for name in OPEN} == {"probe"}
    assert result.margins["objective"] > 3 and result.margins["schedule"] > 1.1 and result.margins["heads"] > 1
    assert 4 < result.forwards < 30
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again, cached = detected(bare)
    assert cached.forwards == 0
    assert (again.unet, again.diffusion) == (found.unet, found.diffusion)
    assert not any("determines them" in str(w.message) for w in told)


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_stated_settings_are_not_probed(bare: Path) -> None:
    stated, _ = detected(bare, {"schedule": "cosine", "objective": "v", "num_heads": 2})
    assert (stated.diffusion.schedule, stated.diffusion.objective, stated.unet.num_heads) == ("cosine", "v", 2)
    assert {stated.sources[name] for name in ("schedule", "objective", "num_heads")} == {"override"}
    complete = load_checkpoint(CPU, bare, dict.fromkeys(OPEN, None) | {"schedule": "linear", "steps": 1000, "rescale_timesteps": True, "objective": "x0",
        "num_head_channels": 32, "num_heads": 1, "use_new_attention_order": False, "image_size": 64}).detection  # fmt: skip
    assert complete.probe is None and complete.guessed == ()


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_with_a_picture_of_the_user_the_cache_is_not_used(small: Path) -> None:
    picture = torch.rand(1, 3, 50, 90, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, first = detected(small)
    _, second = detected(small, probe=ProbeOptions(picture))
    assert second.forwards > 0 and second.error != first.error
    with pytest.raises(BlendedError, match=r"picture of the probe is \(1, 4, 8, 8\)") as caught:
        load_ddpm(CPU, small, probe=ProbeOptions(torch.zeros(1, 4, 8, 8)))
    assert caught.value.options == ("probe_picture",)


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_a_probe_runs_in_its_own_context_and_can_be_stopped(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    calls: list[tuple[int, int]] = []
    placed: list[DeviceContext] = []

    def context() -> DeviceContext:
        placed.append(DeviceContext(channels_last=True))
        return placed[0]

    def on_forward(done: int, expected: int) -> None:
        calls.append((done, expected))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_ddpm(CPU, small, probe=ProbeOptions(context=context, on_forward=on_forward))
    assert [done for done, _ in calls] == [1, 2, 3] and all(expected >= 10 for _, expected in calls)
    assert not cache_file().exists()
    _, result = detected(small, probe=ProbeOptions(context=context))
    assert len(placed) == 2 and result.forwards > 3
    load_ddpm(CPU, small, probe=ProbeOptions(context=context))
    assert len(placed) == 2, "a cached decision does not move the network"


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}'])
def test_a_damaged_cache_only_costs_time(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(cache, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    cache_file().write_text(content)
    assert detected(small)[1].forwards > 0
    cached = json.loads(cache_file().read_text())
    (entry,) = [value for key, value in cached.items() if key.startswith(sha256(small))]
    assert sorted(entry) == ["agreement", "blind", "error", "forwards", "margins", "rivals", "seconds", "settings"]
    assert {p.name for p in (tmp_path / "cache").iterdir()} - {"probes.lock"} == {"probes.json"}


def changed_json(text: str, rng: random.Random) -> str:
    """A JSON text with another value or name somewhere, or with other bytes."""
    if rng.random() < 0.3:
        return mutated(text.encode(), rng).decode(errors="replace")
    value = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def visit(item: Any) -> None:
        for key in list(item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()):
            places.append((item, key))
            visit(item[key])

    visit(value)
    odd = (
        None,
        True,
        -1,
        0,
        3,
        1.5,
        "x",
        "3",
        "eps",
        [],
        {},
        [1],
        {"a": 1},
        float("nan"),
        float("inf"),
        10**400,
        10**9,
        "9" * 5000,
        "\x1b[2J",
    )
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(places)
        if isinstance(holder, dict) and rng.random() < 0.2:
            holder[rng.choice(("x", "", "num_heads"))] = holder.pop(key, None)
        else:
            holder[key] = rng.choice(odd)
    return json.dumps(value)


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_a_thousand_damaged_caches_give_no_error(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    _, true = detected(small)
    whole = cache_file().read_text()
    unet = tiny_unet(model_channels=64)
    asked, digest = inspect_checkpoint(small), sha256(small)
    monkeypatch.setattr(load, "run_probe", lambda *_: true)
    monkeypatch.setattr(load, "save_cached", lambda *_: None)
    rng, cached = random.Random(0), 0
    for text in [*(changed_json(whole, rng) for _ in range(1000)), "[" * 100_000, "9" * 5000]:
        cache_file().write_text(text, encoding="utf-8")
        found = load._probed(unet, asked, digest, ProbeOptions(), small)
        unet.rewire(found.unet)
        assert (
            found.probe is not None
            and all(text.isprintable() for text in found.probe.rivals.values())
            and found.settings["schedule"][0] in ("linear", "cosine")
        )
        assert as_table(found, small) and summary(found) and json.dumps(as_dict(found, small))
        assert load._doubts(found, small) is not None
        cached += found.probe is not true
    assert cached > 50, "some changes leave a decision that is possible"


@pytest.mark.parametrize("source", ["sidecar", "metadata"])
def test_a_thousand_damaged_settings_are_used_or_refused_with_a_sentence(tmp_path: Path, source: str) -> None:
    unet, rng, told = tiny_unet(model_channels=64), random.Random(0), {"used": 0, "refused": 0}
    settings = {"unet": unet.config.to_dict(), "diffusion": DiffusionConfig().to_dict(), "guidance_scale": 300}
    whole, path = json.dumps(settings), tmp_path / "x.safetensors"
    save_file(unet.state_dict(), path)
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    sidecar = path.with_suffix(".json")
    for number in range(1001):
        text = changed_json(whole, rng) if number else whole
        try:
            if source == "sidecar":
                sidecar.write_text(text, encoding="utf-8")
                stated = read_sidecar(path)
            else:
                stated = json_object(text, "its metadata")
            found = detect(shapes, **{source: stated})
            if source == "sidecar":  # builds the network
                found = inspect_checkpoint(path)
            assert as_table(found, path) and summary(found) and json.dumps(as_dict(found, path))
            told["used"] += 1
        except BlendedError as error:
            assert number and str(error).endswith(".") and len(str(error)) < 500 and str(error).isprintable(), error
            told["refused"] += 1
    assert min(told.values()) > 20, told


def test_settings_of_thousands_of_digits_and_brackets_are_wrong_settings(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("9" * 5000, "[" * 100_000, "1e999", "²", '{"a": 1}'):
        assert main(["inspect", str(bare), "--set", f"steps={value}"]) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert "the override sets steps to" in told and "at most 100000" in told and len(told) < 500


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_a_cache_that_cannot_be_written_is_not_an_error(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "user_cache_path", lambda *_, **__: tmp_path / "file" / "cache")
    assert detected(small)[1].forwards > 0


def test_a_warning_states_that_random_weights_do_not_predict_noise(small: Path) -> None:
    with pytest.warns(BlendedWarning, match=r"small\.safetensors: the network does not predict noise .*give the probe a picture") as warned:
        found, result = detected(small)
    assert ("probe_picture",) in [getattr(w.message, "options", ()) for w in warned]
    assert result.uninformative and result.unsure
    assert result.error > result.trivial_error
    assert ": unsure" in as_table(found, small)


def decided(margin: float, agreement: float, error: float = 0.05) -> ProbeResult:
    return ProbeResult({"num_heads": 2}, {"heads": margin}, {"heads": agreement}, {"heads": "4 heads, old qkv order"}, error, 0.25, 9, 1.0)


def test_a_decision_with_small_margin_and_agreement_is_unsure() -> None:
    assert decided(1.05, 0.7).unsure == {"heads": "4 heads, old qkv order"}
    assert decided(1.05, 0.9).unsure == decided(1.2, 0.6).unsure == {}
    assert decided(1.05, 0.7, 0.2).uninformative and not decided(1.05, 0.7, 0.15).uninformative
    assert ProbeResult.from_dict(decided(1.05, 0.7).to_dict()) == decided(1.05, 0.7)


def test_an_unsure_decision_gives_a_warning(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blended_core.adm.load.run_probe", lambda *_: decided(1.05, 0.7))
    with pytest.warns(BlendedWarning, match=r"the probe is not sure about heads \(1\.05 times better than 4 heads, old qkv order\)"):
        load_ddpm(CPU, small, probe=ProbeOptions(torch.zeros(1, 3, 8, 8)))


def test_every_candidate_is_listed_once() -> None:
    config = UNetConfig(image_size=16, model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_downsampling=(2,))
    found = head_candidates(config, OPEN)
    counts = [(w.heads(128), w.use_new_attention_order and w.heads(128) > 1) for w in found]
    assert len(set(counts)) == len(counts)
    assert set(counts) == {(1, False), *((n, order) for n in (2, 4, 8) for order in (False, True))}
    assert head_candidates(config, ()) == [config]
    assert len(process_candidates(DiffusionConfig(), OPEN)) == 4
    assert [p.schedule for p in process_candidates(DiffusionConfig(), ("schedule",))] == ["linear", "cosine"]


def test_rewiring_a_network_is_the_same_as_building_another() -> None:
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
def test_a_network_trained_for_seconds_is_determined(kind: str, tmp_path: Path) -> None:
    config, process = kinds.KINDS[kind]
    path = tmp_path / "trained.safetensors"
    save_file(kinds.train(config, process, 250).state_dict(), path)
    found, _ = detected(path, {"image_size": kinds.SIDE})
    assert kinds.same_wiring(found.unet, config)
    assert kinds.same_curve(found.diffusion, process)
    assert found.diffusion.objective == process.objective


def test_a_published_file_is_identified_by_its_hash() -> None:
    (digest, (family, settings)), *_ = KNOWN_FILES.items()
    config = UNetConfig(
        512, 256, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), resblock_updown=True, use_scale_shift_norm=True, num_head_channels=64
    )
    with torch.device("meta"):
        found = detect({k: tuple(v.shape) for k, v in UNet(config).state_dict().items()})
    assert found.family == family and found.guessed == ("objective",)
    assert found.known_settings(digest + "0" * 56) == settings == {"objective": "eps"}
    assert found.known_settings("0" * 64) == {}
    assert found.decided(settings, "file").guessed == ()


# --- the commands -----------------------------------------------------------------------------------------------------


def test_inspect_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "embedded"]) == 0
    out = capsys.readouterr().out
    for words in ("setting", "decided by", "how sure", "objective", "x0", "the file's metadata", "the shapes of the weights", "certain"):
        assert words in out, words
    assert max(map(len, out.splitlines())) < 120


def test_inspect_prints_json(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bare), "--json", "--set", "num_heads=4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["objective"] == {"value": "x0", "decided_by": "probe", "sure": told["settings"]["objective"]["sure"]}
    assert "times better than" in told["settings"]["objective"]["sure"]
    assert told["settings"]["num_heads"]["decided_by"] == "override"
    assert told["probe"]["margins"]["objective"] > 3 and told["guessed"] == ["image_size"]
    assert main(["inspect", str(bare), "--no-probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["objective"] == {"value": "eps", "decided_by": "default", "sure": "not sure"}


def test_inspect_names_its_flags_in_warnings(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small)]) == 0
    notes = capsys.readouterr().err
    assert "(--picture)" in notes and "(--set)" in notes


def test_inspect_uses_a_picture(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "mine.png")
    assert main(["inspect", str(small), "--picture", str(tmp_path / "mine.png")]) == 0
    assert "forward passes" in capsys.readouterr().out
    assert main(["inspect", str(small), "--picture", str(tmp_path / "absent.png")]) == 2


def test_the_table_names_the_source_of_every_setting(bare: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = detected(bare)
    table = as_table(found, bare)
    assert "the probe" in table and "times better than" in table and "guessed: image_size" in table
    assert "decided by the probe" in summary(found) and len(summary(found).splitlines()) <= 5


@pytest.mark.parametrize("half", [False, True])
def test_a_converted_file_edits_like_the_original(bare: Path, tmp_path: Path, half: bool) -> None:
    sidecar = bare.with_suffix(".json")
    with safe_open(str(EMBEDDED), "pt") as file:
        texts: dict[str, Any] = file.metadata()
    settings = {"unet": json.loads(texts["unet"]), "diffusion": json.loads(texts["diffusion"]), "guidance_scale": texts["guidance_scale"]}
    sidecar.write_text(json.dumps(settings))
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(bare), str(out), *(["--half"] if half else [])]) == 0
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode, "it has the permissions of any new file"
    sidecar.unlink()
    bare.unlink()
    before, after = load_checkpoint(CPU), load_checkpoint(CPU, out)
    assert after.detection.guessed == () and after.model.config == before.model.config
    for name, value in before.model.network.state_dict().items():
        assert torch.equal(after.model.network.state_dict()[name], value), name  # the embedded weights are float16 already
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


def test_a_conversion_that_fails_writes_nothing(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    assert main(["convert", "embedded", str(there)]) == 2
    assert there.read_bytes() == b"mine" and "--overwrite" in capsys.readouterr().err
    assert main(["convert", "embedded", str(tmp_path / "x.pt")]) == 2 and ".safetensors" in capsys.readouterr().err
    assert (
        main(["convert", "embedded", str(tmp_path / "no" / "x.safetensors")]) == 2
        and "does not exist; create it" in capsys.readouterr().err
    )
    large = load_file(EMBEDDED)
    large["out.2.bias"] = torch.full_like(large["out.2.bias"], 1e9, dtype=torch.float32)
    save_file(large, bare)
    assert main(["convert", str(bare), str(tmp_path / "x.safetensors"), "--half", "--no-probe"]) == 2
    assert "out.2.bias has values up to 1e+09" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.safetensors", "there.safetensors"]
    assert main(["convert", "embedded", str(there), "--overwrite"]) == 0 and load_checkpoint(CPU, there).detection.guessed == ()


def test_files_that_cannot_be_a_checkpoint_are_recognized_by_their_first_bytes(tmp_path: Path) -> None:
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
    assert may_be_checkpoint(tmp_path / "absent.pt")  # the error follows when it is loaded
