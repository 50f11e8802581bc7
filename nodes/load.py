"""Networks from files: Load DDPM, Load CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..blended_core.adm.describe import summary
from ..blended_core.adm.load import load_checkpoint
from ..blended_core.adm.probe import ProbeOptions
from ..blended_core.clip.files import architecture_of
from ..blended_core.clip.model import load_clip
from ..blended_core.errors import BlendedError
from . import glue

EMBEDDED = "embedded"
TAGS = (
    "ViT-B-16:openai",
    "ViT-B-32:openai",
    "ViT-L-14:openai",
    "RN50:openai",
    "ViT-B-16:laion2b_s34b_b88k",
    "ViT-B-32:laion2b_s34b_b79k",
)
FETCHED = " (fetched by open_clip)"


class LoadDDPM(io.ComfyNode):
    """A diffusion model from models/ddpm."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedLoadDDPM",
            display_name="Load DDPM",
            category=glue.CATEGORY,
            description=(
                "Loads a pixel-space diffusion model (ADM, “guided-diffusion”) that paints the edit. Files lie in models/ddpm; “embedded” is a small "
                "64-pixel model of a toy world that comes with the pack."
            ),
            search_aliases=["guided diffusion", "ADM", "diffusion checkpoint", "blended diffusion model", "openai diffusion"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[EMBEDDED, *glue.files_in(glue.DDPM_FOLDER)],
                    default=EMBEDDED,
                    tooltip="A file in models/ddpm (.safetensors, .pt), or the embedded 64-pixel model. Its settings are found from the weights.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *glue.DTYPES],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Of the network's torso. auto follows ComfyUI; fp32 is exact and slower; choose it when pictures come out black.",
                ),
                io.String.Input(
                    "overrides",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Settings that you know better than the file tells, one a line: num_heads = 4. Leave it empty unless pictures are noise.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                glue.DDPM.Output(
                    "ddpm", display_name="ddpm", tooltip="The diffusion model, for Noise Background, CLIP Guidance Step or the sampler."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **others: Any) -> str:
        if checkpoint == EMBEDDED:
            return EMBEDDED
        path = glue.path_of(glue.DDPM_FOLDER, checkpoint)
        return glue.stamp(path, path.with_suffix(".json"))

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        # A file that the list leaves out may stand in a saved workflow; execute says what it is, the list could not.
        return checkpoint == EMBEDDED or glue.is_there(glue.DDPM_FOLDER, checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, precision: str = "auto", overrides: str = "") -> io.NodeOutput:
        with glue.engine():
            path: Path | str = EMBEDDED if checkpoint == EMBEDDED else glue.path_of(glue.DDPM_FOLDER, checkpoint)
            context, stated = glue.device_context(precision), settings(overrides)
            probe = ProbeOptions(
                context=lambda: glue.probe_context(context, Path(path)),
                on_forward=lambda done, expected: glue.Progress(expected).update(done),
            )
            loaded = load_checkpoint(glue.offload_context(context), path, stated, probe=probe)
            glue.show_text(cls.hidden.unique_id, summary(loaded.detection))
            return io.NodeOutput(glue.LoadedDDPM(loaded.model, glue.manage(loaded.model.network), context))


def settings(lines: str) -> dict[str, str]:
    """'num_heads = 4' a line → {'num_heads': '4'}."""
    out = {}
    for line in lines.splitlines():
        name, equals, value = line.partition("=")
        if not line.strip():
            continue
        if not equals or not name.strip() or not value.strip():
            raise BlendedError(f"the override {line.strip()!r} is not understood; write one setting a line, such as num_heads = 4.")
        out[name.strip()] = value.strip()
    return out


class LoadCLIP(io.ComfyNode):
    """A CLIP of open_clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedLoadCLIP",
            display_name="Load CLIP (open_clip)",
            category=glue.CATEGORY,
            description=(
                "Loads the CLIP that judges how well the edit fits the prompt. It is open_clip's, whose image side has gradients; ComfyUI's own CLIP "
                "cannot guide. “embedded” knows the toy world's words and nothing else."
            ),
            search_aliases=["open clip", "openclip", "CLIP guidance model", "ViT-B/16"],
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=[EMBEDDED, *glue.files_in(glue.CLIP_FOLDER), *(tag + FETCHED for tag in TAGS)],
                    default=EMBEDDED,
                    tooltip="The embedded CLIP, a file in models/open_clip, or a model that open_clip fetches once and keeps. ViT-B-16:openai is the paper's.",
                ),
                io.String.Input(
                    "architecture",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="For a file: open_clip's name of its architecture, such as ViT-B-16-quickgelu. Empty: told by the file's shapes.",
                ),
                io.String.Input(
                    "other_tag",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Any other model of open_clip as MODEL:TAG, such as ViT-L-14:laion2b_s32b_b82k. Fetched on first use; wins over weights.",
                ),
            ],
            outputs=[glue.CLIP.Output("clip", display_name="clip", tooltip="The CLIP, for Encode Prompt.")],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str, **others: Any) -> str:
        if weights == EMBEDDED or weights.endswith(FETCHED):
            return weights
        return glue.stamp(glue.path_of(glue.CLIP_FOLDER, weights))

    @classmethod
    def execute(cls, weights: str, architecture: str = "", other_tag: str = "") -> io.NodeOutput:
        with glue.engine():
            spec = other_tag.strip() or weights.removesuffix(FETCHED)
            if not other_tag.strip() and weights != EMBEDDED and not weights.endswith(FETCHED):
                path = glue.path_of(glue.CLIP_FOLDER, weights)
                spec = f"{architecture.strip() or architecture_of(path)}:{path}"
            clip = load_clip(glue.offload_context(glue.device_context("fp32")), spec, folder=glue.folder_of(glue.CLIP_FOLDER))
            return io.NodeOutput(glue.LoadedCLIP(clip, glue.manage(clip.model)))
