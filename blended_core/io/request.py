"""What a run was asked to do, and its form in a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import BlendedError, short_repr
from ..options import EditOptions, is_finite, option, validate

MACHINE = "machine and output"
MOST_THREADS = 1024
DEFAULTS_OF_OLD_REPORTS = {"ddim_guidance": "score", "tone_match": "off"}
REQUEST_DEFAULTS_OF_OLD_REPORTS = {"ddpm_weights": "", "clip_dtype": "fp32", "cuda_graphs": "off"}
GUIDANCE_DEFAULTS_OF_OLD_REPORTS = {"reference_size": 0}
"""Values of options that did not exist when the report was written, where they differ from today's defaults."""


@dataclass(frozen=True)
class Request:
    """The inputs, networks and options of a run. ``report.json`` holds it under ``request``.

    Attributes:
        command: 'edit' or 'demo'.
        image: path of the picture. mask: path of the mask, or None for the transparent part of the picture.
        prompts, weights: the texts, and a weight for each.
        overrides: settings of the diffusion model that replace those of the checkpoint.

    The other fields are documented by their declarations.

    Raises:
        BlendedError: if a value is outside its range, or prompts and weights do not match.
    """

    command: str
    image: str
    mask: str | None
    prompts: tuple[str, ...]
    weights: tuple[float, ...]
    ddpm: str = option(
        "embedded", "Diffusion model: embedded, or an ADM checkpoint (.safetensors or .pt).", metavar="FILE", node_input="checkpoint"
    )
    ddpm_weights: str = option(
        "",
        "Set of weights in the checkpoint, by a name that inspect lists. By default averaged weights (EMA) if there are any.",
        flag="--weights", metavar="NAME", node_input="weights",
    )  # fmt: skip
    overrides: Mapping[str, Any] = field(default_factory=dict)
    clip: str = option(
        "embedded",
        "CLIP model: embedded, an open_clip model with a tag or a file of weights (ViT-B-16:openai), or a file alone.",
        metavar="MODEL[:WEIGHTS]", node_input="weights",
    )  # fmt: skip
    lpips: str = option(
        "auto",
        "LPIPS network of the background loss: embedded, vgg, alex, squeeze, or auto for the first whose weights are on this computer.",
        metavar="NET",
    )  # fmt: skip
    options: EditOptions = field(default_factory=EditOptions)
    device: str = option(
        "auto", "Device of the networks: auto, cpu, cuda, cuda:1, mps. auto is cuda if there is one.", metavar="NAME", group=MACHINE
    )
    dtype: str = option(
        "auto",
        "Precision of the diffusion model. auto: fp32 on the CPU; on CUDA bf16, fp16 or fp32, the fastest that the GPU has.",
        choices=("auto", "fp32", "bf16", "fp16"), node_input="precision", group=MACHINE,
    )  # fmt: skip
    clip_dtype: str = option(
        "auto",
        "Precision of CLIP's image encoder. auto: bf16, or fp16 on older GPUs, for large encoders where the device is faster with it, else fp32, and fp32 in preset official.",
        choices=("auto", "fp32", "bf16", "fp16"), node_input="precision", group=MACHINE,
    )  # fmt: skip
    cuda_graphs: str = option(
        "off",
        "CUDA graphs of the diffusion model: its kernels are recorded once and started together. auto: on CUDA; the same results, more memory.",
        choices=("off", "auto"), group=MACHINE,
    )  # fmt: skip
    checkpointing: bool = option(
        False,
        "Gradient checkpointing in the diffusion model, for gradient unet: less memory, about a third slower, the same result.",
        group=MACHINE,
    )
    threads: int | None = option(
        None, "CPU threads. By default as many as PyTorch chooses.", low=1, high=MOST_THREADS, metavar="N", group=MACHINE
    )

    def __post_init__(self) -> None:
        validate(self)
        texts = [self.command, self.image, *self.prompts, *([] if self.mask is None else [self.mask])]
        numbers = [weight for weight in self.weights if isinstance(weight, (int, float)) and not isinstance(weight, bool)]
        if not all(isinstance(text, str) for text in texts) or len(numbers) < len(self.weights) or not isinstance(self.overrides, Mapping):
            raise TypeError("a value of the request is of another type")
        if len(self.weights) != len(self.prompts):
            raise BlendedError(
                f"{len(self.prompts)} prompts were given with {len(self.weights)} weights; give one weight for each prompt.",
                option="weights",
            )
        if wrong := [weight for weight in self.weights if not is_finite(weight)]:
            raise BlendedError(f"the weight of a prompt is {short_repr(wrong[0])}; give a finite number.", option="weights")

    @property
    def texts(self) -> list[str]:
        """The prompts that are not empty; without any, the edit removes what the mask covers."""
        return [prompt for prompt in self.prompts if prompt.strip()]

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return {**asdict(self), "prompts": list(self.prompts), "weights": list(self.weights)}

    def without_folders(self) -> dict[str, Any]:
        """As :meth:`to_dict`, with the names of files in place of their paths."""
        names = {key: Path(path).name for key in ("image", "mask", "ddpm") if (path := getattr(self, key))}
        model, colon, weights = self.clip.partition(":")
        return {**self.to_dict(), **names, "clip": model + colon + (Path(weights).name if Path(weights).is_absolute() else weights)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """The request of a report, of this or an earlier version.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: if a key is missing or its value is of another kind.
            BlendedError: for an unknown option, or a value outside its range.
        """
        values = {**REQUEST_DEFAULTS_OF_OLD_REPORTS, **values}
        given = {f.name: values[f.name] for f in fields(cls)}
        options = {**DEFAULTS_OF_OLD_REPORTS, **given["options"]}
        options["guidance"] = {**GUIDANCE_DEFAULTS_OF_OLD_REPORTS, **options.get("guidance", {})}
        given |= {"prompts": tuple(given["prompts"]), "weights": tuple(given["weights"]), "options": EditOptions.from_dict(options)}
        return cls(**given)
