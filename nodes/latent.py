"""The LATENT of the pack, which knows its noise level.

In addition to ``samples`` [B, 3, S, S] in −1..1 (noisy), a LATENT of the pack has one key, :data:`KEY`, with an :class:`EditState`. Other nodes
pass the key on without reading it, even if they change the samples. Therefore the state holds a fingerprint of every row: a row with a known
fingerprint has the level and the source image of the state, even after rows were repeated, selected or joined; any other row was changed and is
refused with an error. The candidates' numbers travel in ComfyUI's own ``batch_index``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blended_core.diffusion import DiffusionConfig
from ..blended_core.edit import HIGHEST_OF_MASK, check_range
from ..blended_core.errors import BlendedError, BlendedWarning, Note
from ..blended_core.mask import EditMask
from ..blended_core.region import PictureRegion, same_aspect
from ..blended_core.schedule import CLEAN, Schedule

KEY = "blended_diffusion"
START_NODE = "Noise Background (start)"

Latent = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Row:
    """The source image of a row, by index, the row's candidate number, and x̂0 of the step before [3, S, S], if a multistep sampler needs it."""

    image: int
    candidate: int
    previous: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EditState:
    """The noise level of a LATENT, and the edit that it belongs to.

    Attributes:
        process, respacing: the noise schedule.
        level: index of the noise level; CLEAN at the end. start: the level at which the edit started.
        seed: seed of all random numbers.
        region: the square of the image that the samples show.
        soft: whether the mask is soft.
        sources: the regions of the source images [N, 3, S, S] in −1..1.
        masks: the masks of the source images [N or 1, 1, H, W], as the edit uses them, or None.
        rows: fingerprint → the rows with these samples, in order. Several masks of one image begin with the same samples.
        area: ``masks`` in the frame of the samples [N or 1, 1, S, S].
    """

    process: DiffusionConfig
    respacing: str
    level: int
    start: int
    seed: int
    region: PictureRegion
    soft: bool
    sources: Tensor
    masks: EditMask | None
    rows: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    area: EditMask | None = None

    @property
    def schedule(self) -> Schedule:
        """The respaced noise schedule."""
        return self.process.respaced(self.respacing)

    @property
    def clean(self) -> bool:
        """Whether no noise is left."""
        return self.level == CLEAN

    @property
    def size(self) -> int:
        """Side of the samples in pixels."""
        return int(self.sources.shape[-1])

    def __str__(self) -> str:
        if self.clean:
            return "clean"
        return f"level {self.level + 1} of {len(self.schedule)}, timestep {int(self.schedule.timestep_map[self.level])} of {self.process.steps}"

    def check_size(self, image: Tensor, name: str) -> None:
        """Raises BlendedError, naming both sizes, if an image [.., H, W] has another size than the source images."""
        height, width = image.shape[-2:]
        if (height, width) != (self.region.height, self.region.width):
            raise BlendedError(
                f"the {name} is {width}×{height} and the edit was started with an image of {self.region.width}×{self.region.height}; connect "
                "the image that is connected to Noise Background (start), or scale this one to its size."
            )


