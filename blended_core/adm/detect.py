"""From the names and shapes of the tensors in a file to the architecture and the process of its network.

The shapes determine most of the architecture. What they leave open (attention heads, the order of qkv, the noise schedule, the objective, the training
size) is taken from the first of these sources: the caller, the metadata of the file, a sidecar file, the published family with these shapes, a default.
Every setting records its source. No tensor is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..diffusion import DiffusionConfig
from ..errors import BlendedError
from ..weights.sets import WeightSet, choose_set, weight_sets
from .families import KNOWN_FILES, initial_settings
from .probe import ProbeResult
from .settings import read_settings, resolve_settings
from .unet import UNetConfig

Shapes = Mapping[str, Sequence[int]]

ANCHOR = "time_embed.0.weight"
"""A tensor that every ADM network has, and no other network under this name."""
DECODER = "output_blocks."
"""Beginning of the names of the second half of a network, which a classifier lacks."""
ADVICE = "Use a pixel-space ADM checkpoint such as guided-diffusion's 256x256_diffusion_uncond.pt, or 'embedded'."
MAX_RESOLUTIONS = 16
"""More than any network has: an image of 2¹⁶ pixels."""
LATENT = r"(^|\.)(first_stage_model|cond_stage_model|conditioner)\."
LATENT_MODEL = f"it is a latent diffusion model (Stable Diffusion or similar), which generates latents, not pixels. {ADVICE}"


@dataclass(frozen=True)
class Detection:
    """The settings of a checkpoint and how each was decided.

    Attributes:
        weights: the set of weights that is used.
        sources: setting → 'shapes', 'signature' (of a family), 'metadata', 'sidecar', 'override', 'file' (a published file, identified by its hash),
            'probe' or 'default' (a guess).
        family: the published family with these shapes, or None.
        probe: the result of the calibration probe if it was run.
        sets: every set of weights in the file, the preferred one first.
        guidance_scale: recommended for edits, where one is stated (:meth:`~blended_core.options.GuidanceOptions.scale_for`).
    """

    weights: WeightSet = field(repr=False)
    unet: UNetConfig
    diffusion: DiffusionConfig
    sources: Mapping[str, str]
    family: str | None
    probe: ProbeResult | None = None
    guidance_scale: float | None = None
    sets: tuple[WeightSet, ...] = field(default=(), repr=False)

    @property
    def prefix(self) -> str:
        """Before the names of the network's tensors in the file."""
        return self.weights.prefix

    @property
    def settings(self) -> dict[str, tuple[Any, str]]:
        """{setting: (value, source)}, those of the network first."""
        values = {**self.unet.to_dict(), **self.diffusion.to_dict()}
        if self.guidance_scale is not None:
            values["guidance_scale"] = self.guidance_scale
        return {name: (value, self.sources[name]) for name, value in values.items()}

    @property
    def guessed(self) -> tuple[str, ...]:
        """The settings that change results and are only a guess."""
        heads = "num_heads" if self.unet.num_head_channels is None else "num_head_channels"
        relevant = [heads, "use_new_attention_order", "image_size", "schedule", "steps", "objective"]
        if self.diffusion.steps != 1000:  # rescaling maps other lengths to 1000, and does not change 1000
            relevant.append("rescale_timesteps")
        if not self.unet.learn_sigma:
            relevant.append("variance")
        return tuple(name for name in relevant if self.sources[name] == "default")

    @property
    def open_settings(self) -> tuple[str, ...]:
        """The guessed settings, and the guessed settings whose effect depends on them."""
        groups = ({"num_heads", "num_head_channels", "use_new_attention_order"}, {"schedule", "steps", "rescale_timesteps"})
        names = set(self.guessed)
        for group in groups:
            if names & group:
                names |= {name for name in group if self.sources[name] == "default"}
        return tuple(sorted(names))

    def decided(self, settings: Mapping[str, Any], source: str) -> Detection:
        """With values for some settings, and the source of these values."""
        unet, diffusion = ({f.name for f in fields(kind)} for kind in (UNetConfig, DiffusionConfig))
        return replace(
            self,
            unet=replace(self.unet, **{k: v for k, v in settings.items() if k in unet}),
            diffusion=replace(self.diffusion, **{k: v for k, v in settings.items() if k in diffusion}),
            sources={**self.sources, **dict.fromkeys(settings, source)},
        )

    def known_settings(self, digest: str) -> dict[str, Any]:
        """The guessed settings that are known for a published file with this SHA-256."""
        family, settings = KNOWN_FILES.get(digest[:8], ("", {}))
        return {k: v for k, v in settings.items() if k in self.guessed} if family == self.family else {}


