"""Every option of an edit, declared once: default, choices, range, help text; and the presets.

The command line, the node schema, the validation and the table in docs/options.md are made from these declarations (:func:`declared`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from .errors import BlendedError, short_repr
from .respacing import check_respacing

MAX_SEED = 2**64 - 1
REGION = "mask and region"
MULTISTEP = "dpmpp-2m"
BEST_END = 0.9
"""Where guidance ends in preset ``best``: the last calls change nothing that is seen (docs/quality.md)."""
"""The sampler that needs x̂0 of the step before."""
MOST = 100_000
"""The largest count that an option takes where nothing sets a closer limit: more is a slip, and would run or allocate without end."""
DEFAULT_SCALE = 1000.0
"""Guidance scale of the reference code, for checkpoints that recommend none."""
RECOMMENDED_AT = 256
"""Image side in pixels that the guidance scale recommended by a checkpoint refers to, as ``reference_size``."""
MOST_WEIGHT = 1e9
"""The largest weight of a loss: far beyond useful ones, and far from where float32 overflows."""


@dataclass(frozen=True)
class Option:
    """The declaration of one option, beside its name, type and default.

    Attributes:
        help: one or two sentences; the same text in the terminal, in a node's tooltip and in the documentation.
        choices: the values that a text can take.
        low, high: inclusive limits of a number; ``above``: the lower limit itself is excluded.
        step, node_low, node_high: of the widget in ComfyUI, where they differ from 1 and from the limits.
        flag: of the terminal, where it is not the name with dashes; '' if the terminal has none. ``metavar``: its placeholder.
        node_input: name of the input of the nodes, where it is not the name of the option.
        group: heading under which --help and docs/options.md list the option, where it is not that of its class.
        unit: what a number counts.
        limited_weight: the weight of a loss that acts only from the start to the end of guidance.
    """

    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: bool = False
    step: float | None = None
    node_low: float | None = None
    node_high: float | None = None
    flag: str | None = None
    metavar: str | None = None
    node_input: str | None = None
    group: str | None = None
    unit: str = ""
    limited_weight: bool = False

    def requirement(self, whole: bool = False) -> str:
        """What a value must be: 'one of ddpm, ddim', 'a number above 0 and at most 1'; ``whole``: of a whole number."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        limits = [] if self.low is None else [f"above {self.low:g}" if self.above else f"of at least {self.low:g}"]
        if self.high is not None:
            limits.append(f"at most {self.high if isinstance(self.high, int) else f'{self.high:g}'}")
        return " and ".join(
            [
                f"a {'whole ' if whole else ''}number" + (f" of {self.unit}" if self.unit else "") + (f" {limits[0]}" if limits else ""),
                *limits[1:],
            ]
        )

    def allows(self, value: Any) -> bool:
        """Whether a value is one of the choices, or within the limits."""
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.low is None and self.high is None:
            return True
        if isinstance(value, bool) or not isinstance(value, Real) or not is_finite(value):
            return False
        if self.low is not None and (value < self.low or (self.above and value == self.low)):
            return False
        return self.high is None or value <= self.high