@dataclass(frozen=True, eq=False)
class NoisyImages:
    """A LATENT whose state was checked against its samples.

    Attributes:
        latent: the dictionary itself.
        samples: [B, 3, S, S] float32.
        state: the state of all rows.
        images, candidates: index of the source image, and candidate number, of each row.
        previous: x̂0 of the step before [B, 3, S, S], which a multistep sampler continues from; None if a row has none.
    """

    latent: Latent
    samples: Tensor
    state: EditState
    images: tuple[int, ...]
    candidates: tuple[int, ...]
    previous: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sources(self) -> Tensor:
        """The region of each row's source image [B, 3, S, S] in −1..1."""
        return self.state.sources[list(self.images)]

    def rows_of(self, values: Tensor, name: str) -> Tensor:
        """Values given once, per source image or per row → [1 or B, …]."""
        count = len(values)
        if count == 1 or count == len(self):
            return values
        if count == len(self.state.sources):
            return values[list(self.images)]
        raise BlendedError(
            f"{count} {name} were given for a LATENT of {len(self)} rows from {len(self.state.sources)} images; give one, one per image, or one "
            "per row."
        )

    def cut(self, image: Tensor, name: str) -> Tensor:
        """The region of images [1, N or B, 3, H, W] in 0..1, for each row; [B, 3, S, S] in −1..1."""
        self.state.check_size(image, name)
        return self.rows_of(self.state.region.cut(image, self.state.size) * 2 - 1, f"{name}s").expand_as(self.samples)

    def mask_rows(self, mask: EditMask, name: str) -> EditMask:
        """:meth:`rows_of` for masks."""
        return mask.with_values(self.rows_of(mask.values, name))

    def full_mask(self, given: Tensor | None, node: str = "this node") -> EditMask | None:
        """The mask of the edit in the frame of the source images [1 or B, 1, H, W], or None if there is none.

        An edit has one mask: what lies inside all that were given, each compared at the size of the source images. Steps, blending and the final paste
        use this one.

        Args:
            given: a MASK at this node [M, 1, H, W] in the frame of the source images.
            node: its name.

        Raises:
            BlendedError: if nothing lies inside all masks of a row.
        """
        size = (self.state.region.height, self.state.region.width)
        masks: dict[str, EditMask] = {}
        if self.state.masks is not None:
            masks[f"the mask of {START_NODE}"] = self.mask_rows(self.state.masks, "masks")
        if (noise_mask := self._foreign_noise_mask()) is not None:
            masks["the noise mask that the LATENT carries"] = self.mask_rows(self._in_picture(noise_mask, size), "noise masks")
        if given is not None:
            masks[f"the mask at {node}"] = self.mask_rows(fit_mask(given, size, self.state.soft), "masks")
        used: EditMask | None = None
        for mask in masks.values():
            used = mask if used is None else used.intersected(mask)
        if used is not None and len(masks) == 1 and self.state.masks is None:
            used.box()  # an empty mask is an error
        if used is not None and len(masks) > 1 and not bool(used.inside.flatten(1).any(1).all()):
            names = list(masks)
            raise BlendedError(
                f"{', '.join(names[:-1])} and {names[-1]} do not overlap, so nothing would be edited. Connect one mask to {START_NODE} alone, or masks "
                "that overlap: what lies inside all of them is edited."
            )
        return used

    def region_mask(self, given: Tensor | None, node: str = "this node") -> EditMask | None:
        """:meth:`full_mask` in the frame of the samples [1 or B, 1, S, S]."""
        if given is None and self.state.area is not None and self._foreign_noise_mask() is None:
            return self.mask_rows(self.state.area, "masks")
        mask = self.full_mask(given, node)
        return None if mask is None else self.state.region.cut_mask(mask, self.state.size)

    def seen_mask(self, given: Tensor | None, node: str) -> EditMask | None:
        """The part that CLIP sees, in the frame of the samples: ``given`` where there is one, which may be larger than the mask of the edit.

        Raises:
            BlendedError: if it does not overlap the mask of the edit.
        """
        if given is None:
            return self.region_mask(None, node)
        self.full_mask(given, node)
        size = (self.state.region.height, self.state.region.width)
        return self.mask_rows(self.state.region.cut_mask(fit_mask(given, size, self.state.soft), self.state.size), "masks")

    def _foreign_noise_mask(self) -> Tensor | None:
        """The LATENT's noise mask [M, 1, h, w], if it is not the one that Noise Background gave it."""
        if (noise_mask := self.latent.get("noise_mask")) is None:
            return None
        values, area = as_mask_batch(noise_mask), self.state.area
        if area is not None and values.shape[-2:] == area.values.shape[-2:]:
            own = self.mask_rows(area, "masks").values
            if len(own) in (1, len(values)) and torch.equal(values, own.expand_as(values)):
                return None
        return values

    def _in_picture(self, noise_mask: Tensor, size: tuple[int, int]) -> EditMask:
        """A noise mask in the frame of the source images.

        One of their size is in their frame already. Any other covers the samples, as KSampler takes it.
        """
        region, soft = self.state.region, self.state.soft
        if tuple(noise_mask.shape[-2:]) != size:
            covering = stretch_mask(noise_mask, (self.state.size, self.state.size))
            noise_mask = region.put_back(covering, covering.new_zeros(1, 1, *size)).clamp(0, 1)
        return EditMask.of(noise_mask, mask_rule(soft))

    def at(self, level: int, samples: Tensor, mask: EditMask | None = None, previous: Tensor | None = None) -> Latent:
        """The LATENT with other samples, at another level; ``mask``: also with another noise mask; ``previous``: as the attribute."""
        base = self.latent if mask is None else {**self.latent, "noise_mask": mask.values}
        return pack(samples, replace(self.state, level=level), self.images, self.candidates, base, previous)


