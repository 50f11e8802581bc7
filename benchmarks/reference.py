"""The published code of Blended Diffusion, measured beside the library with the same weights.

    git clone https://github.com/omriav/blended-diffusion
    python -m benchmarks --only reference --reference blended-diffusion

Its own classes are built and called. Only what they load from files is replaced, by small or random networks; and what they import to draw figures and
to write videos, by nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn

from blended_core.adm.unet import UNet, UNetConfig
from blended_core.device import DeviceContext

from .measure import Work, one_thread, ratio, time_by_operation, time_interleaved
from .networks import SIZES, in_own_precision
from .step import Log, largest_shares
from .structure import INDEX, Setting, floor, library_step, reference_step

CPU = DeviceContext()
UNUSED = {"utils.video": ("save_video",), "utils.visualization": ("show_tensor_image", "show_editied_masked_image")}
"""Modules of the published code that only draw, and the names that it imports from them. They need packages that a step does not."""
SAME = 1e-4
"""Largest difference of the outputs of the networks, relative to their largest value, with which they count as the same."""
REFERENCE_TARGETS = {
    # (network, figure): (value, whether it is the "least" or the "most")
    ("small", "published code / x0"): (3.0, "least"),
    ("small", "exact / floor"): (1.05, "most"),
    ("medium", "published code / x0"): (1.8, "least"),
    ("medium", "published code / x0, bfloat16 CLIP"): (2.8, "least"),
}


class Published:
    """The published code with the weights of a setting.

    Args:
        folder: a clone of its repository.
        setting: networks and prompt, on the CPU in float32.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.setting = setting
        with _imported(folder) as module:
            self.editor, self.gradient = _editor(module, setting)

    def step(self) -> Tensor:
        """x_{t−1} [B, 3, H, W] of a guided step, without the background that is blended in afterwards."""
        x = self.setting.x
        level = torch.full((len(x),), INDEX)
        with torch.no_grad():
            out = self.editor.diffusion.p_sample(self.editor.model, x, level, clip_denoised=False, cond_fn=self.gradient, model_kwargs={})
        result: Tensor = out["sample"]
        return result

    def differences(self) -> dict[str, float]:
        """The largest difference of the outputs of each network from the library's, relative to the largest value."""
        setting, side = self.setting, self.setting.clip.image_size
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
        times = torch.full((len(setting.x),), 500.0)
        with torch.no_grad():
            pairs = {
                "UNet": (self.editor.model(setting.x, times), setting.model.network(setting.x, times)),
                "CLIP": (self.editor.clip_model.encode_image(images), setting.clip.encode_normalized(images)),
            }
        return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


@contextlib.contextmanager
def _imported(folder: Path) -> Iterator[Any]:
    """The published module with the class ``ImageEditor``."""
    if not (folder / "optimization" / "image_editor.py").is_file():
        raise FileNotFoundError(f"{folder} is not a clone of https://github.com/omriav/blended-diffusion.")
    stand_ins = {name: ModuleType(name) for name in UNUSED}
    for name, names in UNUSED.items():
        for attribute in names:
            setattr(stand_ins[name], attribute, None)
    with patch.dict(sys.modules, stand_ins), patch.object(sys, "path", [str(folder.resolve()), *sys.path]):
        yield importlib.import_module("optimization.image_editor")


def _editor(module: Any, setting: Setting) -> tuple[Any, Callable[..., Tensor]]:
    """(an ``ImageEditor`` with the networks of the setting, the function for the gradient that it gives to its sampling loop)."""
    side = setting.size.unet.image_size
    create = module.create_model_and_diffusion
    found: dict[str, Any] = {}

    def create_own(**settings: Any) -> tuple[nn.Module, Any]:
        network, diffusion = create(**{**settings, **unet_settings(setting.size.unet)})
        network.convert_to_fp16 = lambda: None  # it would follow for every network, and float32 is compared
        return network, diffusion

    def record(*_args: Any, **given: Any) -> Iterator[Any]:
        found.update(given)
        return iter(())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        picture, mask = Path(folder) / "picture.png", Path(folder) / "mask.png"
        Image.new("RGB", (side, side)).save(picture)
        Image.fromarray((setting.mask[0, 0] * 255).byte().numpy()).save(mask)
        arguments = {
            "--prompt": "something", "--init_image": picture, "--mask": mask, "--output_path": folder, "--iterations_num": 1,
            "--batch_size": setting.size.batch, "--aug_num": setting.size.views,
        }  # fmt: skip
        with (
            patch.object(sys, "argv", ["main.py", *(str(part) for pair in arguments.items() for part in pair)]),
            patch.object(module, "create_model_and_diffusion", create_own),
            patch.object(torch, "load", lambda *_, **__: setting.model.network.state_dict()),
            patch.object(torch.cuda, "is_available", lambda: False),
            patch.object(module.clip, "load", lambda *_, **__: (openai_clip(setting), None)),
            patch.object(module.lpips, "LPIPS", lambda **_: nn.Identity()),
        ):
            editor = module.ImageEditor(importlib.import_module("optimization.arguments").get_arguments())
        editor.model_config["image_size"] = side
        editor.clip_model.encode_text = lambda _tokens: setting.prompt.embeddings
        editor.diffusion.p_sample_loop_progressive = record
        editor.edit_image_by_prompt()
    gradient: Callable[..., Tensor] = found["cond_fn"]
    return editor, gradient


