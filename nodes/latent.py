"""A noisy picture knows its level: what the pack's LATENT carries from node to node.

Beside ``samples`` [B, 3, S, S] in −1..1 (noisy) a LATENT of ours has one key, :data:`KEY`, with a :class:`Level`. Other nodes
pass the key on without looking at it, also where it stops being true. So it holds a fingerprint of every row: a row that
carries a known one is at that level and belongs to that picture, whatever was repeated, taken out or joined in between; any
other row was changed, and is refused with a sentence. The numbers of the candidates travel in ComfyUI's own ``batch_index``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blended_core.diffusion import DiffusionConfig
from ..blended_core.errors import BlendedError
from ..blended_core.mask import binary_mask, soft_mask
from ..blended_core.region import Region
from ..blended_core.schedule import CLEAN, Schedule

KEY = "blended_diffusion"

Latent = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Which picture a row shows, and which candidate of it the row is."""

    picture: int
    candidate: int


@dataclass(frozen=True, eq=False)
class Level:
    """Where on its way a noisy picture is, and what it was made from.

    Attributes:
        process, respacing: the noise schedule.
        index: of the level; CLEAN for a finished picture. start: where the edit began.
        seed: of all draws.
        region: the square of the picture that the samples show.
        soft: whether greys of the mask matter.
        sources: the pictures' regions before the edit [P, 3, S, S] in −1..1.
        masks: as they came with the picture [P or 1, 1, H, W], as the edit uses them, or None.
        rows: by fingerprint.
    """

    process: DiffusionConfig
    respacing: str
    index: int
    start: int
    seed: int
    region: Region
    soft: bool
    sources: Tensor
    masks: Tensor | None
    rows: Mapping[str, Row] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """The respaced process."""
        return self.process.respaced(self.respacing)

    @property
    def clean(self) -> bool:
        """Whether no noise is left."""
        return self.index == CLEAN

    @property
    def size(self) -> int:
        """Side of the samples in pixels."""
        return int(self.sources.shape[-1])

    def __str__(self) -> str:
        if self.clean:
            return "clean"
        return f"level {self.index + 1} of {len(self.schedule)}, timestep {int(self.schedule.timestep_map[self.index])} of {self.process.steps}"


@dataclass(frozen=True, eq=False)
class Noisy:
    """A LATENT that was found to be true.

    Attributes:
        latent: the dictionary that it came in.
        samples: [B, 3, S, S] float32.
        level: of all rows.
        pictures, candidates: of each row.
    """

    latent: Latent
    samples: Tensor
    level: Level
    pictures: tuple[int, ...]
    candidates: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sources(self) -> Tensor:
        """The region of each row's picture before the edit [B, 3, S, S]."""
        return self.level.sources[list(self.pictures)]

    def rows_of(self, values: Tensor, what: str) -> Tensor:
        """Values given once, or for each picture, or for each row; → [1 or B, …]."""
        count = len(values)
        if count == 1 or count == len(self):
            return values
        if count == len(self.level.sources):
            return values[list(self.pictures)]
        raise BlendedError(
            f"{count} {what} were given for a LATENT of {len(self)} rows from {len(self.level.sources)} pictures; give one, one for "
            "each picture, or one for each row."
        )

    def mask(self, given: Tensor | None) -> Tensor | None:
        """The mask in the frame of the samples, [1 or B, 1, S, S]; the one given, else the LATENT's ``noise_mask``, else None.

        Args:
            given: [M, 1, H, W] in the frame of the whole picture; another size is stretched over it. A noise mask of the
                samples' size is in their frame already, and one of another size is stretched over them, as KSampler does.
        """
        region, size, soft = self.level.region, self.level.size, self.level.soft
        if given is None:
            noise_mask = self.latent.get("noise_mask")
            if noise_mask is None:
                return None
            values = used_mask(four_dimensional(noise_mask), soft)
            shape = tuple(values.shape[-2:])
            if shape == (region.height, region.width) and shape != (size, size):
                values = region.cut_mask(values, size, soft)
            elif shape != (size, size):
                values = used_mask(F.interpolate(values, size=(size, size), mode="bilinear", align_corners=False), soft)
            return self.rows_of(values, "noise masks")
        full = fit_mask(given, region.height, region.width, soft)
        return self.rows_of(region.cut_mask(full, size, soft), "masks")

    def moved(self, samples: Tensor, index: int) -> Latent:
        """The LATENT with other samples at another level."""
        return pack(samples, replace(self.level, index=index), self.pictures, self.candidates, self.latent)