def pack(
    samples: Tensor,
    state: EditState,
    images: tuple[int, ...],
    candidates: tuple[int, ...],
    base: Mapping[str, Any] | None = None,
    previous: Tensor | None = None,
) -> Latent:
    """A LATENT of the pack; ``base`` holds other keys that travel with it, ``previous`` x̂0 of the step before."""
    before: Sequence[Tensor | None] = [None] * len(samples) if previous is None else list(previous)
    rows = zip(samples, images, candidates, before, strict=True)
    known: dict[str, tuple[Row, ...]] = {}
    for sample, image, candidate, x0 in rows:
        key = fingerprint(sample)
        known[key] = (*known.get(key, ()), Row(image, candidate, x0))
    return {**(base or {}), "samples": samples, "batch_index": list(candidates), KEY: replace(state, rows=known)}


def unpack(latent: Latent, node: str) -> NoisyImages:
    """The noisy images of a LATENT, its state checked against its samples.

    Args:
        latent: from any node.
        node: the node that needs the level, for the error message.

    Raises:
        BlendedError: if the LATENT has no state, or the state does not hold for a row.
    """
    samples, state = latent.get("samples"), latent.get(KEY)
    if not isinstance(samples, Tensor):
        raise BlendedError(f"{node} got a LATENT without samples; connect one from Noise Background.")
    if not isinstance(state, EditState):
        raise BlendedError(
            f"{node} needs a LATENT with a known noise level, and this one ({shape_of(samples)}) has none; start with Noise Background. "
            "(Save Latent, Load Latent and Rebatch Latents drop the level; LATENTs of a VAE never have one.)"
        )
    if samples.ndim != 4 or tuple(samples.shape[1:]) != tuple(state.sources.shape[1:]):
        raise BlendedError(
            f"the LATENT at {node} has shape {shape_of(samples)}, but its rows had shape {shape_of(state.sources[0])}: another node cropped or "
            "scaled it. Scale the image before Noise Background, or after Final Paste."
        )
    samples = samples.to(torch.float32)
    keys = [fingerprint(sample) for sample in samples]
    for key, count in Counter(keys).items():
        masks = len({row.image for row in state.rows.get(key, ())})
        if masks > 1 and count % len(state.rows[key]):
            raise BlendedError(
                f"the LATENT at {node} has {count} of {len(state.rows[key])} rows that begin with the same samples for {masks} masks, so it is unknown which masks "
                "they have. Take rows out after the first step, or give Noise Background one mask."
            )
    rows: list[Row | None] = []
    seen: Counter[str] = Counter()
    for key in keys:
        same = state.rows.get(key, ())
        rows.append(same[seen[key] % len(same)] if same else None)  # again from the first one if rows were repeated
        seen[key] += 1
    if changed := [str(i + 1) for i, row in enumerate(rows) if row is None]:
        raise BlendedError(
            f"row {', '.join(changed)} of {len(rows)} in the LATENT at {node} does not match its recorded noise level ({state}): another node "
            "changed the samples, or joined LATENTs of different edits. Blend with Blend Latents, and join images after Final Paste."
        )
    known = [row for row in rows if row is not None]
    index = latent.get("batch_index")
    numbers = tuple(int(i) for i in index) if isinstance(index, (list, tuple)) and len(index) == len(known) else None
    before = [row.previous for row in known if row.previous is not None]
    return NoisyImages(
        latent, samples, state, tuple(row.image for row in known), numbers or tuple(row.candidate for row in known),
        torch.stack(before) if known and len(before) == len(known) else None,
    )  # fmt: skip