def is_finite(number: Real | float) -> bool:
    """Whether a number is neither NaN nor infinite, nor a whole number beyond the range of float."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def option(default: Any, help: str, **declaration: Any) -> Any:
    """A dataclass field with an :class:`Option`."""
    return field(default=default, metadata={"option": Option(help, **declaration)})


def declared(kind: Any) -> dict[str, tuple[Option, Any]]:
    """{name: (declaration, default)} of a dataclass of options, or of an instance of one."""
    return {f.name: (f.metadata["option"], None if f.default is MISSING else f.default) for f in fields(kind) if "option" in f.metadata}


def validate(options: Any) -> None:
    """Raises BlendedError, naming the option, if a value is of another type, none of the choices, or outside the limits."""
    kind: Any = type(options)
    kinds_of = _kinds(kind)
    for name, (declaration, _) in declared(options).items():
        value, kinds = getattr(options, name), kinds_of[name]
        if not any(_is_a(value, kind) for kind in kinds) or (value is not None and not declaration.allows(value)):
            whole = int in kinds and str not in kinds
            text = "a text" if kinds == (str,) and not declaration.choices else declaration.requirement(whole)
            text = "true or false" if bool in kinds else text
            raise BlendedError(f"{name} is {short_repr(value)}; give {text}.", option=name)


@lru_cache
def _kinds(kind: Any) -> dict[str, tuple[Any, ...]]:
    """{name of a field: the types of its annotation}."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(kind).items()}


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value is of the type of an annotation. Every real number is a float, also a whole one or one of numpy."""
    if kind is float or kind is int:
        return isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(frozen=True)
class GuidanceOptions:
    """How the losses steer a step (docs/method.md, rows 2–6 and 14). Each field is documented by its declaration.

    Raises:
        BlendedError: if a value is outside its range.
    """

    scale: float | None = option(
        None,
        "Weight of the CLIP loss. Too low: the edit ignores the prompt. Too high: glaring colors and patterns that only CLIP recognizes. By default, "
        "and with -1 in ComfyUI, the scale that the checkpoint recommends (embedded: 3000), or 1000 if it recommends none.",
        low=0.0, high=MOST_WEIGHT, limited_weight=True, node_low=-1.0, node_high=100000.0, step=10.0, flag="--guidance-scale", metavar="λ",
    )  # fmt: skip
    range_scale: float = option(
        50.0, "Weight of the range loss, which pulls values back into the valid range of an image.",
        low=0.0, high=MOST_WEIGHT, limited_weight=True, node_high=100000.0, step=10.0, metavar="λ",
    )  # fmt: skip
    background_scale: float = option(
        0.0,
        "Weight λ of the background loss of Algorithm 1. Blending does not need it. Above 0 an LPIPS network is loaded.",
        low=0.0, high=MOST_WEIGHT, node_high=1000000.0, step=100.0, flag="--lambda", metavar="λ",
    )  # fmt: skip
    gradient: str = option(
        "x0",
        "Where the gradient is taken. x0: at the prediction of the clean image, as in the paper; fast, little memory. unet: through the "
        "diffusion model, as in the reference code; slower, several times the memory.",
        choices=("unet", "x0"),
    )  # fmt: skip
    clip_input: str = option(
        "x0",
        "What CLIP sees. x0: the prediction of the clean image. mixed: the prediction mixed with the noisy image, as in the reference code.",
        choices=("x0", "mixed"),
    )  # fmt: skip
    distance: str = option(
        "spherical",
        "Distance between the CLIP embeddings of image and text. cosine: as in the paper. spherical: the squared great-circle "
        "distance, limited so that its gradient is finite. spherical_unclamped: without that limit, as in the reference code.",
        choices=("spherical", "cosine", "spherical_unclamped"),
    )  # fmt: skip
    background_loss: str = option(
        "paper",
        "Form of the background loss. paper: per image. reference: averaged over the batch, with its own two weights.",
        choices=("paper", "reference"), flag="",
    )  # fmt: skip
    lpips_scale: float = option(1000.0, "Weight of LPIPS in the reference code's background loss.", low=0.0, high=MOST_WEIGHT, metavar="λ")
    l2_scale: float = option(
        10000.0, "Weight of the squared error in the reference code's background loss.", low=0.0, high=MOST_WEIGHT, metavar="λ"
    )
    views: int = option(
        8,
        "Augmented views that CLIP sees at each step. More views give cleaner shapes and take more time. 1 turns the augmentations off.",
        low=1, high=MOST, node_high=256, metavar="N",
    )  # fmt: skip
    symmetric_views: bool = option(True, "Shift views along both axes. The reference code shifts along the vertical axis only.", flag="")
    view_chunk: int = option(
        0,
        "Views that go through CLIP at once; 0: all. Lower values need less memory and give the same result.",
        low=0, high=MOST, node_high=256, metavar="N",
    )  # fmt: skip
    clamp: float | None = option(
        None,
        "Largest root mean square of the gradient of one image. By default, and with 0 in ComfyUI, there is no limit.",
        low=0.0, high=MOST_WEIGHT, above=True, node_low=0.0, node_high=1000.0, step=0.01, metavar="RMS",
    )  # fmt: skip
    reference_size: int = option(
        256,
        "Image side that the weights of the losses refer to, so that one scale suits models of every size. 0: weights are used as they are.",
        low=0, high=MOST, node_high=4096, step=64, metavar="PX", unit="pixels",
    )  # fmt: skip
    x0_if_needed: bool = option(
        False, "If memory runs out with gradient unet, continue with gradient x0 instead of failing. The result will differ."
    )
    start: float = option(
        0.0,
        "Share of the noise levels after which guidance begins; 0 is the noisiest level. Steps without guidance are faster.",
        low=0.0, high=1.0, step=0.05, flag="--guide-from", node_input="guide_from", metavar="F",
    )  # fmt: skip
    end: float = option(
        1.0,
        "Share of the noise levels after which guidance ends; 1 is the clean image. Steps without guidance are faster.",
        low=0.0, high=1.0, step=0.05, flag="--guide-to", node_input="guide_to", metavar="F",
    )  # fmt: skip
    early_views: int = option(
        0,
        "Views in the noisier half of the levels, where there is little to see yet; fewer are faster. 0: as many as views.",
        low=0, high=MOST, node_high=256, metavar="N",
    )  # fmt: skip

    def __post_init__(self) -> None:
        validate(self)
        if not self.start < self.end:
            raise BlendedError(
                f"guidance starts at {self.start:g} and ends at {self.end:g} of the levels, which is an empty range; give a start below the "
                "end, such as 0 and 0.8.",
                option=("start", "end"),
            )

    def at(self, index: int, levels: int) -> GuidanceOptions | None:
        """The options of the step at ``index`` of that many levels; None where guidance is off.

        Outside of start to end only the background loss acts, because without it Algorithm 1 has nothing that keeps the background.
        """
        return self.at_share((levels - 1 - index) / levels)

    def at_share(self, share: float) -> GuidanceOptions | None:
        """:meth:`at` for a share of the noise levels, 0 at the noisiest one."""
        if share < self.start or (share >= self.end and self.end < 1):
            limited: dict[str, Any] = {name: 0.0 for name, (declaration, _) in declared(self).items() if declaration.limited_weight}
            return replace(self, **limited) if self.needs_perceptual else None
        return replace(self, views=self.early_views) if self.early_views and share < 0.5 else self

    def scale_for(self, recommended: float | None, image_size: int) -> float:
        """The weight of the CLIP loss: the one given, else the one that a checkpoint recommends, else :data:`DEFAULT_SCALE`.

        Args:
            recommended: for losses that refer to images of :data:`RECOMMENDED_AT` pixels; None if the checkpoint recommends nothing.
            image_size: side in pixels of the model.
        """
        if self.scale is not None:
            return self.scale
        if recommended is None:
            return DEFAULT_SCALE
        return recommended * ((self.reference_size or image_size) / RECOMMENDED_AT) ** 2

    @property
    def uses_clip(self) -> bool:
        """Whether the CLIP loss takes part."""
        return self.scale is None or self.scale > 0

    @property
    def has_losses(self) -> bool:
        """Whether the weight of any loss is above 0."""
        return self.needs_perceptual or self.uses_clip or self.range_scale > 0

    @property
    def needs_perceptual(self) -> bool:
        """Whether the background loss, and so an LPIPS network, takes part."""
        return self.background_scale > 0


@dataclass(frozen=True)
class EditOptions:
    """Everything that decides an edit besides picture, mask, prompt and networks. Each field is documented by its declaration.

    Raises:
        BlendedError: if a value is outside its range.
    """

    preset: str = "best"  # the name that these options began from; has no effect by itself
    algorithm: str = option(
        "blended",
        "blended: Algorithm 2 of the paper. local: Algorithm 1, which keeps the background only by a loss (background_scale), so that it drifts.",
        choices=("blended", "local"),
    )  # fmt: skip
    steps: str = option(
        "50",
        "Length of the whole diffusion process: a number, ddim25 (a whole stride), 50,25,10 (sections, the least noisy first), or logsnr20 (uniform "
        "in the logarithm of the signal-to-noise ratio, for dpmpp-2m). More steps are slower and finer.",
        metavar="N",
    )  # fmt: skip
    strength: float = option(
        0.75,
        "Share of the steps that is denoised. 1 starts from pure noise; 0.4 keeps colors and shapes of what the mask covers.",
        low=0.0, high=1.0, above=True, node_low=0.01, step=0.01, metavar="S",
    )  # fmt: skip
    sampler: str = option(
        MULTISTEP,
        "ddpm adds noise at every step, as in the paper. ddim is deterministic and needs fewer steps. dpmpp-2m (DPM-Solver++) extrapolates from two "
        "steps and needs the fewest.",
        choices=("ddpm", "ddim", MULTISTEP),
    )  # fmt: skip
    eta: float = option(
        0.0, "Noise of the samplers ddim and dpmpp-2m. 0: none. 1: as much as ddpm.", low=0.0, high=1.0, step=0.05, metavar="F"
    )
    ddim_guidance: str = option(
        "matched",
        "How far guidance moves a step of ddim or dpmpp-2m. matched: as far as a ddpm step. score: half as far, by the formula of the score, as in the presets "
        "paper and official.",
        choices=("matched", "score"),
    )  # fmt: skip
    seed: int = option(
        0,
        "Seed of all random numbers. A candidate depends on the seed and its own number, not on the batch size.",
        low=0,
        high=MAX_SEED,
        metavar="N",
    )
    candidates: int = option(8, "Number of results, ranked by CLIP, best first.", low=1, high=MOST, node_high=256, metavar="N")
    batch: int = option(
        4,
        "Candidates that are processed at once; 0: as many as fit into the free memory of a GPU. Changes time and memory, not the random numbers.",
        low=0,
        high=MOST,
        node_high=64,
        metavar="N",
    )
    guidance: GuidanceOptions = field(default_factory=lambda: GuidanceOptions(end=BEST_END))
    background_level: str = option(
        "matched",
        "Noise level of the background. one_off: one level too high, as in the reference code.",
        choices=("matched", "one_off"),
        flag="",
    )
    background_noise: str = option(
        "per_image", "Noise of the background: per image, or shared by all candidates as in the reference code.",
        choices=("per_image", "shared"), flag="",
    )  # fmt: skip
    output: str = option(
        "sample",
        "What a finished edit shows: the sample, or x̂0 of the last step as in the reference code.",
        choices=("sample", "x0"),
        flag="",
    )
    class_choice: str | int = option(
        "zero",
        "Class label for a class-conditional model: zero (no class), random (a new one at every step), or the number of a class.",
        flag="--class", metavar="C",
    )  # fmt: skip
    index_lookup: str = option(
        "exact", "exact, or reference: the reference code's index, which is wrong for sectioned respacing.",
        choices=("exact", "reference"), flag="",
    )  # fmt: skip
    enforce_background: bool | None = option(
        None, "Restore the original outside the mask. By default on for Algorithm 2 and off for Algorithm 1.", group=REGION
    )
    invert_mask: bool = option(False, "Edit the outside of the mask instead (background replacement).", group=REGION)
    mask_rule: str = option(
        "binary",
        "binary: everything from 50 % gray on is edited. soft: gray values set how freely a pixel may change. nonzero: every value above 0 is "
        "edited.",
        choices=("binary", "soft", "nonzero"), flag="", node_input="mask_edges", group=REGION,
    )  # fmt: skip
    crop: str = option(
        "region", "region: edit a square around the mask. squash: scale the whole image to a square, as in the reference code.",
        choices=("region", "squash"), group=REGION,
    )  # fmt: skip
    context: float = option(
        1.6,
        "Side of the edited square, as a multiple of the longer side of the mask. A larger context fits the edit in better and leaves it fewer pixels.",
        low=1.0, high=1000.0, node_high=16.0, step=0.1, metavar="F", group=REGION,
    )  # fmt: skip
    feather: int = option(
        0,
        "Pixels over which the edit fades in, counted inward from the mask edge. The outside stays untouched.",
        low=0, high=MOST, node_high=512, metavar="PX", unit="pixels", group=REGION,
    )  # fmt: skip
    tone_match: str = option(
        "late",
        "Corrects colors inside the mask so that they continue the source image across its edge. end: once, on the result. late: also at the last noise "
        "levels, since models that predict noise keep what they are given there.",
        choices=("off", "end", "late"), group=REGION,
    )  # fmt: skip
    ranking: str = option(
        "views",
        "Order of the candidates. views: CLIP distance averaged over 32 views. corrected: of one view. reference: as in the reference code.",
        choices=("views", "corrected", "reference"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        steps: Any = self.steps
        if isinstance(steps, int) and not isinstance(steps, bool):  # as a script may give it
            object.__setattr__(self, "steps", str(steps))
        validate(self)
        if not isinstance(self.class_choice, int) and self.class_choice not in ("zero", "random"):
            raise BlendedError(
                f"class_choice is {short_repr(self.class_choice)}; give 'zero', 'random' or the number of a class.", option="class_choice"
            )
        check_respacing(self.steps)

    @property
    def keeps_background(self) -> bool:
        """Whether the original is restored outside the mask."""
        return self.algorithm == "blended" if self.enforce_background is None else self.enforce_background

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the guidance nested."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditOptions:
        """The inverse of :meth:`to_dict`. Raises BlendedError for a name that is no option."""
        _refuse_unknown(values, fields(cls), "option")
        guidance = values.get("guidance", {})
        _refuse_unknown(guidance, fields(GuidanceOptions), "guidance option")
        return cls(**{**values, "guidance": GuidanceOptions(**guidance)})


def _refuse_unknown(values: Mapping[str, Any], known: tuple[Field[Any], ...], what: str) -> None:
    names = {f.name for f in known}
    if unknown := sorted(set(values) - names):
        raise BlendedError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(sorted(names))}.")


PRESETS: dict[str, EditOptions] = {
    "best": EditOptions(),
    "fast": EditOptions(preset="fast", steps="30", tone_match="end", guidance=GuidanceOptions(end=0.8)),
    "paper": EditOptions(
        preset="paper",
        sampler="ddpm",
        steps="100",
        guidance=GuidanceOptions(distance="cosine", range_scale=0.0, views=16),
        ddim_guidance="score",
        tone_match="off",
        ranking="corrected",
    ),
    "official": EditOptions(
        preset="official",
        sampler="ddpm",
        steps="100",
        guidance=GuidanceOptions(
            gradient="unet",
            clip_input="mixed",
            distance="spherical_unclamped",
            background_loss="reference",
            symmetric_views=False,
            reference_size=0,
        ),
        ddim_guidance="score",
        background_level="one_off",
        background_noise="shared",
        output="x0",
        class_choice="random",
        index_lookup="reference",
        mask_rule="nonzero",
        crop="squash",
        tone_match="off",
        ranking="reference",
    ),
}
"""best: the recommendation. fast: best with what can be left out at the least loss (docs/quality.md). paper: as the text of the paper describes it.
official: the reference code, random number by random number."""

ONE_STEP_PRESETS: dict[str, EditOptions] = {
    "best": EditOptions(sampler="ddpm", steps="100", tone_match="off", guidance=GuidanceOptions()),
    "fast": EditOptions(
        preset="fast", sampler="ddpm", steps="40", tone_match="off", guidance=GuidanceOptions(views=4, early_views=2, end=0.8)
    ),
}
"""What a preset stands for with a sampler other than its own: those of one step need more. Workflows and command lines that name ddpm or ddim,
as all did before the presets had another sampler, keep their results."""

LOCAL_BACKGROUND_SCALE = 1000.0
"""λ of Algorithm 1 that the paper finds usable: 100 changes the whole picture, 10000 changes nothing."""


def preset(name: str, **changes: Any) -> EditOptions:
    """The options of a preset, with changes; fields of :class:`GuidanceOptions` may be given by name too.

    With another sampler than the preset's own, the options begin from :data:`ONE_STEP_PRESETS`, so that the number of steps suits the sampler.

    Raises:
        BlendedError: for an unknown preset or option, or a value outside its range.
    """
    if name not in PRESETS:
        raise BlendedError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}.", option="preset")
    options = PRESETS[name]
    if changes.get("sampler", options.sampler) != options.sampler:
        options = ONE_STEP_PRESETS.get(name, options)
    if changes.get("algorithm") == "local" and name != "official":
        # Without a background loss nothing in Algorithm 1 keeps the background; the reference code leaves it off nevertheless.
        changes = {"background_scale": LOCAL_BACKGROUND_SCALE, **changes}
    guidance_names = {f.name for f in fields(GuidanceOptions)}
    _refuse_unknown({k: v for k, v in changes.items() if k not in guidance_names}, fields(EditOptions), "option")
    guidance = {k: v for k, v in changes.items() if k in guidance_names}
    outer = {k: v for k, v in changes.items() if k not in guidance_names}
    if guidance:
        outer["guidance"] = replace(options.guidance, **guidance)
    return replace(options, **outer)