def pack(
    samples: Tensor, level: Level, pictures: tuple[int, ...], candidates: tuple[int, ...], base: Mapping[str, Any] | None = None
) -> Latent:
    """A LATENT of ours from its parts; ``base`` gives what else travels with it."""
    rows = zip(samples, pictures, candidates, strict=True)
    known = {fingerprint(row): Row(picture, candidate) for row, picture, candidate in rows}
    return {**(base or {}), "samples": samples, "batch_index": list(candidates), KEY: replace(level, rows=known)}


def unpack(latent: Latent, wants: str) -> Noisy:
    """The noisy picture of a LATENT, its key checked against its samples.

    Args:
        latent: from any node.
        wants: what needs the level, for the error: "CLIP Guidance Step".

    Raises:
        BlendedError: if the LATENT has no key of ours, or it does not tell the truth about a row.
    """
    samples, level = latent.get("samples"), latent.get(KEY)
    if not isinstance(samples, Tensor):
        raise BlendedError(f"{wants} got a LATENT without samples; wire one from Noise Background.")
    if not isinstance(level, Level):
        raise BlendedError(
            f"{wants} needs a LATENT that knows its noise level, and this one ({shape_of(samples)}) does not: begin with Noise "
            "Background. (Save Latent, Load Latent and Rebatch Latents lose the level; LATENTs of a VAE never have one.)"
        )
    if samples.ndim != 4 or tuple(samples.shape[1:]) != tuple(level.sources.shape[1:]):
        raise BlendedError(
            f"the LATENT at {wants} has the shape {shape_of(samples)}, but its level was set for rows of {shape_of(level.sources[0])}: "
            "another node cut or scaled it. Scale the picture before Noise Background, or after Final Paste."
        )
    samples = samples.to(torch.float32)
    found = [level.rows.get(fingerprint(row)) for row in samples]
    foreign = [str(i + 1) for i, row in enumerate(found) if row is None]
    if foreign:
        raise BlendedError(
            f"row {', '.join(foreign)} of the {len(found)} in the LATENT at {wants} is not what its note ({level}) was written "
            "for: another node changed the samples, or joined LATENTs of different edits. Blend with Blend Latents; join pictures "
            "after Final Paste."
        )
    rows = [row for row in found if row is not None]
    index = latent.get("batch_index")
    numbers = tuple(int(i) for i in index) if isinstance(index, (list, tuple)) and len(index) == len(rows) else None
    candidates = numbers or tuple(row.candidate for row in rows)
    return Noisy(latent, samples, level, tuple(row.picture for row in rows), candidates)


def same_level(foreground: Noisy, background: Noisy) -> None:
    """Raises BlendedError, naming both, unless two noisy pictures may be blended."""
    a, b = foreground.level, background.level
    if (a.process, a.respacing) != (b.process, b.respacing):
        raise BlendedError(
            f"the foreground is at {a} ({a.process.schedule} schedule) and the background at {b} ({b.process.schedule} schedule): two "
            "different ways down. Both must come from one Noise Background (start)."
        )
    if a.index != b.index:
        raise BlendedError(
            f"the foreground is at {a} and the background at {b}; take the background from Noise Background in its mode match, wired to "
            "the LATENT that CLIP Guidance Step gives."
        )
    if a.region != b.region or a.size != b.size:
        raise BlendedError(
            f"foreground and background show different parts of the picture ({a.region} and {b.region}); begin both with one Noise "
            "Background."
        )


def fingerprint(row: Tensor) -> str:
    """Of the values of one row, as float32."""
    values = row.detach().to("cpu", torch.float32).contiguous()
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=12).hexdigest()


def shape_of(tensor: Tensor) -> str:
    """'4×3×64×64'."""
    return "×".join(str(n) for n in tensor.shape)


def four_dimensional(mask: Tensor) -> Tensor:
    """A MASK or noise mask of any rank as [M, 1, H, W] float32."""
    if mask.ndim < 2:
        raise BlendedError(f"the mask has the shape {shape_of(mask)}; a MASK is [batch, height, width].")
    return mask.detach().reshape(-1, 1, *mask.shape[-2:]).to("cpu", torch.float32)


def used_mask(mask: Tensor, soft: bool) -> Tensor:
    """Thresholded, unless its greys matter."""
    return soft_mask(mask) if soft else binary_mask(mask)


def fit_mask(mask: Tensor, height: int, width: int, soft: bool) -> Tensor:
    """A mask at a picture's size, as the edit uses it; [M, 1, h, w] → [M, 1, height, width]."""
    if tuple(mask.shape[-2:]) != (height, width):
        mask = F.interpolate(mask, size=(height, width), mode="bilinear", align_corners=False)
    return used_mask(mask, soft)
