"""Files of CLIP weights: their architecture in open_clip, determined from names and shapes, and whether the weights of a tag can be obtained."""

from __future__ import annotations

import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BlendedError
from ..weights.open import file_errors, open_weights
from ..weights.torchscript import is_torchscript, read_torchscript

Shapes = Mapping[str, Sequence[int]]
ANCHOR = "visual.conv1.weight"
"""A tensor that CLIP models with a ViT or a ResNet of OpenAI's layout have."""
QUICKGELU = "-quickgelu"
"""Suffix of open_clip's architectures with OpenAI's activation."""
ARCHIVE_CONSTANTS = ("input_resolution", "context_length", "vocab_size")
"""Entries of OpenAI's archives that are not weights."""
TIMEOUT_SECONDS = 10.0
"""For the first response of a server of weights."""
ADVICE = "Use weights in the layout of OpenAI's CLIP or of open_clip, or choose a tag."


def architecture_of(path: Path) -> str:
    """The architecture in open_clip that a file of weights belongs to.

    The shapes do not determine the activation. Where open_clip has the same network with OpenAI's QuickGELU under another name, a TorchScript archive,
    the format in which OpenAI published its weights, belongs to that one, and any other file to the plain one.

    Raises:
        BlendedError: if the file cannot be read, is not a CLIP, or of a size that open_clip does not know.
    """
    with file_errors(path, "clip"):
        scripted = is_torchscript(path)
        shapes: Shapes = (
            {k: v.shape for k, v in read_torchscript(path, values=False).items()} if scripted else open_weights(path, ADVICE).shapes
        )
        found = signature(shapes)
        names = [name for name, known in known_signatures().items() if known == found]
        if not names:
            raise BlendedError(
                f"it is a CLIP with {described(found)}, and open_clip has no such network; give the architecture yourself if you know it."
            )
    return min(names, key=lambda name: ((QUICKGELU in name) != scripted, len(name), name))


@dataclass(frozen=True)
class WeightsSource:
    """Where open_clip obtains the weights of a tag: ``address`` of a file or a repository, ``file`` in it, ``folder`` of the downloaded copy."""

    address: str
    file: str
    folder: Path
    downloaded: bool


def source_of(name: str, tag: str) -> WeightsSource:
    """Where open_clip obtains the weights of a tag, and whether they are on this computer."""
    import open_clip
    from huggingface_hub import constants, try_to_load_from_cache  # a dependency of open_clip

    known = open_clip.get_pretrained_cfg(name, tag)
    repository, _, file = str(known.get("hf_hub", "")).rpartition("/")
    if not repository:
        address = str(known.get("url", ""))
        folder, file = Path(os.path.expanduser("~/.cache/clip")), address.rpartition("/")[2]
        return WeightsSource(address, file, folder, (folder / file).is_file())
    files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cache = Path(constants.HF_HUB_CACHE)
    downloaded = any(isinstance(try_to_load_from_cache(repository, f, cache_dir=cache), str) for f in files)
    folder = cache / f"models--{repository.replace('/', '--')}"
    return WeightsSource(f"{constants.ENDPOINT}/{repository}", " or ".join(files), folder, downloaded)


def check_available(name: str, tag: str, quick: bool, folder: Path | None) -> None:
    """Raises BlendedError if the weights of a tag are not on this computer and cannot be downloaded; the text says which file to copy where.

    Args:
        name, tag: of open_clip.
        quick: the weights were trained with OpenAI's activation.
        folder: where the user keeps files of weights; None if there is no such folder.
    """
    import open_clip

    source = source_of(name, tag)
    reason = "" if source.downloaded else unreachable(source.address)
    if not reason:
        return
    architecture = name + QUICKGELU if quick and name + QUICKGELU in open_clip.list_models() else name
    use = f"use {architecture}:FILE." if folder is None else f"put it into {folder}, and select it with the architecture {architecture}."
    raise BlendedError(
        f"the weights of {name}:{tag} are not on this computer, and {source.address} cannot be reached ({reason}). open_clip keeps them in "
        f"{source.folder}: copy that folder from a computer that has them. Or download {source.file} on another computer, and {use}",
        option="clip",
    )


def unreachable(address: str) -> str:
    """Why an address cannot be reached, in a few words; '' if a server responds.

    Checked before a download, because the downloader retries a dozen times over a minute if there is no network.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_SECONDS):
            return ""
    except (urllib.error.HTTPError, http.client.HTTPException):  # a response, even if it is an error
        return ""
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):  # the downloader may trust other certificates than Python does
            return ""
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


def torchscript_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a TorchScript archive, in float32; BlendedError if it cannot be read."""
    return {k: v.float() for k, v in read_torchscript(path).items() if k not in ARCHIVE_CONSTANTS}


def signature(shapes: Shapes) -> dict[str, Any]:
    """The sizes of both towers, from the shapes. Networks of open_clip with equal signatures have tensors of equal names and shapes.

    Raises:
        BlendedError: if the file is not a CLIP; the text says what it holds instead.
    """
    prefixes = [key[: -len(ANCHOR)] for key in shapes if key == ANCHOR or key.endswith("." + ANCHOR)]
    if not prefixes:
        raise BlendedError(why_not(shapes))
    prefix = min(prefixes, key=len)
    table = {key[len(prefix) :]: tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}
    try:
        vocabulary, width = table["token_embedding.weight"]
        text = {
            "context_length": table["positional_embedding"][0],
            "vocab_size": vocabulary,
            "width": width,
            "layers": _count(table, r"transformer\.resblocks\.(\d+)\."),
        }
        return {"embed_dim": table["text_projection"][-1], "text": text, "vision": _vision(table)}
    except (KeyError, ValueError, IndexError):
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
