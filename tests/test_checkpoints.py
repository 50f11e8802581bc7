"""Detection and loading of diffusion checkpoints: published families, file formats, files of other models, damaged files."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
import time
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blended_core.adm.convert import convert
from blended_core.adm.detect import detect, network_sets
from blended_core.adm.load import inspect_checkpoint, load_checkpoint, load_ddpm
from blended_core.adm.settings import read_settings
from blended_core.adm.unet import UNet, UNetConfig
from blended_core.cli import main
from blended_core.device import DeviceContext
from blended_core.diffusion import DiffusionConfig
from blended_core.errors import BlendedError, BlendedWarning
from blended_core.toy.models import GUIDANCE_SCALE

from .families import FAMILIES, ODD, PREFIXES, hollow_file, same, table, whole_file

DATA = Path(__file__).parent / "golden" / "unet_keys"
CPU = DeviceContext()

TINY = UNetConfig(
    image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_downsampling=(2,), num_head_channels=32,
    use_scale_shift_norm=True,
)  # fmt: skip
TINY_SETTINGS = {
    "image_size": 16,
    "num_head_channels": 32,
    "use_new_attention_order": False,
    "schedule": "linear",
    "steps": 1000,
    "objective": "v",
}


def weights(config: UNetConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, also in the last layers, so that every weight changes the output."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator) * 0.1 for k, shape in table(config).items()}


def output(network: Any, config: UNetConfig = TINY) -> Tensor:
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    labels = None if config.num_classes is None else torch.tensor([1])
    with torch.no_grad():
        result: Tensor = network(x, torch.tensor([500.0]), labels)
    return result


def expected(state: dict[str, Tensor], config: UNetConfig = TINY) -> Tensor:
    unet = UNet(config).eval().requires_grad_(False)
    unet.load_state_dict(state)
    return output(unet, config)


def test_weights_that_a_file_replaces_are_not_initialized(tmp_path: Path) -> None:
    """Initialization on the meta device would import torch's compiler, which takes seconds."""
    config = replace(TINY, num_classes=4)
    save_file(weights(config), tmp_path / "x.safetensors")
    called = set()

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.__name__)
            return func(*args, **(kwargs or {}))

    with Spy():
        assert inspect_checkpoint(tmp_path / "x.safetensors").unet.num_classes == 4
    assert "empty" in called
    assert not called & {"normal_", "uniform_"}