def check_same_level(foreground: NoisyImages, background: NoisyImages) -> None:
    """Raises BlendedError, naming both levels, unless the two can be blended."""
    a, b = foreground.state, background.state
    if (a.process, a.respacing) != (b.process, b.respacing):
        raise BlendedError(
            f"the foreground is at {a} ({a.process.schedule} schedule) and the background at {b} ({b.process.schedule} schedule), which are two "
            "different noise schedules. Both must come from one Noise Background (start)."
        )
    if a.level != b.level:
        raise BlendedError(
            f"the foreground is at {a} and the background at {b}; take the background from Noise Background in mode match, connected to the "
            "LATENT of CLIP Guidance Step."
        )
    if a.region != b.region or a.size != b.size:
        raise BlendedError(
            f"foreground and background show different regions of the image ({a.region} and {b.region}); start both with one Noise Background."
        )


def fingerprint(row: Tensor) -> str:
    """A hash of the values of one row as float32."""
    values = row.detach().to("cpu", torch.float32).contiguous()
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=12).hexdigest()


def shape_of(tensor: Tensor) -> str:
    """'4×3×64×64'."""
    return "×".join(str(n) for n in tensor.shape)


def as_mask_batch(mask: Tensor) -> Tensor:
    """A MASK or noise mask of any rank as [M, 1, H, W] float32 on the CPU; BlendedError if its values cannot be values in 0..1."""
    if mask.ndim < 2:
        raise BlendedError(f"the mask has shape {shape_of(mask)}; a MASK is [batch, height, width].")
    values = mask.detach().reshape(-1, 1, *mask.shape[-2:]).to("cpu", torch.float32)
    check_range(values, "MASK", HIGHEST_OF_MASK)
    return values


def mask_rule(soft: bool) -> str:
    """The library's name for how an edit uses a mask."""
    return "soft" if soft else "binary"


def stretch_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask stretched to (height, width); [M, 1, h, w] → [M, 1, height, width]."""
    return mask if tuple(mask.shape[-2:]) == tuple(size) else F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=False)


def check_stretched(mask: Tensor, stretched: Tensor, rule: str) -> None:
    """Raises BlendedError, with the peak of the mask as it was given, if nothing is inside after it was stretched."""
    if EditMask.of(stretched, rule).inside.any():
        return
    EditMask.of(mask, rule).box()
    raise BlendedError(
        f"nothing is left of the MASK of {mask.shape[-1]}×{mask.shape[-2]} when it is stretched to the image's {stretched.shape[-1]}×"
        f"{stretched.shape[-2]}, because what it marks is too thin; give a MASK of the size of the image."
    )


def scale_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`stretch_mask` for a mask that covers an image of (height, width). Raises BlendedError if its aspect ratio is another one."""
    height, width = mask.shape[-2:]
    if not same_aspect((height, width), size):
        raise BlendedError(
            f"the mask is {width}×{height} and the image {size[1]}×{size[0]}, a different aspect ratio; connect a mask that was drawn over this image."
        )
    return stretch_mask(mask, size)


def fit_mask(mask: Tensor, size: tuple[int, int], soft: bool) -> EditMask:
    """The mask as the edit uses it, scaled to (height, width).

    Raises:
        BlendedError: if its aspect ratio is another one, or nothing of it is inside.

    Warns:
        BlendedWarning: if it is soft and has pixels that are nearly black.
    """
    scaled = scale_mask(mask, size)
    used = EditMask.of(scaled, mask_rule(soft))
    if not used.inside.any():
        check_stretched(mask, scaled, mask_rule(soft))
    for note in used.notes:
        warn(note)
    return used


def warn(note: Note) -> None:
    """Writes a note to ComfyUI's log, through the scope of the node."""
    warnings.warn(BlendedWarning(note, option=note.options), stacklevel=3)