def detect(
    shapes: Shapes,
    overrides: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    sidecar: Mapping[str, Any] | None = None,
    weights: str = "",
) -> Detection:
    """The settings of the network in a file.

    Args:
        shapes: name → shape of every tensor in the file.
        overrides, metadata, sidecar: settings as for :func:`read_settings`, in descending order of precedence.
        weights: name of a set of weights (:func:`network_sets`); '' for the preferred one.

    Raises:
        BlendedError: if the file holds no complete ADM network for RGB images (the text says what it holds instead), or if a stated setting is
            unknown or contradicts the shapes.
    """
    sets = network_sets(shapes)
    if not sets:
        raise BlendedError(foreign(shapes))
    chosen = choose_set(sets, str(weights)) if weights else sets[0]
    table = table_of(shapes, chosen)
    if reason := why_not(shapes, table):
        raise BlendedError(reason)
    facts = settings_of_shapes(table)
    values, sources, family = initial_settings(facts)
    for source, given in (("sidecar", sidecar), ("metadata", metadata), ("override", overrides)):
        stated = read_settings(given or {}, source)
        stated = resolve_settings(stated, facts, stated.get("image_size", values["image_size"]), source)
        values.update(stated)
        sources.update({name: source for name in stated if name not in facts})
    if values["num_head_channels"] is not None and sources["num_heads"] in ("signature", "default"):
        values["num_heads"] = UNetConfig.num_heads  # not used then; the default avoids a number without meaning
    learned = facts["out_channels"] == 2 * facts["in_channels"]
    if learned != (values["variance"] == "learned_range"):
        use = "learned_range" if learned else "fixed_small or fixed_large"
        raise BlendedError(
            f"the {sources['variance']} sets the variance to {values['variance']!r}, but the network has {facts['out_channels']} "
            f"output channels; use {use}, or remove the setting.",
            option="overrides",
        )
    unet = UNetConfig(**{f.name: values[f.name] for f in fields(UNetConfig)})
    diffusion = DiffusionConfig(**{f.name: values[f.name] for f in fields(DiffusionConfig)})
    return Detection(chosen, unet, diffusion, sources, family, guidance_scale=values.get("guidance_scale"), sets=sets)


# --- the network among the tensors of a file --------------------------------------------------------------------------


def network_sets(shapes: Shapes) -> tuple[WeightSet, ...]:
    """The sets of weights of ADM networks in a file, the preferred one first: complete networks precede encoders, averaged weights trained ones."""
    return weight_sets(shapes, ANCHOR, (DECODER,))


def table_of(shapes: Shapes, weights: WeightSet) -> dict[str, tuple[int, ...]]:
    """The shapes of a set of weights by the network's own names."""
    return {name: tuple(shapes[key]) for name, key in weights.names.items()}


def foreign(shapes: Shapes) -> str:
    """What a file without an ADM network holds, as the text of an error."""

    def some(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in shapes)

    if not shapes:
        return f"it holds no tensors. {ADVICE}"
    if some(LATENT):
        return LATENT_MODEL
    if some(r"(^|\.)state\.\d+\."):
        return (
            "it is the state of an optimizer (such as opt008100.pt), not a network. Use the file with the weights, usually in the same folder, "
            "preferably the one named ema_*.pt."
        )
    if some(r"(^|\.)(encoder|decoder)\.(down|up)\.\d+\.block\."):
        return f"it is an autoencoder of a latent diffusion model. {ADVICE}"
    if some(r"(^|\.)conv_in\.weight$") and some(r"(^|\.)down\.0\.block\."):
        return (
            "it is a DDPM in the layout of the first PyTorch port (conv_in, down.0.block), which SDEdit and DDRM use and which has another "
            f"architecture. {ADVICE}"
        )
    if some(r"(^|\.)map_layer[01]\.|(^|\.)enc\.\d+x\d+_"):
        return f"it is an EDM network (Karras et al.), trained on continuous noise levels without a schedule of steps. {ADVICE}"
    if some(r"(^|\.)down_blocks\.\d+\."):
        return f"it is a network in the layout of the diffusers library. {ADVICE}"
    if some(r"(^|\.)shadow_params\.\d+$") or any(key.endswith(ANCHOR.replace(".", "")) for key in shapes):
        return "it holds averaged weights whose names were left out, without the network that they belong to. Use a file that holds both."
    first = ", ".join(name[:60] for name in sorted(shapes)[:3])
    return f"it holds no ADM network: no tensor is named {ANCHOR} (the first names are {first}). {ADVICE}"


