"""From the names and shapes of a file's tensors to what the network is and how it was trained.

Shapes say how the network is built. What they cannot say (heads, the order of qkv, the noise schedule, what the output
stands for, the training size) comes from whoever states it, in this order: the caller, the file's metadata, a sidecar
file; then from the signature of a published family of checkpoints; then from a guess. Every setting remembers which.

No tensor is read here. Source of the families: the table of published ADM checkpoints and their command lines in the
READMEs of improved-diffusion, guided-diffusion and P2-weighting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ..diffusion import DiffusionConfig
from ..errors import BlendedError
from .unet import UNetConfig

if TYPE_CHECKING:
    from .probe import Probe

Shapes = Mapping[str, Sequence[int]]

ANCHOR = "time_embed.0.weight"  # in every ADM network, and there alone under this name
WANTED = "Use a pixel-space ADM checkpoint such as guided-diffusion's 256x256_diffusion_uncond.pt, or 'embedded'."


@dataclass(frozen=True)
class Detection:
    """What a checkpoint is, and how that is known.

    ``prefix`` stands before the names of the network's tensors. ``sources`` has one word for each setting of ``unet`` and
    ``diffusion``: 'shapes', 'signature', 'metadata', 'sidecar', 'override', 'file' (a published file, known by its hash), 'probe'
    or 'default' (a guess). ``family`` is the published family whose signature the network has, or None. ``probe`` is what the
    calibration probe found, where it was asked.
    """

    prefix: str
    unet: UNetConfig
    diffusion: DiffusionConfig
    sources: Mapping[str, str]
    family: str | None
    probe: Probe | None = None

    @property
    def open_settings(self) -> tuple[str, ...]:
        """The guessed settings, and those that hang together with them and are guessed too, though their value changes nothing yet."""
        together = ({"num_heads", "num_head_channels", "use_new_attention_order"}, {"schedule", "steps", "rescale_timesteps"})
        names = set(self.guessed)
        for group in together:
            if names & group:
                names |= {name for name in group if self.sources[name] == "default"}
        return tuple(sorted(names))

    def decided(self, settings: Mapping[str, Any], source: str) -> Detection:
        """With values for some settings, and where they come from."""
        unet, diffusion = ({f.name for f in fields(kind)} for kind in (UNetConfig, DiffusionConfig))
        return replace(
            self,
            unet=replace(self.unet, **{k: v for k, v in settings.items() if k in unet}),
            diffusion=replace(self.diffusion, **{k: v for k, v in settings.items() if k in diffusion}),
            sources={**self.sources, **dict.fromkeys(settings, source)},
        )

    @property
    def settings(self) -> dict[str, tuple[Any, str]]:
        """{setting: (value, how it was decided)}, the network's first."""
        values = {**self.unet.to_dict(), **self.diffusion.to_dict()}
        return {name: (value, self.sources[name]) for name, value in values.items()}

    @property
    def guessed(self) -> tuple[str, ...]:
        """The settings that change the pictures and that nothing but a guess has decided."""
        heads = "num_heads" if self.unet.num_head_channels is None else "num_head_channels"
        telling = [heads, "use_new_attention_order", "image_size", "schedule", "steps", "objective"]
        if self.diffusion.steps != 1000:  # rescaling brings other lengths to 1000, and leaves 1000 as it is
            telling.append("rescale_timesteps")
        if not self.unet.learn_sigma:
            telling.append("variance")
        return tuple(name for name in telling if self.sources[name] == "default")


@dataclass(frozen=True)
class Family:
    """A published kind of checkpoint: a network of these shapes has, as far as anybody knows, all these settings.

    ``conditional``: True or False if only such networks with or without classes belong here. ``unsure`` names settings in
    which members differ.
    """

    name: str
    unet: UNetConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    conditional: bool | None = None
    unsure: tuple[str, ...] = ()