def unet_settings(config: UNetConfig) -> dict[str, Any]:
    """A configuration of a UNet as the arguments of guided-diffusion's ``create_model_and_diffusion``."""
    side = config.image_size
    return {
        "image_size": side,
        "num_channels": config.model_channels,
        "channel_mult": ",".join(map(str, config.channel_mult)),
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": ",".join(str(side // factor) for factor in config.attention_downsampling),
        "num_heads": config.num_heads,
        "num_head_channels": config.num_head_channels or -1,
        "use_scale_shift_norm": config.use_scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "use_fp16": False,
    }


def openai_clip(setting: Setting) -> nn.Module:
    """The CLIP of the published code with the weights of the setting."""
    config = setting.size.clip
    vision, text = config["vision_cfg"], config["text_cfg"]
    network: nn.Module = importlib.import_module("CLIP.clip.model").CLIP(
        config["embed_dim"], vision["image_size"], vision["layers"], vision["width"], vision["patch_size"],
        text["context_length"], text["vocab_size"], text["width"], text["heads"], text["layers"],
    )  # fmt: skip
    for block in network.visual.transformer.resblocks:  # type: ignore[union-attr]
        block.attn.num_heads = vision["width"] // vision.get("head_width", 64)  # the constructor has heads of 64 alone
        block.attn.head_dim = vision.get("head_width", 64)
    network.load_state_dict(setting.open_clip.model.state_dict())
    return network


def measure_reference(folder: Path, name: str, rounds: int, log: Log) -> dict[str, Any]:
    """Seconds of the processor of a guided step and ratios, with one thread on the CPU; float32 but where bfloat16 is named.

    bfloat16 is measured where the library would choose it for this CLIP on this processor.

    Raises:
        RuntimeError: if the networks of both do not compute the same.
    """
    setting = Setting.build(SIZES[name], CPU)
    if not isinstance(setting.model.network, UNet):
        raise TypeError("only an ADM network can be measured.")
    published = Published(folder, setting)
    differences = published.differences()
    if not max(differences.values()) < SAME:
        raise RuntimeError(f"the networks of the published code and of the library differ: {differences}.")
    variants: dict[str, Work] = {
        "published code": published.step,
        "reimplemented": lambda: reference_step(setting),
        "floor": lambda: floor(setting),
        "exact": lambda: library_step(setting),
        "x0": lambda: library_step(setting, "x0"),
    }
    half = in_own_precision(setting.clip)
    if half is not None:
        near = replace(setting, clip=half)
        variants["exact, bfloat16 CLIP"] = lambda: library_step(near)
        variants["x0, bfloat16 CLIP"] = lambda: library_step(near, "x0")
    log(f"published code, {name}: {', '.join(variants)}, {rounds} rounds")
    with one_thread(), CPU.autograd():
        seconds = time_interleaved(variants, rounds, CPU.device, clock=time.process_time)
        profiles = {variant: largest_shares(time_by_operation(work, CPU.device, 1)) for variant, work in variants.items()}
    pairs = [("published code", variant) for variant in variants if variant not in ("published code", "floor")] + [("exact", "floor")]
    return {
        "network": name,
        "commit": commit(folder),
        "batch": setting.size.batch,
        "views": setting.size.views,
        "difference": differences,
        "seconds": seconds,
        "ratios": {f"{a} / {b}": vars(ratio(seconds[a], seconds[b])) for a, b in pairs},
        "operations": profiles,
    }


def commit(folder: Path) -> str:
    """The commit of a clone; '' if it is none."""
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()
