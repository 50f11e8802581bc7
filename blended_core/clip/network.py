"""Networks of open_clip, built empty and filled with tensors that this package has read.

open_clip itself opens no file of weights: its reader runs a pickle that the restricted unpickler does not understand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import BlendedError, reason
from ..weights.open import WeightsFile
from ..weights.tensors import RANDOM_INITIALIZERS, SkipInitialization, copy_finite
from .hub import text_folder

MAX_NAMES = 3
"""Tensors that an error lists by name."""
APPLE = "image_encoder."
"""Begins the names of the image encoder in Apple's own files of MobileCLIP."""
COUNTER = "num_batches_tracked"
"""Ends the names of what normalization layers count, which some files lack."""
CONSTANTS = ("attn_mask", "position_ids")
"""Ends of the names of buffers that a network computes itself, and that older files hold."""
ADVICE = "It is damaged, or of another architecture."


def text_settings(name: str, download: bool) -> dict[str, Any]:
    """open_clip's settings of a text encoder, with folders of this computer in place of repositories.

    Args:
        name: of a network of open_clip.
        download: whether configuration and vocabulary of a text encoder of the transformers library may be downloaded.

    Raises:
        BlendedError: if they are not on this computer and may not or cannot be downloaded.
    """
    import open_clip

    text = dict(open_clip.get_model_config(name)["text_cfg"])
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key):
            text[key] = str(text_folder(text[key], download))
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
    return text


def build_network(name: str, text: Mapping[str, Any], quick: bool) -> nn.Module:
    """An empty network of open_clip: the values of its weights are undefined. Nothing is read but the package open_clip and the folders in ``text``.

    Args:
        name: of a network of open_clip.
        text: of :func:`text_settings`.
        quick: OpenAI's activation, even if the settings of the network name another one.
    """
    import open_clip

    settings = {**open_clip.get_model_config(name), "text_cfg": dict(text)}
    custom = settings.pop("custom_text", False) or "hf_model_name" in text
    kind = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "timm_model_name" in settings["vision_cfg"]:
        settings["vision_cfg"]["timm_model_pretrained"] = False
    if quick:
        settings["quick_gelu"] = True
    try:
        # Random values alone: zeros and masks may belong to buffers that no file holds. Memory that nothing writes to is not taken.
        with SkipInitialization(RANDOM_INITIALIZERS):
            network: nn.Module = kind(**settings)
    except Exception as error:  # open_clip, timm and transformers raise anything
        raise BlendedError(f"open_clip cannot build {name} here ({reason(error)}).", option="clip") from error
    return network


def build_tokenizer(name: str, text: Mapping[str, Any]) -> Any:
    """The tokenizer of a network: texts → token ids. Arguments as for :func:`build_network`."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    options = {"context_length": text.get("context_length", DEFAULT_CONTEXT_LENGTH), **(text.get("tokenizer_kwargs") or {})}
    if not text.get("hf_tokenizer_name"):
        return SimpleTokenizer(**options)
    if text.get("tokenizer_mode"):
        options["tokenizer_mode"] = text["tokenizer_mode"]
    try:
        return HFTokenizer(text["hf_tokenizer_name"], **options)
    except Exception as error:  # transformers raises anything, also if it is not installed
        raise BlendedError(f"the tokenizer of {name} cannot be loaded ({reason(error)}).", option="clip") from error


def fill_network(network: nn.Module, file: WeightsFile, names: Mapping[str, str]) -> None:
    """Copies the weights in a file into a network, one tensor after the other.

    Args:
        network: of :func:`build_network`.
        file: the opened file.
        names: name in the network → name in the file, as the file has them. Flat names of a text encoder and Apple's layout are recognized.

    Raises:
        BlendedError: if names or shapes differ from those of the network, or values are not finite. Tensors of a single value that the network does
            not have are ignored: they are settings, counters or the bias of the logits, which changes no embedding.
    """
    expected = network.state_dict()
    shapes, take = _in_layout_of(network, expected, file, names)
    _check(shapes, expected)
    state = {}
    for name, value in expected.items():
        if name not in shapes:  # only a counter
            state[name] = value
            continue
        tensor = take(name)
        if value.is_floating_point():
            tensor = copy_finite(tensor, name, value.dtype, channels_last=False)
        state[name] = tensor.reshape(value.shape).to(value.dtype)
    network.load_state_dict(state, strict=True, assign=True)


def _in_layout_of(
    network: nn.Module, expected: Mapping[str, Tensor], file: WeightsFile, names: Mapping[str, str]
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """(name in the network → shape in the file, function that takes a tensor by its name in the network)."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    if any(name.startswith(APPLE) for name in names):
        try:
            converted = convert_state_dict(network, {name: file.take(key) for name, key in names.items()})
        except BlendedError:
            raise
        except Exception as error:  # of a file with other tensors
            raise BlendedError(f"its tensors cannot be brought into the layout of open_clip ({reason(error)}); {ADVICE}") from None
        return {name: tuple(tensor.shape) for name, tensor in converted.items()}, converted.pop
    if "positional_embedding" in names and "positional_embedding" not in expected:
        names = convert_to_custom_text_state_dict(dict(names))
    return {name: file.shapes[key] for name, key in names.items()}, lambda name: file.take(names[name])


def _check(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    """BlendedError unless names and shapes are those of the network."""
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    complaints = {
        "missing": [name for name in wanted if name not in shapes and not name.endswith(COUNTER)],
        "surplus": [name for name, shape in shapes.items() if name not in wanted and math.prod(shape) > 1 and not name.endswith(CONSTANTS)],
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in wanted.items()
            if shapes.get(name, shape) != shape and not math.prod(shapes[name]) == math.prod(shape) == 1
        ],
    }
    listed = [
        f"{verdict}: {', '.join(names[:MAX_NAMES])}{f' and {len(names) - MAX_NAMES} more' if len(names) > MAX_NAMES else ''}"
        for verdict, names in complaints.items()
        if names
    ]
    if listed:
        raise BlendedError(f"its tensors are not those of this architecture; {'; '.join(listed)}. {ADVICE}")