MULT_32, MULT_64, MULT_128 = (1, 2, 2, 2), (1, 2, 3, 4), (1, 1, 2, 3, 4)
MULT_256, MULT_512 = (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
SIZE_OF_MULT: dict[tuple[float, ...], int] = {MULT_32: 32, MULT_64: 64, MULT_128: 128, MULT_256: 256, MULT_512: 512}


def _network(
    size: int, channels: int, mult: tuple[float, ...], blocks: int, attention: tuple[int, ...], updown: bool, scale_shift: bool, **rest: Any
) -> UNetConfig:
    return UNetConfig(
        image_size=size, model_channels=channels, channel_mult=mult, num_res_blocks=blocks, attention_downsampling=attention,
        resblock_updown=updown, use_scale_shift_norm=scale_shift, **rest,
    )  # fmt: skip


_LONG = DiffusionConfig("cosine", steps=4000, rescale_timesteps=True)
FAMILIES = (
    Family("ADM 256 px (OpenAI, LSUN, RePaint)", _network(256, 256, MULT_256, 2, (8, 16, 32), True, True, num_head_channels=64)),
    Family(
        "ADM 512 px, class-conditional (OpenAI)",
        _network(512, 256, MULT_512, 2, (16, 32, 64), True, True, num_head_channels=64),
        conditional=True,
    ),
    Family(
        "ADM 512 px, unconditional fine-tunes",
        _network(512, 256, MULT_512, 2, (16, 32, 64), True, True, num_head_channels=64),
        conditional=False,
        unsure=("objective",),  # the one trained on OpenImages predicts v
    ),
    Family("ADM 128 px (OpenAI)", _network(128, 256, MULT_128, 2, (4, 8, 16), True, True, num_heads=4)),
    Family(
        "ADM 64 px (OpenAI)",
        _network(64, 192, MULT_64, 3, (2, 4, 8), True, True, num_head_channels=64, use_new_attention_order=True),
        DiffusionConfig("cosine"),
    ),
    Family("small ADM 512 px (portraits and others)", _network(512, 128, MULT_512, 2, (16, 32, 64), True, True, num_heads=4)),
    Family("small ADM 256 px (ukiyo-e and others)", _network(256, 128, MULT_256, 2, (8, 16, 32), True, True, num_heads=4)),
    Family(
        "improved-diffusion LSUN 256 px and its fine-tunes (pixel art and others)", _network(256, 128, MULT_256, 2, (16,), False, False)
    ),
    Family("P2-weighting 256 px (FFHQ and others)", _network(256, 128, MULT_256, 1, (16,), True, True, num_head_channels=64)),
    Family("improved-diffusion ImageNet 64 px", _network(64, 128, MULT_64, 3, (4, 8), False, True, num_heads=4), _LONG),
    Family("improved-diffusion ImageNet 64 px, large", _network(64, 192, MULT_64, 3, (4, 8), False, True, num_heads=4), _LONG),
    Family("improved-diffusion CIFAR-10", _network(32, 128, MULT_32, 3, (2, 4), False, True, num_heads=4), _LONG),
)


# Published files, by the beginning of their SHA-256, that belong to a family whose members differ. A hint, which a statement beats.
KNOWN_FILES: dict[str, tuple[str, dict[str, Any]]] = {"9c111ab8": ("ADM 512 px, unconditional fine-tunes", {"objective": "eps"})}


def settings_of_file(found: Detection, digest: str) -> dict[str, Any]:
    """What is known of a published file with that SHA-256, of the settings that are still a guess."""
    family, settings = KNOWN_FILES.get(digest[:8], ("", {}))
    return {k: v for k, v in settings.items() if k in found.guessed} if family == found.family else {}


def detect(
    shapes: Shapes,
    overrides: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    sidecar: Mapping[str, Any] | None = None,
) -> Detection:
    """What the network in a file is.

    Args:
        shapes: name → shape of every tensor in the file, names as they stand there.
        overrides, metadata, sidecar: settings by the names of :class:`UNetConfig` and :class:`DiffusionConfig` or by the
            flags of guided-diffusion (see :func:`read_settings`), the strongest first.

    Raises:
        BlendedError: if the file holds no ADM network that draws RGB pictures (the sentence says what it holds
            instead), if the network is incomplete, or if a stated setting is unknown or contradicts the shapes.
    """
    prefix = find_prefix(shapes)
    refusal = why_not(shapes, prefix)
    if refusal or prefix is None:
        raise BlendedError(refusal or f"it holds no ADM network. {WANTED}")
    table = strip_prefix(shapes, prefix)
    facts = settings_of_shapes(table)
    values, sources, family = _unstated_settings(facts)
    values.update(facts)
    sources.update(dict.fromkeys(facts, "shapes"))
    for source, given in (("sidecar", sidecar), ("metadata", metadata), ("override", overrides)):
        stated = read_settings(given or {}, source)
        size = stated.get("image_size", values["image_size"])
        _resolve(stated, facts, size, source)
        values.update(stated)
        sources.update({name: source for name in stated if name not in facts})
    if values["num_head_channels"] is not None and sources["num_heads"] in ("signature", "default"):
        values["num_heads"] = UNetConfig.num_heads  # not used then, and a stray number would only puzzle a reader
    learned = facts["out_channels"] == 2 * facts["in_channels"]
    if learned != (values["variance"] == "learned_range"):
        use = "learned_range" if learned else "fixed_small or fixed_large"
        raise BlendedError(
            f"the {sources['variance']} sets the variance to {values['variance']!r}, but the network has {facts['out_channels']} "
            f"output channels; use {use}, or leave it out."
        )
    unet = UNetConfig(**{f.name: values[f.name] for f in fields(UNetConfig)})
    diffusion = DiffusionConfig(**{f.name: values[f.name] for f in fields(DiffusionConfig)})
    return Detection(prefix, unet, diffusion, sources, family)


# --- where the network is -------------------------------------------------------------------------------------------


def find_prefix(shapes: Shapes) -> str | None:
    """What stands before the names of the network's tensors: '' or e.g. 'ema.module.'; None if there is no network.

    Of several copies, whole networks go before encoders, averaged weights (EMA) before trained ones, then the shortest.
    """
    prefixes = _prefixes(shapes)
    whole = {key[: key.find("output_blocks.")] for key in shapes if "output_blocks." in key}

    def rank(prefix: str) -> tuple[bool, bool, int, str]:
        return prefix not in whole, re.search(r"(^|[._])ema([._]|$)", prefix) is None, len(prefix), prefix

    return min(prefixes, key=rank, default=None)


def strip_prefix(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The network's part of the table, by the network's own names. Other copies of it are left out."""
    copies = tuple(p for p in _prefixes(shapes) if p != prefix and p.startswith(prefix))
    return {
        key[len(prefix) :]: tuple(shape)
        for key, shape in shapes.items()
        if key.startswith(prefix) and not (copies and key.startswith(copies))
    }


def _prefixes(shapes: Shapes) -> list[str]:
    return [key[: -len(ANCHOR)] for key in shapes if key == ANCHOR or key.endswith("." + ANCHOR)]


def why_not(shapes: Shapes, prefix: str | None) -> str | None:
    """A sentence about a file that is something else than an ADM network for RGB pictures, or None."""

    def some(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in shapes)

    if not shapes:
        return f"it holds no tensors. {WANTED}"
    if some(r"(^|\.)(first_stage_model|cond_stage_model|conditioner)\."):
        return f"it is a latent diffusion model (Stable Diffusion or a relative), which draws codes, not pixels. {WANTED}"
    if prefix is None:
        if some(r"(^|\.)state\.\d+\."):
            return (
                "it is the state of an optimizer (a file such as opt008100.pt), not a network. Use the file with the weights "
                "that lies beside it, best the one named ema_*.pt."
            )
        if some(r"(^|\.)(encoder|decoder)\.(down|up)\.\d+\.block\."):
            return f"it is an autoencoder of a latent diffusion model. {WANTED}"
        if some(r"(^|\.)conv_in\.weight$") and some(r"(^|\.)down\.0\.block\."):
            return (
                "it is a DDPM in the layout of the first PyTorch port (conv_in, down.0.block), the one that SDEdit and DDRM use; "
                f"it is built differently. {WANTED}"
            )
        if some(r"(^|\.)map_layer[01]\.|(^|\.)enc\.\d+x\d+_"):
            return f"it is an EDM network (Karras et al.), trained on continuous noise levels without a schedule of steps. {WANTED}"
        if some(r"(^|\.)down_blocks\.\d+\."):
            return f"it is a network in the layout of the diffusers library. {WANTED}"
        first = ", ".join(sorted(shapes)[:3])
        return f"it holds no ADM network: nothing in it is named {ANCHOR} (its first entries are {first}). {WANTED}"

    table = strip_prefix(shapes, prefix)
    if any(re.match(r"(transformer|token_embedding|transformer_proj|final_ln)\b", k) or ".encoder_kv." in k for k in table):
        return f"it is GLIDE or a relative, whose network reads the text itself. {WANTED}"
    if any(".transformer_blocks." in key for key in table):
        return f"it is the network of a latent diffusion model (Stable Diffusion or a relative), which draws codes, not pixels. {WANTED}"
    if not any(key.startswith("output_blocks.") for key in table):
        return f"it is a classifier of noisy pictures: it has an encoder alone, no output_blocks. {WANTED}"
    channels = _size(table, "input_blocks.0.0.weight", 1, 4)
    if channels == 6:
        return f"it is an upsampler: its 6 input channels take a small picture beside the noisy one. {WANTED}"
    if channels in (4, 8, 9):
        return f"it takes {channels} input channels, so it is a latent diffusion model, which draws codes, not pixels. {WANTED}"
    if channels != 3:
        return f"it takes {channels} input channels; this package edits RGB pictures, which have 3. {WANTED}"
    if any(key.endswith(".qkv.weight") and len(shape) == 4 for key, shape in table.items()):
        return (
            "it is a consistency model or an EDM network in the layout of consistency_models (4-dimensional qkv weights), "
            f"trained on continuous noise levels without a schedule of steps. {WANTED}"
        )
    return None


# --- what shapes say ------------------------------------------------------------------------------------------------


def _size(table: Shapes, key: str, axis: int, dimensions: int) -> int:
    """One number of a shape, or a sentence."""
    shape = table.get(key)
    if shape is None:
        raise BlendedError(f"it looks like an ADM network, but {key} is missing. The file is damaged or incomplete: fetch it again.")
    if len(shape) != dimensions or min(shape) < 1:
        raise BlendedError(
            f"it looks like an ADM network, but {key} has the shape {tuple(shape)} instead of {dimensions} positive numbers. The file "
            "is damaged, or packed in a way that this package does not know: fetch the original."
        )
    return shape[axis]


def settings_of_shapes(table: Shapes) -> dict[str, Any]:
    """The settings of :class:`UNetConfig` that the shapes decide. ``table`` has the network's own names, without a prefix."""
    channels = _size(table, ANCHOR, 1, 2)
    outputs, inputs = _indices(table, "output_blocks"), _indices(table, "input_blocks")
    # A ResBlock that downsamples looks like any other, so levels are counted where they end on the way up: the last stage
    # of a level holds a second ResBlock or a convolution. Resampling without weights leaves gaps on the way down instead.
    ends = sorted(i for i in outputs if any(f"output_blocks.{i}.{k}.{n}.weight" in table for k in (1, 2) for n in ("in_layers.0", "conv")))
    gaps = max(inputs, default=0) + 1 - len(inputs)
    levels = 1 + (len(ends) or gaps)
    blocks = ends[0] if ends else len(outputs) // levels - 1
    if outputs != set(range(levels * (blocks + 1))) or blocks < 1:
        raise BlendedError(
            f"it looks like an ADM network, but its {len(outputs)} output_blocks do not divide into {levels} levels of equal depth. "
            "The file is damaged or incomplete: fetch it again."
        )
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [_size(table, f"input_blocks.{i}.0.out_layers.3.weight", 0, 4) for i in starts]
    down = f"input_blocks.{blocks + 1}.0"
    updown = levels > 1 and f"{down}.in_layers.0.weight" in table
    facts: dict[str, Any] = {
        "model_channels": channels,
        "channel_mult": tuple(width // channels if width % channels == 0 else width / channels for width in widths),
        "num_res_blocks": blocks,
        "attention_downsampling": tuple(2**level for level, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in table),
        "in_channels": _size(table, "input_blocks.0.0.weight", 1, 4),
        "out_channels": _size(table, "out.2.weight", 0, 4),
        "num_classes": _size(table, "label_emb.weight", 0, 2) if "label_emb.weight" in table else None,
        "use_scale_shift_norm": _size(table, "input_blocks.1.0.emb_layers.1.weight", 0, 2) == 2 * widths[0],
        "resblock_updown": updown,
    }
    if levels > 1 and not updown:  # where ResBlocks resample, or nothing does, conv_resample changes nothing
        facts["conv_resample"] = f"{down}.op.weight" in table
    return facts


def _indices(table: Shapes, name: str) -> set[int]:
    return {int(m[1]) for key in table if (m := re.match(rf"{name}\.(\d{{1,6}})\.", key))}


# --- what shapes do not say -----------------------------------------------------------------------------------------


def _unstated_settings(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """(all settings as the family or a guess has them, where each comes from, the family)."""
    family = next((f for f in FAMILIES if _belongs(facts, f)), None)
    if family is not None:
        values = {**family.diffusion.to_dict(), **family.unet.to_dict()}
        sources = {name: "default" if name in family.unsure else "signature" for name in values}
    else:
        values = {**DiffusionConfig().to_dict(), **UNetConfig(num_head_channels=None).to_dict()}
        sources = dict.fromkeys(values, "default")
        values.update(_guess_heads(facts))
        if facts["channel_mult"] in SIZE_OF_MULT:
            values["image_size"] = SIZE_OF_MULT[facts["channel_mult"]]
            sources["image_size"] = "signature"
        else:  # nearly all go down to 8×8
            values["image_size"] = 8 * 2 ** (len(facts["channel_mult"]) - 1)
    if facts["out_channels"] == 2 * facts["in_channels"]:
        values["variance"], sources["variance"] = "learned_range", "shapes"
    else:
        values["variance"], sources["variance"] = "fixed_large", "default"
    return values, sources, family.name if family else None


def _belongs(facts: Mapping[str, Any], family: Family) -> bool:
    has = family.unet.to_dict()
    same = all(facts[name] == has[name] for name in facts if name != "num_classes")
    return same and family.conditional in (None, facts["num_classes"] is not None)


def _guess_heads(facts: Mapping[str, Any]) -> dict[str, int]:
    """Heads as networks like this one mostly have them, if the widths allow."""
    levels = enumerate(facts["channel_mult"])
    attended = [m for level, m in levels if 2**level in facts["attention_downsampling"]] + [facts["channel_mult"][-1]]
    widths = [int(m * facts["model_channels"]) for m in attended]
    if facts["resblock_updown"] and (facts["model_channels"] >= 192 or facts["num_res_blocks"] == 1) and not any(w % 64 for w in widths):
        return {"num_head_channels": 64}
    return {"num_heads": 4 if facts["use_scale_shift_norm"] and not any(w % 4 for w in widths) else 1}


# --- what somebody states -------------------------------------------------------------------------------------------


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)) or int(value) < 1:
        raise ValueError
    return int(value)


def _optional(value: Any) -> int | None:
    """A whole number; None, 'none' and guided-diffusion's −1 mean that there is none."""
    return None if str(value).strip().lower() in ("none", "null", "", "-1") else _whole(value)


def _flag(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words[str(value).strip().lower()]


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value.strip()


def _numbers(value: Any) -> tuple[float, ...]:
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    numbers = tuple(float(part) for part in parts)
    return tuple(int(n) if n == int(n) else n for n in numbers)


SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "image_size": (_whole, "a whole number of pixels, at least 1"),
    "model_channels": (_whole, "a whole number from 1 on"),
    "channel_mult": (_numbers, "numbers separated by commas"),
    "num_res_blocks": (_whole, "a whole number from 1 on"),
    "attention_downsampling": (_numbers, "whole numbers separated by commas"),
    "in_channels": (_whole, "a whole number from 1 on"),
    "out_channels": (_whole, "a whole number from 1 on"),
    "num_classes": (_optional, "a whole number from 1 on, or none"),
    "num_heads": (_whole, "a whole number from 1 on"),
    "num_head_channels": (_optional, "a whole number from 1 on, or none"),
    "num_heads_upsample": (_optional, "a whole number from 1 on, or none"),
    "resblock_updown": (_flag, "true or false"),
    "use_scale_shift_norm": (_flag, "true or false"),
    "conv_resample": (_flag, "true or false"),
    "use_new_attention_order": (_flag, "true or false"),
    "schedule": (_word, "linear or cosine"),
    "steps": (_whole, "a whole number from 1 on"),
    "rescale_timesteps": (_flag, "true or false"),
    "objective": (_word, "eps, v or x0"),
    "variance": (_word, "learned_range, fixed_small or fixed_large"),
    # From here on flags of guided-diffusion that say the same in another way.
    "num_channels": (_whole, "a whole number from 1 on"),
    "attention_resolutions": (_numbers, "whole numbers of pixels separated by commas"),
    "learn_sigma": (_flag, "true or false"),
    "class_cond": (_flag, "true or false"),
    "noise_schedule": (_word, "linear or cosine"),
    "diffusion_steps": (_whole, "a whole number from 1 on"),
    "predict_xstart": (_flag, "true or false"),
    "sigma_small": (_flag, "true or false"),
}
RENAMED = {"num_channels": "model_channels", "noise_schedule": "schedule", "diffusion_steps": "steps"}
# Flags that a list of guided-diffusion's settings carries and that say nothing about the weights.
IGNORED = {"dropout", "use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas"}


def read_settings(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Stated settings under this package's names, checked for their type; values may be texts, as on a command line.

    Names are those of :class:`UNetConfig` and :class:`DiffusionConfig`, or guided-diffusion's flags: num_channels,
    attention_resolutions (in pixels), learn_sigma, class_cond, noise_schedule, diffusion_steps, predict_xstart,
    sigma_small. They may stand in the groups 'unet' and 'diffusion'. attention_resolutions, class_cond and sigma_small stay
    in the answer as they are, since their meaning depends on the network.

    Raises:
        BlendedError: for an unknown name, a value of the wrong kind, or one setting stated twice and differently.
    """
    flat: dict[str, Any] = {}
    for name, value in given.items():
        flat.update(value if name in ("unet", "diffusion") and isinstance(value, Mapping) else {name: value})
    stated: dict[str, Any] = {}
    for name, value in flat.items():
        if name in IGNORED or (name == "channel_mult" and value == ""):  # '' asks for the default of the size
            continue
        if name not in SETTINGS:
            raise BlendedError(
                f"the {source} sets {name!r}, which is no setting; known are {', '.join(SETTINGS)}. Correct it or leave it out."
            )
        convert, kind = SETTINGS[name]
        try:
            new = convert(value)
        except (ValueError, TypeError, KeyError, OverflowError):
            raise BlendedError(f"the {source} sets {name} to {value!r}; it must be {kind}.") from None
        target = RENAMED.get(name, name)
        if name == "learn_sigma":
            target, new = "out_channels", 6 if new else 3
        elif name == "predict_xstart":
            if not new and "objective" in flat:  # v is no x0 either
                continue
            target, new = "objective", "x0" if new else "eps"
        if stated.get(target, new) != new:
            raise BlendedError(f"the {source} sets {target} twice, to {stated[target]!r} and to {new!r}; leave one of them out.")
        stated[target] = new
    # A number of heads is meant, even if something weaker gives the channels of a head, which would win.
    if "num_heads" in stated:
        stated.setdefault("num_head_channels", None)
    return stated


def _resolve(stated: dict[str, Any], facts: Mapping[str, Any], image_size: int, source: str) -> None:
    """Brings the flags that depend on the network into this package's terms, and compares statements with facts."""
    small = stated.pop("sigma_small", None)
    if small is not None and facts["out_channels"] == facts["in_channels"]:  # a learned variance makes it meaningless
        stated.setdefault("variance", "fixed_small" if small else "fixed_large")
    conditional = stated.pop("class_cond", None)
    if conditional is not None and conditional != (facts["num_classes"] is not None):
        raise BlendedError(_contradiction(source, "class_cond", conditional, f"{facts['num_classes'] or 'no'} classes"))
    resolutions = stated.pop("attention_resolutions", None)
    if resolutions is not None:
        if any(r < 1 for r in resolutions):
            raise BlendedError(f"the {source} sets attention_resolutions to {resolutions}; they are pixels, at least 1.")
        stated.setdefault("attention_downsampling", tuple(image_size // r for r in resolutions))
    for name in facts.keys() & stated.keys():
        claim = stated[name]
        if name == "attention_downsampling":  # downsampling that the network never reaches changes nothing
            claim = tuple(sorted(d for d in set(claim) if d < 2 ** len(facts["channel_mult"]) and d in POWERS))
        if claim != facts[name]:
            also = f" ({resolutions} pixels of {image_size})" if resolutions is not None and name == "attention_downsampling" else ""
            raise BlendedError(_contradiction(source, name, f"{stated[name]}{also}", repr(facts[name])))
        stated[name] = facts[name]


POWERS = {2**i for i in range(32)}


def _contradiction(source: str, name: str, claim: object, fact: str) -> str:
    return f"the {source} says that {name} is {claim}, but the shapes of the weights say {fact}; correct it or leave it out."
