"""Load DDPM and Load CLIP (open_clip)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..blended_core.adm.describe import summary
from ..blended_core.adm.load import load_checkpoint
from ..blended_core.adm.probe import ProbeOptions
from ..blended_core.clip.model import load_clip, load_clip_file, load_clip_tag
from ..blended_core.device import DTYPES
from ..blended_core.errors import BlendedError
from . import inputs
from .folders import CLIP_FOLDER, DDPM_FOLDER, check_file, file_version, find_file, first_path, list_files
from .memory import LoadedCLIP, LoadedDDPM, device_context, manage, offload_context, probe_context
from .model import CoreModel
from .runtime import Progress, keeps_text, library_scope, shown_text

DDPM, CLIP = "Load DDPM", "Load CLIP (open_clip)"
EMBEDDED = "embedded"
TAGS = (
    "ViT-B-16:openai",
    "ViT-B-32:openai",
    "ViT-L-14:openai",
    "RN50:openai",
    "ViT-B-16:laion2b_s34b_b88k",
    "ViT-B-32:laion2b_s34b_b79k",
)
DOWNLOADED = " (fetched by open_clip)"
"""Ends the choices that are downloaded on first use. Part of saved workflows, so it must not change."""


class LoadDDPM(io.ComfyNode):
    """Loads a diffusion model from models/ddpm."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedLoadDDPM",
            display_name=DDPM,
            category=inputs.CATEGORY,
            description=(
                "Loads a pixel-space diffusion model (ADM, “guided-diffusion”), which makes the edit. Put checkpoints into models/ddpm. “embedded” is a "
                "small 64-pixel model of a toy world that is part of the pack."
            ),
            search_aliases=[
                "guided diffusion",
                "ADM",
                "diffusion checkpoint",
                "blended diffusion model",
                "openai diffusion",
                "pixel diffusion",
            ],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[EMBEDDED, *list_files(DDPM_FOLDER)],
                    default=EMBEDDED,
                    tooltip="A checkpoint in models/ddpm (.safetensors, .pt), or the embedded 64-pixel model. Its settings are detected from the weights.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *DTYPES],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Precision of the UNet's blocks. auto: as ComfyUI chooses. fp32: exact and slower; choose it if "
                    "results are black.",
                ),
                io.String.Input(
                    "overrides",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Settings of the checkpoint that replace the detected ones, one per line: num_heads = 4. Leave it empty unless results are noise.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Set of weights in the checkpoint, if it holds several, such as model or ema. Empty: averaged weights if there are any.",
                ),
            ],
            **keeps_text(),
            outputs=[
                inputs.DDPM.Output(
                    "ddpm", display_name="ddpm", tooltip="The diffusion model, for the sampler, Noise Background or CLIP Guidance Step."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **others: Any) -> str:
        if checkpoint == EMBEDDED:
            return EMBEDDED
        path = find_file(DDPM_FOLDER, checkpoint)
        return file_version(path, path.with_suffix(".json"))

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        # Accepts files that the list omits, because a saved workflow may name one: execute reports what the file is.
        return checkpoint == EMBEDDED or check_file(DDPM_FOLDER, checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, precision: str = "auto", overrides: str = "", weights: str = "") -> io.NodeOutput:
        with library_scope(DDPM):
            path: Path | str = EMBEDDED if checkpoint == EMBEDDED else find_file(DDPM_FOLDER, checkpoint)
            context = device_context(precision)
            probe = ProbeOptions(
                context=lambda: probe_context(context, Path(path)),
                on_forward=lambda done, expected: Progress(expected).update(done),
            )
            loaded = load_checkpoint(offload_context(context), path, parse_overrides(overrides), probe=probe, weights=weights)
            patcher = manage(CoreModel(loaded.model, context))
            return io.NodeOutput(LoadedDDPM(loaded.model, patcher, context), ui=shown_text(summary(loaded.detection)))


def parse_overrides(text: str) -> dict[str, str]:
    """'num_heads = 4', one per line → {'num_heads': '4'}."""
    overrides = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, value = (part.strip() for part in line.partition("="))
        if not name or not value:
            raise BlendedError(f"{line!r} is not a setting; write one per line, such as num_heads = 4.", option="overrides")
        overrides[name] = value
    return overrides


class LoadCLIP(io.ComfyNode):
    """Loads a CLIP with open_clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedLoadCLIP",
            display_name=CLIP,
            category=inputs.CATEGORY,
            description=(
                "Loads the CLIP that guides the edit and ranks the candidates. Weights other than the embedded ones are loaded with "
                "open_clip, because ComfyUI's own CLIP has no image gradients. “embedded” knows only the words of the toy world."
            ),
            search_aliases=["open clip", "openclip", "CLIP guidance model", "ViT-B/16"],
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=[EMBEDDED, *list_files(CLIP_FOLDER), *(tag + DOWNLOADED for tag in TAGS)],
                    default=EMBEDDED,
                    tooltip="The embedded CLIP, a file in models/open_clip, or a model of open_clip, downloaded on first use. The paper uses "
                    "ViT-B-16:openai.",
                ),
                io.String.Input(
                    "architecture",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="open_clip's name for the architecture of a file, such as ViT-B-16-quickgelu. Empty: detected from the weights.",
                ),
                io.String.Input(
                    "other_tag",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Any other model of open_clip as MODEL:TAG, such as ViT-L-14:laion2b_s32b_b82k. Downloaded on first use. Replaces weights.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", "fp32", "bf16", "fp16"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Precision of the image encoder. auto: bf16, or fp16 on older GPUs, for large encoders where the device is faster with it, else fp32.",
                ),
            ],
            outputs=[inputs.CLIP.Output("clip", display_name="clip", tooltip="The CLIP, for Encode Prompt.")],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str, **others: Any) -> str:
        return weights if weights == EMBEDDED or weights.endswith(DOWNLOADED) else file_version(find_file(CLIP_FOLDER, weights))

    @classmethod
    def execute(cls, weights: str, architecture: str = "", other_tag: str = "", precision: str = "auto") -> io.NodeOutput:
        with library_scope(CLIP):
            context = offload_context(device_context("fp32"))
            tag = other_tag.strip() or (weights.removesuffix(DOWNLOADED) if weights.endswith(DOWNLOADED) else "")
            if tag and tag != EMBEDDED:
                clip = load_clip_tag(context, tag, folder=first_path(CLIP_FOLDER))
            elif tag or weights == EMBEDDED:
                clip = load_clip(context)
            else:
                clip = load_clip_file(context, find_file(CLIP_FOLDER, weights), architecture.strip())
            clip.in_precision(precision, device_context("fp32").device)
            return io.NodeOutput(LoadedCLIP(clip, manage(clip.model)))
