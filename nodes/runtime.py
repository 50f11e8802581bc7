"""The scope in which a node calls the library: gradients, messages with the names of inputs, progress, preview, interrupt."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import comfy.model_management as mm
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..blended_core.errors import BlendedError, BlendedWarning, one_line, with_controls

GUIDANCE_INPUTS = (
    "scale", "views", "gradient", "distance", "clip_input", "range_scale", "background_scale", "clamp", "view_chunk", "reference_size",
    "early_views", "x0_if_needed",
)  # fmt: skip
INPUTS: dict[str, dict[str, str]] = {
    "Noise Background": {
        **{name: name for name in ("steps", "strength", "seed", "batch", "context")}, "mask_rule": "soft_mask",
    },
    "CLIP Guidance Step": {name: name for name in ("sampler", "eta", "class_choice", "ddim_guidance", "tone_match")},
    "Blended Diffusion Sampler": {
        **{name: name for name in (
            "steps", "strength", "seed", "batch", "context", "sampler", "eta", "class_choice", "feather", "candidates", "preset", "algorithm",
            "tone_match",
        )},
        "mask_rule": "mask_edges",
    },
    "Final Paste": {"feather": "feather", "mask_rule": "soft_mask"},
    "Guidance Options": {**{name: name for name in GUIDANCE_INPUTS}, "start": "guide_from", "end": "guide_to"},
    "Load DDPM": {"ddpm": "checkpoint", "dtype": "precision", "overrides": "overrides", "ddpm_weights": "weights"},
    "Load CLIP (open_clip)": {"clip": "weights"},
    "Encode Prompt": {"weights": "weight"},
    "Demo Scene": {"seed": "seed"},
    "DDPM as MODEL": {"class_choice": "class_choice"},
    "CLIP Guidance (MODEL)": {"scale": "scale", "gradient": "gradient"},
}  # fmt: skip
"""Display name of a node → option of the library → input of that node. Where several nodes have an input for an option, a message on a node
without one names the first. An option without an input (device, invert_mask, crop, …) is in none of them."""


def input_of(option: str, node: str) -> str | None:
    """'input “precision” of Load DDPM' for 'dtype'; without the node if it is ``node`` itself; None if no node has such an input."""
    if option in INPUTS.get(node, {}):
        return f"input “{INPUTS[node][option]}”"
    return next((f"input “{inputs[option]}” of {name}" for name, inputs in INPUTS.items() if option in inputs), None)


def with_inputs(message: object, node: str) -> str:
    """The text of an error, a warning or a note of the library, with the inputs that it is about."""
    return with_controls(message, lambda option: input_of(option, node))


@contextlib.contextmanager
def library_scope(node: str) -> Iterator[None]:
    """The scope in which a node calls the library; ``node`` is its display name.

    Leaves ComfyUI's inference mode, whose tensors cannot take part in autograd. Warnings of the library go to ComfyUI's log. Errors and warnings
    name the inputs that they are about, and are one printable line each.
    """
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("always", BlendedWarning)
            show_other = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, BlendedWarning):
                    logging.warning("Blended Diffusion: %s", with_inputs(message, node))
                else:
                    show_other(message, category, *where, **more)

            warnings.showwarning = show
            yield
    except BlendedError as error:
        raise BlendedError(with_inputs(error, node)) from None
    except Exception as error:
        # ComfyUI logs these too, and shows them on the page.
        error.args = tuple(one_line(value) if isinstance(value, str) else value for value in error.args)
        raise


class Progress:
    """A node's progress bar, with a live preview if the user enabled it, and the check for an interrupt."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar = ProgressBar(total)

    def update(self, done: int, preview: Tensor | None = None) -> None:
        """Sets the bar to ``done``; shows the first image of ``preview`` [B, 3, H, W] in −1..1.

        Raises ComfyUI's InterruptProcessingException after Cancel.
        """
        mm.throw_exception_if_processing_interrupted()
        shown = None
        if preview is not None and args.preview_method != LatentPreviewMethod.NoPreviews:
            pixels = ((preview[0].float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
            shown = ("JPEG", enlarge(Image.fromarray(pixels.permute(1, 2, 0).numpy())), args.preview_size)
        self.bar.update_absolute(done, self.total, shown)


def enlarge(image: Image.Image, min_side: int = 256) -> Image.Image:
    """Scales a small image by a whole number, so that a preview of 64 pixels is visible."""
    factor = -(-min_side // max(image.size))
    return image if factor <= 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def keeps_text() -> dict[str, bool]:
    """Arguments of the Schema of a node that returns :func:`shown_text`: ComfyUI sends the text again while the node is cached.

    Empty for a ComfyUI that does not know the argument (0.14). There, a page that was reloaded shows the text after the node runs again.
    """
    name = "has_intermediate_output"
    return {name: True} if name in {field.name for field in fields(io.Schema)} else {}


def shown_text(text: str) -> ui.PreviewText:
    """The ``ui`` of a NodeOutput that shows text on the node (``web/show_text.js``), in the page of the client that runs it."""
    return ui.PreviewText("\n".join(one_line(line) for line in text.split("\n")))


def format_score(value: float | None) -> str:
    """Three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"