@pytest.fixture(autouse=True)
def _no_guesses() -> Any:
    """Turns warnings into errors, except where a test expects them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlendedWarning)
        yield


# --- detection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_family_is_detected_under_every_prefix(name: str) -> None:
    config, diffusion = FAMILIES[name]
    shapes = table(config)
    for prefix in PREFIXES:
        found = detect({prefix + k: v for k, v in shapes.items()})
        assert found.prefix == prefix
        assert found.unet == config
        assert found.diffusion == diffusion
        assert found.family is not None
    assert found.sources["num_heads"] == found.sources["schedule"] == found.sources["image_size"] == "signature"
    assert found.sources["model_channels"] == found.sources["variance"] == "shapes"
    # One of the 512 px fine-tunes predicts v, so ε is only a guess.
    assert found.guessed == (("objective",) if name == "512 uncond fine-tune" else ())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_full_size_is_detected_from_its_names_and_shapes(name: str, tmp_path: Path) -> None:
    prefix = PREFIXES[list(FAMILIES).index(name) % len(PREFIXES)]
    hollow_file(tmp_path / "x.safetensors", table(FAMILIES[name][0], prefix))
    found = inspect_checkpoint(tmp_path / "x.safetensors")
    assert found.prefix == prefix and same(found, FAMILIES[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_network_of_full_size_is_loaded_value_for_value(form: str, tmp_path: Path) -> None:
    config, process = FAMILIES["p2 ffhq"]
    path = tmp_path / f"x.{form}"
    state = whole_file(path, config, prefix="ema.module.")
    checkpoint = load_checkpoint(CPU, path)
    assert (checkpoint.detection.unet, checkpoint.model.config, checkpoint.path) == (config, process, path)
    loaded = checkpoint.model.network.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], v.float()) for k, v in state.items())


@pytest.mark.parametrize("name", ODD)
def test_a_network_of_no_family_is_detected_and_its_guesses_are_listed(name: str) -> None:
    config = ODD[name]
    found = detect(table(config))
    assert found.unet == config
    assert found.family is None
    assert "schedule" in found.guessed and "num_heads" in found.guessed
    assert ("variance" in found.guessed) == (name == "fixed variance")
    assert found.diffusion.variance == ("fixed_large" if name == "fixed variance" else "learned_range")


@pytest.mark.parametrize("name", ["adm_256_uncond", "adm_64_imagenet_cond"])
def test_recorded_names_shapes_and_flags_of_the_reference_agree(name: str) -> None:
    """Given as a sidecar, the flags agree with the settings that are detected without them."""
    golden = json.loads((DATA / f"{name}.json").read_text())
    shapes = {k: tuple(v) for k, v in golden["state_dict_shapes"].items()}
    found = detect(shapes)
    assert table(found.unet) == shapes
    with torch.device("meta"), mock.patch.object(torch.nn.Embedding, "reset_parameters"):
        unet = UNet(found.unet)
        unet.load_state_dict({k: torch.empty(s) for k, s in shapes.items()}, strict=True, assign=True)
    assert sum(p.numel() for p in unet.parameters()) == golden["n_params"]
    stated = detect(shapes, sidecar=golden["args"])
    assert replace(stated.unet, num_heads=1) == found.unet  # num_heads is not used beside num_head_channels
    assert stated.diffusion.schedule == golden["args"]["noise_schedule"]
    assert stated.diffusion.rescale_timesteps == golden["args"]["rescale_timesteps"]
    assert stated.sources["schedule"] == "sidecar"


def test_averaged_weights_take_precedence() -> None:
    shapes = table(TINY)
    for others, best in (
        (["", "ema."], "ema."),
        (["model.", "model_ema.", "a."], "model_ema."),
        (["schema.", "x."], "x."),  # «ema» only as a word
        (["module.model.", "model."], "model."),
    ):
        assert network_sets({p + k: v for p in others for k, v in shapes.items()})[0].prefix == best
    both = {**shapes, **{"ema." + k: v for k, v in shapes.items() if not k.startswith("output_blocks")}}
    assert network_sets(both)[0].prefix == ""  # an averaged encoder is not a complete network


def test_overrides_precede_metadata_and_metadata_precedes_a_sidecar() -> None:
    shapes = table(TINY)
    levels = {"sidecar": {"steps": 100, "objective": "x0", "schedule": "cosine"}, "metadata": {"steps": 200, "objective": "v"}}
    found = detect(shapes, overrides={"steps": 300}, **levels)
    assert (found.diffusion.steps, found.diffusion.objective, found.diffusion.schedule) == (300, "v", "cosine")
    assert [found.sources[k] for k in ("steps", "objective", "schedule")] == ["override", "metadata", "sidecar"]
    assert found.settings["steps"] == (300, "override")
    assert found.settings["model_channels"] == (32, "shapes")


def test_a_number_of_heads_precedes_channels_per_head_of_a_weaker_source() -> None:
    shapes = table(FAMILIES["openai 256 uncond"][0])
    assert detect(shapes).unet.heads(512) == 8
    assert detect(shapes, overrides={"num_heads": 4}).unet.heads(512) == 4
    assert detect(shapes, sidecar={"num_heads": 4, "num_head_channels": 32}).unet.heads(512) == 16
    assert detect(shapes, sidecar={"num_heads": 4}, overrides={"num_head_channels": "128"}).unet.heads(512) == 4


def test_flags_of_guided_diffusion_are_understood() -> None:
    flags = {
        "image_size": "64", "num_channels": 192, "num_res_blocks": 3, "attention_resolutions": "32,16,8", "channel_mult": "",
        "learn_sigma": "True", "class_cond": True, "num_head_channels": 48, "num_heads_upsample": -1,
        "use_new_attention_order": False, "noise_schedule": "linear", "diffusion_steps": "500", "predict_xstart": True,
        "rescale_timesteps": False, "dropout": 0.1, "use_fp16": True, "resblock_updown": True, "sigma_small": True,
    }  # fmt: skip
    found = detect(table(FAMILIES["openai 64 cond"][0]), sidecar=flags)
    assert found.diffusion == DiffusionConfig("linear", 500, False, "x0", "learned_range")
    assert found.unet == replace(FAMILIES["openai 64 cond"][0], num_head_channels=48, use_new_attention_order=False)
    # Attention at a resolution that the network does not have changes nothing, as in guided-diffusion.
    assert detect(table(TINY), overrides={**TINY_SETTINGS, "attention_downsampling": "2,64,0"}).unet == TINY
    assert detect(table(replace(TINY, channel_mult=(1, 2, 2))), sidecar={"attention_downsampling": [2, 3]}).unet.attention_downsampling == (
        2,
    )
    fixed = table(ODD["fixed variance"])
    assert detect(fixed, sidecar={"sigma_small": True}).diffusion.variance == "fixed_small"
    assert detect(fixed, overrides={"variance": "fixed_small"}).sources["variance"] == "override"
    assert detect(fixed, sidecar={"objective": "v", "predict_xstart": False}).diffusion.objective == "v"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"no_such": 1}, r"'no_such', which is not a setting; known are image_size, .{0,400}$"),  # fits into one message
        ({"heads": 1}, "'heads', which is not a setting; similar names are num_heads"),
        ({"x" * 500: 1}, "not a setting"),
        ({"steps": "many"}, "steps.*'many'.*whole number"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**5000}, "steps to a very large number; it must be a whole number"),
        ({"num_head_channels": 0}, "num_head_channels"),
        ({"use_scale_shift_norm": "perhaps"}, "true or false"),
        ({"objective": 3}, "eps, v or x0"),
        ({"objective": "score"}, "objective to 'score'; it must be eps, v or x0"),
        ({"noise_schedule": "sqrt"}, "schedule to 'sqrt'; it must be linear or cosine"),
        ({"steps": 10, "diffusion_steps": 20}, "twice.*10.*20"),
        ({"model_channels": 64}, "model_channels is 64.*shapes.* show 32"),
        ({"class_cond": True}, "class_cond"),
        ({"learn_sigma": False}, "out_channels is 3.* 6"),
        ({"attention_resolutions": "16"}, "attention_downsampling.*pixels of 16"),
        ({"attention_resolutions": "0"}, "at least 1"),
        ({"channel_mult": "1,two"}, "channel_mult"),
        ({"variance": "fixed_small"}, "6 output channels"),
        ({"resblock_updown": True}, "resblock_updown"),
        ({"image_size": None}, "image_size"),
        ({"steps": float("inf")}, "steps"),
        ({"guidance_scale": 0}, "guidance_scale to 0; it must be a number above 0"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"guidance_scale": 1e30}, "guidance_scale"),
        ({"guidance_scale": True}, "guidance_scale"),
    ],
)
def test_a_wrong_setting_gives_an_error_that_names_it(given: dict[str, Any], says: str) -> None:
    for source in ("overrides", "metadata", "sidecar"):
        with pytest.raises(BlendedError, match=f"(?s){says}") as caught:
            detect(table(TINY), **{source: given})
        assert source != "overrides" or caught.value.options == ("overrides",)


def test_settings_may_be_grouped() -> None:
    stated = read_settings({"unet": {"image_size": 16}, "diffusion": {"steps": 7}}, "sidecar")
    assert stated == {"image_size": 16, "steps": 7}


# --- files of other models -------------------------------------------------------------------------------------------------------


def without(shapes: dict[str, tuple[int, ...]], start: str) -> dict[str, tuple[int, ...]]:
    return {k: v for k, v in shapes.items() if not k.startswith(start)}


def consistency() -> dict[str, tuple[int, ...]]:
    return {k: (*v, 1) if k.endswith(("qkv.weight", "proj_out.weight")) else v for k, v in table(TINY).items()}


FOREIGN = {
    "optimizer": ({"state.0.step": (), "state.0.exp_avg": (3, 4), "state.1.exp_avg": (4,)}, "optimizer"),
    "classifier": (without(table(TINY), "output_blocks"), "classifier"),
    "upsampler": (table(replace(TINY, in_channels=6)), "upsampler"),
    "grayscale": (table(replace(TINY, in_channels=1, out_channels=2)), "RGB"),
    "latent, 4 channels": (table(replace(TINY, in_channels=4, out_channels=4)), "latent diffusion"),
    "stable diffusion": (
        {**table(TINY, "model.diffusion_model."), "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
        "Stable Diffusion",
    ),
    "its unet alone": ({**table(TINY), "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320)}, "Stable Diffusion"),
    "autoencoder": ({"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)}, "autoencoder"),
    "glide": ({**table(TINY), "transformer.resblocks.0.ln_1.weight": (512,)}, "GLIDE"),
    "glide upsampler": ({**table(replace(TINY, in_channels=6)), "token_embedding.weight": (50257, 512)}, "GLIDE"),
    "pesser": ({"module.conv_in.weight": (128, 3, 3, 3), "module.down.0.block.0.conv1.weight": (128, 128, 3, 3)}, "conv_in"),
    "edm": ({"model.map_layer0.weight": (512, 128), "model.enc.64x64_conv.weight": (128, 3, 3, 3)}, "EDM"),
    "consistency": (consistency(), "consistency"),
    "diffusers": ({"down_blocks.0.resnets.0.conv1.weight": (128, 128, 3, 3)}, "diffusers"),
    "resnet": ({"conv1.weight": (64, 3, 7, 7), "fc.bias": (1000,)}, "conv1.weight"),
    "empty": ({}, "no tensors"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_error_states_what_the_file_holds_instead(name: str) -> None:
    shapes, says = FOREIGN[name]
    with pytest.raises(BlendedError, match=says) as caught:
        detect(shapes)
    assert "Use" in str(caught.value)


def test_damaged_tables_of_shapes_give_a_blended_error() -> None:
    """Tensors removed, shapes changed, absurd indices: a detection or a BlendedError, never another exception."""
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    base = table(replace(ODD["half first"], num_classes=3))
    bends = [(), (0,), (1,), (3, 0, 3, 3), (-5, 7), (7, 7, 7, 7, 7), (10**9, 10**9), (64, 3, 3, 3)]
    for _ in range(600):
        shapes = dict(base)
        for _ in range(rng.choice([1, 2, 30])):
            key = rng.choice(sorted(shapes))
            kind = rng.random()
            if kind < 0.4:
                del shapes[key]
            elif kind < 0.8:
                shapes[key] = rng.choice(bends)
            else:
                shapes[
                    f"{rng.choice(['input_blocks', 'output_blocks'])}.{rng.choice([7, 999999, 10**30])}.{rng.choice([0, 1])}.conv.weight"
                ] = (1,)
        try:
            found = detect(shapes)
            outcomes[True] += 1
            assert found.unet.model_channels >= 1
        except BlendedError as error:
            outcomes[False] += 1
            assert str(error).endswith("."), error
    assert min(outcomes.values()) > 40, outcomes
    for shape in ((256, 0), (0, 0), (256,), ()):
        with pytest.raises(BlendedError, match=r"time_embed\.0\.weight has the shape"):
            detect({**base, "time_embed.0.weight": shape})
    for key in base:  # one tensor alone is not a network
        with pytest.raises(BlendedError):
            detect({key: base[key]})


def test_numbers_in_names_do_not_take_memory() -> None:
    base = table(TINY)
    ends = {f"output_blocks.{400 * i}.1.conv.weight": (64, 64, 3, 3) for i in range(2000)}
    deep = {f"output_blocks.{i}.1.conv.weight": (64, 64, 3, 3) for i in range(1, 1000, 2)} | {
        f"output_blocks.{i}.0.in_layers.0.weight": (64,) for i in range(1000)
    }
    for surplus in (ends, deep, {"output_blocks.999999.1.conv.weight": (1,)}):
        tracemalloc.start()
        with pytest.raises(BlendedError, match="do not divide into"):
            detect({**base, **surplus})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6, peak


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_safetensors_file_with_metadata_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    config = replace(TINY, num_classes=4, use_new_attention_order=True, num_head_channels=16)
    state = {k: v.half() for k, v in weights(config).items()}
    diffusion = {"schedule": "cosine", "steps": 250, "rescale_timesteps": False, "objective": "v"}
    metadata = {"format": "pt", "unet": json.dumps(config.to_dict()), "diffusion": json.dumps(diffusion), "trained_steps": "7"}
    path = tmp_path / "ours.safetensors"
    save_file(state, path, metadata=metadata)
    checkpoint = load_checkpoint(CPU, path)
    model, detection = checkpoint.model, checkpoint.detection
    assert detection.unet == config
    assert model.config == DiffusionConfig("cosine", 250, False, "v", "learned_range")
    assert {detection.sources[k] for k in ("objective", "num_head_channels", "image_size", "use_new_attention_order")} == {"metadata"}
    assert detection == inspect_checkpoint(path)
    assert (model.image_size, model.num_classes, model.multiple_of) == (16, 4, 2)
    assert not model.network.training
    for parameter in model.network.parameters():
        assert not parameter.requires_grad and parameter.dtype == torch.float32 and parameter.device.type == "cpu"
    assert torch.equal(output(model.network, config), expected({k: v.float() for k, v in state.items()}, config))
    before = output(model.network, config)
    with path.open("r+b") as stream:  # the network does not depend on the file after loading
        stream.seek(path.stat().st_size // 2)
        stream.write(b"\xff" * (path.stat().st_size // 2))
    assert torch.equal(output(model.network, config), before)


def test_weights_have_the_precision_and_layout_of_the_context(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights(), path)
    model = load_ddpm(DeviceContext(dtype=torch.bfloat16, channels_last=True), path, TINY_SETTINGS)
    like = UNet(TINY).set_compute_dtype(torch.bfloat16)
    assert {k: v.dtype for k, v in model.network.state_dict().items()} == {k: v.dtype for k, v in like.state_dict().items()}
    assert model.network.get_parameter("middle_block.0.in_layers.2.weight").is_contiguous(memory_format=torch.channels_last)
    close = output(model.network) - expected(weights())
    assert 0 < close.abs().max() < 0.1 * expected(weights()).abs().max()


FORMS = {
    "raw": (lambda s: s, ""),
    "ema": (lambda s: {"ema": s, "model": bent(s), "step": 3}, "ema."),
    "ema_model": (lambda s: {"model_state_dict": bent(s), "ema_model": {f"module.{k}": v for k, v in s.items()}}, "ema_model.module."),
    "state_dict": (lambda s: {"state_dict": {f"model.diffusion_model.{k}": v for k, v in s.items()}, "epoch": 1}, "state_dict.model.diffusion_model."),
    "model": (lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}}, "model."),
    "model_state_dict": (lambda s: {"model_state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}, "loss": 0.5}, "model_state_dict._orig_mod."),
    "a rate named ema": (lambda s: {"ema": 0.9999, "model": s}, "model."),
    "list": (lambda s: [{"lr": 0.1}, s], "1."),
}  # fmt: skip


def bent(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v + 1 for k, v in state.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_is_found_in_every_container_of_torch_save(form: str, zipped: bool, tmp_path: Path) -> None:
    wrap, prefix = FORMS[form]
    state = weights()
    path = tmp_path / "model.pt"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(CPU, path, TINY_SETTINGS)
    assert checkpoint.detection.prefix == prefix
    assert torch.equal(output(checkpoint.model.network), expected(state))


def two_sets(kind: str) -> tuple[dict[str, Any], str]:
    """(what a training saves with the state under 'model' and another one as its average, name of the average)."""
    state, average = weights(), weights(seed=1)
    dotted = {"net_EMA": "", "netEMA": "", "ModelEMA": "module.", "averaged_model": "module.", "swa_model": "module."}
    if kind in dotted:
        inner = dotted[kind]
        return {
            "model": state,
            kind: {f"{inner}{k}": v for k, v in average.items()} | {"n_averaged": torch.tensor(3)},
        }, f"{kind}.{inner}".rstrip(".")
    if kind == "LitEma":
        lit = {f"model_ema.diffusion_model{k.replace('.', '')}": v for k, v in average.items()}
        own = {f"model.diffusion_model.{k}": v for k, v in state.items()}
        buffers = {
            "betas": torch.ones(1000),
            "logvar": torch.zeros(1000),
            "model_ema.decay": torch.tensor(0.9),
            "model_ema.num_updates": torch.tensor(3),
        }
        return {"state_dict": {**own, **lit, **buffers}}, "state_dict.model_ema"
    assert kind == "torch_ema"
    shadow = {"decay": 0.999, "num_updates": 5, "shadow_params": list(average.values()), "collected_params": None}
    return {"model": {**state, "betas": torch.ones(10)}, "ema": shadow}, "ema.shadow_params"


@pytest.mark.parametrize("kind", ["LitEma", "torch_ema", "net_EMA", "netEMA", "ModelEMA", "averaged_model", "swa_model"])
def test_averaged_weights_are_found_listed_and_preferred(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, name = two_sets(kind)
    path = tmp_path / "model.pt"
    torch.save(content, path)
    best = load_checkpoint(CPU, path, TINY_SETTINGS)
    assert [(s.name, s.averaged) for s in best.detection.sets] == [(name, True), (best.detection.sets[1].name, False)]
    assert torch.equal(output(best.model.network), expected(weights(seed=1)))
    trained = load_checkpoint(CPU, path, TINY_SETTINGS, weights="model")
    assert torch.equal(output(trained.model.network), expected(weights())) and not trained.detection.weights.averaged
    assert load_checkpoint(CPU, path, TINY_SETTINGS, weights=name).detection == best.detection
    settings = [f"--set={key}={value}" for key, value in TINY_SETTINGS.items()]
    assert main(["inspect", str(path), *settings]) == 0
    out = capsys.readouterr().out
    assert f"  {name} (averaged), " in out and re.search(rf"{name} .*, used\n", out) and out.count(", used") == 1
    assert main(["inspect", str(path), *settings, "--weights", "model", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["weights"]
    assert [(s["name"], s["averaged"], s["used"]) for s in told] == [(name, True, False), (trained.detection.weights.name, False, True)]
    assert main(["convert", str(path), str(tmp_path / "x.safetensors"), *settings, "--weights", "model"]) == 0
    assert torch.equal(output(load_ddpm(CPU, tmp_path / "x.safetensors").network), expected(weights()))
    capsys.readouterr()
    assert main(["inspect", str(path), *settings, "--weights", "nothing"]) == 2
    assert re.search(r"no set of weights named 'nothing'; it holds .*\(averaged\).*\(--weights\)\.", capsys.readouterr().err)


def test_averages_without_the_network_they_belong_to_say_so() -> None:
    lists = {f"ema.shadow_params.{i}": shape for i, shape in enumerate(table(TINY).values())}
    for shapes in (lists, {f"model_ema.diffusion_model{k.replace('.', '')}": v for k, v in table(TINY).items()}):
        with pytest.raises(BlendedError, match="averaged weights whose names were left out"):
            detect(shapes)


def test_the_format_is_determined_from_the_content(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "renamed.ckpt")
    torch.save(weights(), tmp_path / "renamed.pth")
    for name in ("renamed.ckpt", "renamed.pth"):
        assert torch.equal(output(load_ddpm(CPU, str(tmp_path / name), TINY_SETTINGS).network), expected(weights()))


def test_a_sidecar_and_overrides_are_used(tmp_path: Path) -> None:
    path = tmp_path / "model.v2.pt"
    torch.save(weights(), path)
    with pytest.warns(BlendedWarning, match="model.v2.pt.*num_heads 4.*schedule linear.*objective eps"):
        assert load_ddpm(CPU, path, probe=None).config.objective == "eps"
    sidecar = tmp_path / "model.v2.json"
    sidecar.write_text(json.dumps({**TINY_SETTINGS, "noise_schedule": "linear", "num_channels": 32}))
    checkpoint = load_checkpoint(CPU, path, {"objective": "x0"})
    assert (checkpoint.model.config.objective, checkpoint.detection.sources["objective"]) == ("x0", "override")
    assert (checkpoint.detection.unet, checkpoint.detection.sources["num_head_channels"]) == (TINY, "sidecar")
    for text, says in (("{", "not valid JSON"), ("[1]", "JSON object"), ('{"prompt": "cat"}', "prompt"), ("[" * 100000, "not valid JSON")):
        sidecar.write_text(text)
        with pytest.raises(BlendedError, match=f"model.v2.pt.*{says}"):
            load_ddpm(CPU, path)


def test_a_checkpoint_can_recommend_a_guidance_scale(tmp_path: Path) -> None:
    """In its metadata or a sidecar, or by override; conversion keeps it; 'inspect' shows it."""
    plain = tmp_path / "plain.pt"
    torch.save(weights(), plain)
    assert load_ddpm(DeviceContext(), plain, TINY_SETTINGS).guidance_scale is None
    assert load_ddpm(DeviceContext(), plain, {**TINY_SETTINGS, "guidance_scale": "250"}).guidance_scale == 250
    plain.with_suffix(".json").write_text(json.dumps({**TINY_SETTINGS, "guidance_scale": 400}))
    loaded = load_checkpoint(DeviceContext(), plain)
    assert loaded.model.guidance_scale == 400 and loaded.detection.settings["guidance_scale"] == (400, "sidecar")
    convert(loaded.model, tmp_path / "converted.safetensors")
    again = load_checkpoint(DeviceContext(), tmp_path / "converted.safetensors")
    assert again.model.guidance_scale == 400 and again.detection.settings["guidance_scale"] == (400, "metadata")
    assert inspect_checkpoint().guidance_scale == GUIDANCE_SCALE == load_ddpm(DeviceContext()).guidance_scale


def test_the_embedded_model_states_its_settings() -> None:
    checkpoint = load_checkpoint(CPU)
    assert checkpoint.detection.guessed == () and checkpoint.detection.sources["objective"] == "metadata"
    assert checkpoint.model.config.variance == "learned_range"
    assert repr(checkpoint.model).startswith("DiffusionModel(UNet, 64 px, DiffusionConfig(")
    assert repr(checkpoint.model.network).startswith("UNet(64 px, ") and len(repr(checkpoint)) < 2000


# --- damaged files ---------------------------------------------------------------------------------------------------


def refused(path: Path, says: str) -> None:
    with pytest.raises(BlendedError, match=f"(?s){path.name}.*{says}") as caught:
        load_ddpm(CPU, path, TINY_SETTINGS)
    assert "weights_only" not in str(caught.value)  # no advice to turn the protection off
    assert "--" not in str(caught.value) and caught.value.options


def test_every_name_and_shape_must_match(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = weights()
    for change, says in (
        ({"output_blocks.0.0.out_layers.3.bias": None}, "missing: output_blocks.0.0.out_layers.3.bias"),
        ({"input_blocks.0.0.scales": torch.ones(1000)}, "surplus: input_blocks.0.0.scales"),
        ({"cond.weight": torch.ones(8, 8)}, "surplus: cond.weight"),
        ({"time_embed.2.weight": torch.ones(128, 64)}, r"time_embed.2.weight \(128, 64\) instead of \(128, 128\)"),
        ({k: None for k in state if k.endswith(".bias")}, "and [0-9]+ more"),
        ({"out.2.weight": None}, "out.2.weight is missing"),
    ):
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        refused(path, says)
        with pytest.raises(BlendedError, match=says):
            inspect_checkpoint(path, TINY_SETTINGS)


def test_what_a_file_counts_beside_the_weights_does_not_damage_it(tmp_path: Path) -> None:
    beside = {
        "betas": torch.ones(1000),
        "num_batches_tracked": torch.tensor(3),
        "out.0.num_batches_tracked": torch.tensor(3),
        "step": torch.ones(1),
    }
    torch.save({**weights(), **beside}, tmp_path / "model.pt")
    save_file({**weights(), **beside}, tmp_path / "model.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert torch.equal(output(load_ddpm(CPU, path, TINY_SETTINGS).network), expected(weights()))


def test_values_must_be_finite_and_in_the_range_of_the_precision(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    key = "middle_block.1.qkv.weight"
    for value, says in (
        (torch.full((192, 64, 1), float("nan")), f"12288 of the 12288 values of {key}"),
        (torch.zeros(192, 64, 1).index_fill_(0, torch.tensor([3]), float("inf")), "64 of the 12288"),
        (torch.full((192, 64, 1), 1e39, dtype=torch.float64), r"values up to 1e\+39, too large for torch\.float32"),
        (torch.zeros(192, 64, 1, dtype=torch.int8), "quantized"),
        (torch.zeros(192, 64, 1, dtype=torch.complex64), "quantized"),
        (torch.zeros(192, 64, 1).to_sparse(), "not a dense"),
        *(  # a later torch may not make them any more
            [
                (
                    torch.quantize_per_tensor(torch.zeros(192, 64, 1), 0.1, 0, torch.qint8),
                    "not a dense floating-point tensor: it is quantized",
                )
            ]
            if hasattr(torch, "quantize_per_tensor")
            else []
        ),
    ):
        torch.save({**weights(), key: value}, path)
        refused(path, says)
    torch.save({**weights(), key: torch.full((192, 64, 1), 1e6)}, path)
    load_ddpm(CPU, path, TINY_SETTINGS)
    with pytest.raises(BlendedError, match=r"too large for torch\.float16"):
        load_ddpm(DeviceContext(dtype=torch.float16), path, TINY_SETTINGS)


def test_damaged_files_give_an_error(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pt", "there is no file .*absent.pt")
    refused(tmp_path, "folder")
    for suffix in (".pt", ".safetensors", ".ckpt"):
        for name, content, says in (
            ("empty", b"", "empty"),
            ("page", b"\n<!DOCTYPE html><html>quota exceeded", "web page"),
            ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
            ("noise", random.Random(1).randbytes(5000), "download it again"),
            ("text", b"hello", "download it again"),
            ("header", b"\xff" * 7 + b"\x7f{}", "download it again"),
        ):
            path = tmp_path / (name + suffix)
            path.write_bytes(content)
            refused(path, says)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_give_an_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    load_ddpm(CPU, path, TINY_SETTINGS)
    for share in (0.0001, 0.01, 0.5, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "download it again")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_no_pickle_runs_code(zipped: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "model.pt", tmp_path / "touched"
    torch.save({**weights(), "extra": Hostile(target)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "would run .*refused")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Hostile(target), protocol))
        refused(path, "reading it would .*refused")
    assert not target.exists()
    edm = "torch_utils.persistence", "_reconstruct_persistent_obj"
    for content in (b"\x80\x02c%b\n%b\n)R.", b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x17%b\x94\x8c\x1b%b\x94\x93)R."):
        path.write_bytes(content % tuple(part.encode() for part in edm))
        refused(path, "EDM")


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name → (file, part of its error), of files that a user may take for a checkpoint."""
    out = {"absent": (folder / "absent.pt", "there is no file")}
    for name, (shapes, says) in FOREIGN.items():
        hollow_file(folder / f"{name}.safetensors", shapes)
        out[name] = folder / f"{name}.safetensors", says
    whole = folder / "whole.pt"
    torch.save(weights(), whole)
    data = whole.read_bytes()
    for name, content, says in (
        ("nothing.pt", b"", "is empty"),
        ("cut.pt", data[: len(data) // 2], "download it again"),
        ("page.pt", b"<!DOCTYPE html><p>quota", "is a web page"),
        ("pickle.pt", pickle.dumps(Hostile(folder / "touched")), "so it is refused"),
    ):
        (folder / name).write_bytes(content)
        out[name] = folder / name, says
    whole.unlink()
    opt = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    for name, content, says in (
        ("opt.pt", opt, "state of an optimizer"),
        ("nan.pt", {**weights(), "out.2.bias": torch.full((6,), torch.nan)}, "not finite"),
        ("shaped.pt", {**weights(), "out.2.bias": torch.zeros(7)}, "another shape|download"),
    ):
        torch.save(content, folder / name)
        out[name] = folder / name, says
    (folder / "pipeline" / "unet").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    out["diffusers folder"] = folder / "pipeline", "folder in the layout of the diffusers library"
    return out


def test_every_wrong_file_ends_with_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, out = tmp_path / "there", tmp_path / "out"
    there.mkdir()
    out.mkdir()
    cases = wrong_files(there)
    before = sorted(p for p in tmp_path.rglob("*"))
    settings = [f"--set={name}={value}" for name, value in TINY_SETTINGS.items()]
    for name, (path, says) in cases.items():
        for command in (["inspect", str(path)], ["convert", str(path), str(out / "x.safetensors")]):
            assert main([*command, *settings]) == 2, name
            captured = capsys.readouterr()
            told = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
            assert captured.out == "" and len(told) == 1 and told[0].startswith("error: "), (name, told)
            assert re.search(says, told[0]) and told[0].endswith("."), (name, told)
            assert path.stem in told[0], (name, told)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_containers_without_a_network_give_an_error(tmp_path: Path) -> None:
    path = tmp_path / "opt000100.pt"
    loop: dict[str, Any] = {"step": 3}
    loop["self"] = loop
    fresh = {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}
    used = {**fresh, "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}}
    for content, says in (
        (used, "optimizer"),
        (fresh, "optimizer"),
        ({"step": 3}, "no tensors"),
        (loop, "no tensors"),
        (7, "no tensors"),
        ([torch.ones(3), torch.ones(4)], "no ADM network"),
        (torch.ones(3), "no ADM network"),
    ):
        torch.save(content, path)
        refused(path, says)


def test_nested_lists_are_searched_once(tmp_path: Path) -> None:
    """Lists that contain one another many times are small in a file and endless for a naive search."""
    path = tmp_path / "model.pt"
    item: list[Any] = []
    for _ in range(7):
        item = [item] * 14
    torch.save(item, path)
    start = time.process_time()
    refused(path, "no tensors")
    assert time.process_time() - start < 5  # a hundred million visits take far longer


def test_wrong_metadata_gives_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for metadata, says in (
        ({"unet": "{"}, "'unet'.*not valid JSON"),
        ({"diffusion": "3"}, "JSON object"),
        ({"unet": json.dumps({**TINY.to_dict(), "num_res_blocks": 2})}, "num_res_blocks is 2.*shapes"),
        ({"diffusion": json.dumps({"flow": True})}, "flow.*not a setting"),
    ):
        save_file(weights(), path, metadata=metadata)
        refused(path, says)


@pytest.mark.slow
def test_two_thousand_damaged_files_are_loaded_or_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz"], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    loaded, refused = map(int, re.findall(r"(\d+) (?:loaded|refused)", run.stdout))
    assert loaded + refused == 2000 and loaded > 50 and refused > 500, run.stdout
