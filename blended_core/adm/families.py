"""Published families of ADM checkpoints, and defaults for networks of no family.

A family is determined from the shapes of the weights. Source: the table of published ADM checkpoints and their command lines in the READMEs of
improved-diffusion, guided-diffusion and P2-weighting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..diffusion import DiffusionConfig
from .unet import UNetConfig


@dataclass(frozen=True)
class Family:
    """A published kind of checkpoint: every known network of these shapes has these settings.

    Attributes:
        conditional: True or False if only networks with or without classes belong to the family; None if both do.
        unsure: settings in which members differ.
    """

    name: str
    unet: UNetConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    conditional: bool | None = None
    unsure: tuple[str, ...] = ()

    def has(self, facts: Mapping[str, Any]) -> bool:
        """Whether a network belongs to the family, by the settings that its shapes determine."""
        own = self.unet.to_dict()
        same = all(facts[name] == own[name] for name in facts if name != "num_classes")
        return same and self.conditional in (None, facts["num_classes"] is not None)


MULT_32, MULT_64, MULT_128 = (1, 2, 2, 2), (1, 2, 3, 4), (1, 1, 2, 3, 4)
MULT_256, MULT_512 = (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
SIZE_OF_MULT: dict[tuple[float, ...], int] = {MULT_32: 32, MULT_64: 64, MULT_128: 128, MULT_256: 256, MULT_512: 512}
"""channel_mult → image_size, as guided-diffusion and improved-diffusion choose the one for the other."""


def _network(
    size: int, channels: int, mult: tuple[float, ...], blocks: int, attention: tuple[int, ...], updown: bool, scale_shift: bool, **rest: Any
) -> UNetConfig:
    return UNetConfig(
        image_size=size, model_channels=channels, channel_mult=mult, num_res_blocks=blocks, attention_downsampling=attention,
        resblock_updown=updown, use_scale_shift_norm=scale_shift, **rest,
    )  # fmt: skip


COSINE_4000 = DiffusionConfig("cosine", steps=4000, rescale_timesteps=True)
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
    Family("improved-diffusion ImageNet 64 px", _network(64, 128, MULT_64, 3, (4, 8), False, True, num_heads=4), COSINE_4000),
    Family("improved-diffusion ImageNet 64 px, large", _network(64, 192, MULT_64, 3, (4, 8), False, True, num_heads=4), COSINE_4000),
    Family("improved-diffusion CIFAR-10", _network(32, 128, MULT_32, 3, (2, 4), False, True, num_heads=4), COSINE_4000),
)

KNOWN_FILES: dict[str, tuple[str, dict[str, Any]]] = {"9c111ab8": ("ADM 512 px, unconditional fine-tunes", {"objective": "eps"})}
"""First 8 digits of the SHA-256 of a published file → its family, and settings in which members of the family differ. Statements take precedence."""


def initial_settings(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Settings of a network before anything is stated.

    Args:
        facts: the settings that the shapes determine.

    Returns:
        (value of every setting, how each was decided: 'signature' (of a family), 'shapes' or 'default', the name of the family or None).
    """
    family = next((f for f in FAMILIES if f.has(facts)), None)
    if family is not None:
        values = {**family.diffusion.to_dict(), **family.unet.to_dict()}
        sources = {name: "default" if name in family.unsure else "signature" for name in values}
    else:
        values = {**DiffusionConfig().to_dict(), **UNetConfig(num_head_channels=None).to_dict()}
        sources = dict.fromkeys(values, "default")
        values.update(_default_heads(facts))
        if facts["channel_mult"] in SIZE_OF_MULT:
            values["image_size"] = SIZE_OF_MULT[facts["channel_mult"]]
            sources["image_size"] = "signature"
        else:  # the smallest resolution of most networks is 8×8
            values["image_size"] = 8 * 2 ** (len(facts["channel_mult"]) - 1)
    if facts["out_channels"] == 2 * facts["in_channels"]:
        values["variance"], sources["variance"] = "learned_range", "shapes"
    else:
        values["variance"], sources["variance"] = "fixed_large", "default"
    return {**values, **facts}, {**sources, **dict.fromkeys(facts, "shapes")}, family.name if family else None


def _default_heads(facts: Mapping[str, Any]) -> dict[str, int]:
    """The number of heads that similar networks mostly have, if the channels allow it."""
    resolutions = enumerate(facts["channel_mult"])
    attended = [m for i, m in resolutions if 2**i in facts["attention_downsampling"]] + [facts["channel_mult"][-1]]
    widths = [int(m * facts["model_channels"]) for m in attended]
    if facts["resblock_updown"] and (facts["model_channels"] >= 192 or facts["num_res_blocks"] == 1) and not any(w % 64 for w in widths):
        return {"num_head_channels": 64}
    return {"num_heads": 4 if facts["use_scale_shift_norm"] and not any(w % 4 for w in widths) else 1}