def why_not(shapes: Shapes, table: Shapes) -> str | None:
    """Why a network is no ADM network for RGB images, as the text of an error; None if it is one.

    Args:
        shapes: of all tensors in the file.
        table: of the network, by its own names.
    """
    if any(re.search(LATENT, key) for key in shapes):
        return LATENT_MODEL
    if any(re.match(r"(transformer|token_embedding|transformer_proj|final_ln)\b", k) or ".encoder_kv." in k for k in table):
        return f"it is GLIDE or similar, a network with text input. {ADVICE}"
    if any(".transformer_blocks." in key for key in table):
        return f"it is the network of a latent diffusion model (Stable Diffusion or similar), which generates latents, not pixels. {ADVICE}"
    if not any(key.startswith(DECODER) for key in table):
        return f"it is a classifier of noisy images: it has an encoder but no output_blocks. {ADVICE}"
    channels = _size(table, "input_blocks.0.0.weight", 1, 4)
    if channels == 6:
        return f"it is an upsampler: its 6 input channels take a small image beside the noisy one. {ADVICE}"
    if channels in (4, 8, 9):
        return f"it has {channels} input channels, so it is a latent diffusion model, which generates latents, not pixels. {ADVICE}"
    if channels != 3:
        return f"it has {channels} input channels; only networks for RGB images, with 3, are supported. {ADVICE}"
    if any(key.endswith(".qkv.weight") and len(shape) == 4 for key, shape in table.items()):
        return (
            "it is a consistency model or an EDM network in the layout of consistency_models (4-dimensional qkv weights), "
            f"trained on continuous noise levels without a schedule of steps. {ADVICE}"
        )
    return None


# --- what the shapes determine ----------------------------------------------------------------------------------------


def _size(table: Shapes, key: str, axis: int, dimensions: int) -> int:
    """One size of a tensor; BlendedError if the tensor is missing or has another number of dimensions."""
    shape = table.get(key)
    if shape is None:
        raise BlendedError(f"it looks like an ADM network, but {key} is missing. The file is damaged or incomplete: download it again.")
    if len(shape) != dimensions or min(shape) < 1:
        raise BlendedError(
            f"it looks like an ADM network, but {key} has the shape {tuple(shape)} instead of {dimensions} positive numbers. The file "
            "is damaged, or stored in an unknown format: download the original."
        )
    return shape[axis]


def settings_of_shapes(table: Shapes) -> dict[str, Any]:
    """The settings of :class:`UNetConfig` that the shapes determine. ``table`` has the network's own names, without a prefix."""
    channels = _size(table, ANCHOR, 1, 2)
    outputs, inputs = _indices(table, "output_blocks"), _indices(table, "input_blocks")
    # A ResBlock that downsamples has the same tensors as any other, so resolutions are counted in the output half: the last block of a resolution
    # holds a second ResBlock or a convolution. Resampling without weights leaves gaps in the numbers of the input blocks instead.
    ends = sorted(i for i in outputs if any(f"output_blocks.{i}.{k}.{n}.weight" in table for k in (1, 2) for n in ("in_layers.0", "conv")))
    gaps = max(inputs, default=0) + 1 - len(inputs)
    resolutions = 1 + (len(ends) or gaps)
    blocks = ends[0] if ends else len(outputs) // resolutions - 1
    count = resolutions * (blocks + 1)
    if len(outputs) != count or max(outputs) != count - 1 or blocks < 1 or resolutions > MAX_RESOLUTIONS:
        raise BlendedError(
            f"it looks like an ADM network, but its {len(outputs)} output_blocks do not divide into {resolutions} resolutions with the same "
            "number of blocks. The file is damaged or incomplete: download it again."
        )
    starts = [1 + i * (blocks + 1) for i in range(resolutions)]
    widths = [_size(table, f"input_blocks.{i}.0.out_layers.3.weight", 0, 4) for i in starts]
    down = f"input_blocks.{blocks + 1}.0"
    updown = resolutions > 1 and f"{down}.in_layers.0.weight" in table
    facts: dict[str, Any] = {
        "model_channels": channels,
        "channel_mult": tuple(width // channels if width % channels == 0 else width / channels for width in widths),
        "num_res_blocks": blocks,
        "attention_downsampling": tuple(2**n for n, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in table),
        "in_channels": _size(table, "input_blocks.0.0.weight", 1, 4),
        "out_channels": _size(table, "out.2.weight", 0, 4),
        "num_classes": _size(table, "label_emb.weight", 0, 2) if "label_emb.weight" in table else None,
        "use_scale_shift_norm": _size(table, "input_blocks.1.0.emb_layers.1.weight", 0, 2) == 2 * widths[0],
        "resblock_updown": updown,
    }
    if resolutions > 1 and not updown:  # conv_resample has no effect where ResBlocks resample or nothing does
        facts["conv_resample"] = f"{down}.op.weight" in table
    return facts


def _indices(table: Shapes, name: str) -> set[int]:
    return {int(m[1]) for key in table if (m := re.match(rf"{name}\.(\d{{1,6}})\.", key))}
