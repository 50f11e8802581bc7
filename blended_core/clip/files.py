"""Files of CLIP weights: the network among their tensors, and its architecture in open_clip, determined from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BlendedError
from ..weights.open import WeightsFile, file_errors, open_weights
from ..weights.sets import weight_sets

Shapes = Mapping[str, Sequence[int]]
ANCHOR = "visual.conv1.weight"
"""A tensor that CLIP models with a ViT or a ResNet of OpenAI's layout have."""
ANCHORS = (ANCHOR, "logit_scale")
"""Tensors by which a CLIP is found in a file; every CLIP has the last one."""
PARTS = ("visual.", "logit_scale")
"""Beginnings of the names in a complete CLIP."""
QUICKGELU = "-quickgelu"
"""Suffix of open_clip's architectures with OpenAI's activation."""
ADVICE = "Use weights in the layout of OpenAI's CLIP or of open_clip, or choose a tag."


def open_clip_weights(path: Path) -> tuple[WeightsFile, Mapping[str, str]]:
    """A file of CLIP weights, and the network in it: name in the network → name in the file. Averaged weights are preferred to trained ones.

    Raises:
        BlendedError: if the file cannot be read or holds no CLIP. The text does not name the file.
    """
    file = open_weights(path, ADVICE)
    return file, network_names(file.shapes)


def network_names(shapes: Shapes) -> Mapping[str, str]:
    """Name in the network → name in the file, for the best of the sets of weights in a file. BlendedError if it holds no CLIP."""
    for anchor in ANCHORS:
        sets = weight_sets(shapes, anchor, PARTS)
        if sets:
            return sets[0].names
    raise BlendedError(why_not(shapes))


def architecture_of(path: Path) -> str:
    """The architecture in open_clip that a file of weights belongs to; errors as for :func:`architecture_in`, with the name of the file."""
    with file_errors(path, "clip"):
        return architecture_in(open_weights(path, ADVICE))


def architecture_in(file: WeightsFile) -> str:
    """The architecture in open_clip that an opened file belongs to.

    The shapes do not determine the activation. Where open_clip has the same network with OpenAI's QuickGELU under another name, a TorchScript archive,
    the format in which OpenAI published its weights, belongs to that one, and any other file to the plain one.

    Raises:
        BlendedError: if it is not a CLIP, or of a size that open_clip does not know.
    """
    found = signature(file.shapes)
    names = [name for name, known in known_signatures().items() if known == found]
    if not names:
        raise BlendedError(
            f"it is a CLIP with {described(found)}, and open_clip has no such network; give the architecture yourself if you know it."
        )
    scripted = file.format == "torchscript"
    return min(names, key=lambda name: ((QUICKGELU in name) != scripted, len(name), name))


def signature(shapes: Shapes) -> dict[str, Any]:
    """The sizes of both towers, from the shapes. Networks of open_clip with equal signatures have tensors of equal names and shapes.

    Raises:
        BlendedError: if the file is not a CLIP; the text says what it holds instead.
    """
    table = {name: tuple(shapes[key]) for name, key in network_names(shapes).items()}
    if ANCHOR not in table:
        raise BlendedError(why_not(shapes))
    try:
        vocabulary, width = table["token_embedding.weight"]
        text = {
            "context_length": table["positional_embedding"][0],
            "vocab_size": vocabulary,
            "width": width,
            "layers": _count(table, r"transformer\.resblocks\.(\d+)\."),
        }
        return {"embed_dim": table["text_projection"][-1], "text": text, "vision": _vision(table)}
    except (KeyError, ValueError, IndexError, TypeError):  # TypeError: the root of a negative number
        raise BlendedError(f"it looks like a CLIP, but tensors are missing or have other shapes; download it again. {ADVICE}") from None


def _vision(table: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    first = table[ANCHOR]
    if "visual.layer1.0.conv1.weight" in table:
        stages = tuple(_count(table, rf"visual\.layer{i}\.(\d+)\.") for i in range(1, 5))
        side = round((table["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
        return {"layers": stages, "width": table["visual.layer1.0.conv1.weight"][0], "image_size": 32 * side}
    grid = round((table["visual.positional_embedding"][0] - 1) ** 0.5)
    return {
        "layers": _count(table, r"visual\.transformer\.resblocks\.(\d+)\."),
        "width": first[0],
        "patch_size": first[2],
        "image_size": grid * first[2],
    }


def _count(table: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that a pattern matches in the names."""
    return 1 + max(int(m[1]) for key in table if (m := re.match(pattern, key)))


def known_signatures() -> dict[str, dict[str, Any]]:
    """Name → signature of every network of open_clip whose towers are neither of timm nor of Hugging Face."""
    import open_clip

    out = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        if "timm_model_name" in vision or "hf_model_name" in text or config.get("custom_text") or "multimodal_cfg" in config:
            continue
        layers = vision.get("layers", 12)
        size = vision.get("image_size", 224)
        tower: dict[str, Any] = {"layers": tuple(layers) if isinstance(layers, list) else layers, "width": vision.get("width", 768)}
        if not isinstance(layers, list):
            patch = vision.get("patch_size", 16)
            size = patch * (size // patch)
            tower["patch_size"] = patch
        out[name] = {
            "embed_dim": config["embed_dim"],
            "text": {
                "context_length": text.get("context_length", 77),
                "vocab_size": text.get("vocab_size", 49408),
                "width": text.get("width", 512),
                "layers": text.get("layers", 12),
            },
            "vision": {**tower, "image_size": size},
        }
    return out


def why_not(shapes: Shapes) -> str:
    """What a file without :data:`ANCHOR` holds, as the text of an error."""
    if any("vision_model.embeddings." in key for key in shapes):
        return f"it is a CLIP in the layout of the transformers library. {ADVICE}"
    if any(key.endswith("logit_scale") for key in shapes):
        return f"it is a CLIP whose architecture cannot be determined from its shapes. Give the architecture yourself. {ADVICE}"
    if any(key.startswith(("text_model.", "transformer.text_model.")) for key in shapes):
        return f"it is the text encoder of a CLIP, as Stable Diffusion uses it; guidance needs the image encoder too. {ADVICE}"
    if any(".output_blocks." in f".{key}" for key in shapes):
        return "it is a diffusion model, not a CLIP; load it as the diffusion model."
    first = ", ".join(sorted(shapes)[:3]) or "nothing"
    return f"it is not a CLIP: no tensor is named {ANCHOR} (the first names are {first}). {ADVICE}"


def described(found: Mapping[str, Any]) -> str:
    """'12 layers, patch 16, width 768, 224 px and an embedding of 512'."""
    vision = found["vision"]
    layers = vision["layers"]
    kind = f"ResNet {'-'.join(map(str, layers))}" if isinstance(layers, tuple) else f"{layers} layers, patch {vision['patch_size']}"
    return f"{kind}, width {vision['width']}, {vision['image_size']} px and an embedding of {found['embed_dim']}"
