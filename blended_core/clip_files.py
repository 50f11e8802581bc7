"""Files of CLIP weights: which of open_clip's architectures they are of, told by names and shapes alone."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints.load import open_checkpoint
from .errors import BlendedError

Shapes = Mapping[str, Sequence[int]]
ANCHOR = "visual.conv1.weight"
QUICK = "-quickgelu"
WANTED = "Use weights in the layout of OpenAI's CLIP or of open_clip, or choose a tag."


def architecture_of(path: Path) -> str:
    """The name in open_clip of the network that a file's weights belong to.

    Shapes do not tell the activation: where open_clip has the same network with OpenAI's QuickGELU under another name, that one is
    meant for an archive of TorchScript, which is how OpenAI published its weights, and the plain one for any other file.

    Raises:
        BlendedError: if the file cannot be read, is no CLIP, or of a size that open_clip does not know.
    """
    scripted = is_torchscript(path)
    shapes = {k: tuple(v.shape) for k, v in scripted_weights(path).items()} if scripted else open_checkpoint(path).shapes
    try:
        found = signature(shapes)
    except BlendedError as error:
        raise BlendedError(f"{path.name}: {error}") from None
    names = [name for name, known in known_signatures().items() if known == found]
    if not names:
        raise BlendedError(
            f"{path.name}: it is a CLIP of {described(found)}, and open_clip knows no such network; set the architecture by hand if you know it."
        )
    return min(names, key=lambda name: ((QUICK in name) != scripted, len(name), name))


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript: a program with its weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def scripted_weights(path: Path) -> dict[str, Tensor]:
    """The weights in such an archive, in float32; its program is not run.

    Raises:
        BlendedError: if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch would rather have another format today
            state = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever its reader raises about a damaged archive
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BlendedError(f"{path} is no whole archive of TorchScript ({first[:200]}); fetch it again.") from None
    # Three numbers that OpenAI's archives carry beside the weights.
    return {k: v.float() for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def signature(shapes: Shapes) -> dict[str, Any]:
    """What the shapes say of both towers; two networks of open_clip with one signature have the same weights' names and shapes.

    Raises:
        BlendedError: a sentence about what the file is instead.
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
        raise BlendedError(f"it looks like a CLIP, but parts of it are missing or misshapen; fetch it again. {WANTED}") from None


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
    """One more than the highest number at a place in the names."""
    return 1 + max(int(m[1]) for key in table if (m := re.match(pattern, key)))


def known_signatures() -> dict[str, dict[str, Any]]:
    """Name → signature of every network of open_clip with towers of its own."""
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
    """A sentence about a file without a CLIP of that layout."""
    if any("vision_model.embeddings." in key for key in shapes):
        return f"it is a CLIP in the layout of the transformers library. {WANTED}"
    if any(key.endswith("logit_scale") for key in shapes):
        return f"it is a CLIP whose picture tower is of a kind that files are not recognised of. Set the architecture by hand. {WANTED}"
    if any(key.startswith(("text_model.", "transformer.text_model.")) for key in shapes):
        return f"it is the text half of a CLIP, as Stable Diffusion uses it; guidance needs the half that sees pictures too. {WANTED}"
    if any(".output_blocks." in f".{key}" for key in shapes):
        return "it is a diffusion model, not a CLIP; it belongs into Load DDPM (--ddpm)."
    first = ", ".join(sorted(shapes)[:3]) or "nothing"
    return f"it is no CLIP: nothing in it is named {ANCHOR} (its first entries are {first}). {WANTED}"


def described(found: Mapping[str, Any]) -> str:
    """'ViT layers 12, width 768, patch 16, 224 px and an embedding of 512'."""
    vision = found["vision"]
    layers = vision["layers"]
    kind = f"ResNet {'-'.join(map(str, layers))}" if isinstance(layers, tuple) else f"{layers} layers, patch {vision['patch_size']}"
    return f"{kind}, width {vision['width']}, {vision['image_size']} px and an embedding of {found['embed_dim']}"
