"""Files of CLIP weights: which of open_clip's architectures they are of, told by names and shapes alone."""

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

from ..adm.load import open_checkpoint
from ..errors import BlendedError
from ..weights.torchscript import is_torchscript, read_torchscript

Shapes = Mapping[str, Sequence[int]]
ANCHOR = "visual.conv1.weight"
QUICK = "-quickgelu"
BESIDE = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's archives carry beside the weights
PATIENCE = 10.0  # seconds for an answer from where weights are fetched
WANTED = "Use weights in the layout of OpenAI's CLIP or of open_clip, or choose a tag."


def architecture_of(path: Path) -> str:
    """The name in open_clip of the network that a file's weights belong to.

    Shapes do not tell the activation: where open_clip has the same network with OpenAI's QuickGELU under another name, that one is
    meant for an archive of TorchScript, which is how OpenAI published its weights, and the plain one for any other file.

    Raises:
        BlendedError: if the file cannot be read, is no CLIP, or of a size that open_clip does not know.
    """
    scripted = is_torchscript(path)
    shapes: Shapes = (
        open_checkpoint(path).shapes if not scripted else {k: v.shape for k, v in read_torchscript(path, numbers=False).items()}
    )
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


@dataclass(frozen=True)
class Source:
    """Where open_clip gets the weights of a tag: ``address`` of a file or a repository, ``file`` in it, ``folder`` where they are kept."""

    address: str
    file: str
    folder: Path
    kept: bool


def source_of(name: str, tag: str) -> Source:
    """Where open_clip gets the weights of a tag, and whether they are on this computer already."""
    import open_clip
    from huggingface_hub import constants, try_to_load_from_cache  # open_clip depends on it

    known = open_clip.get_pretrained_cfg(name, tag)
    repository, _, file = str(known.get("hf_hub", "")).rpartition("/")
    if not repository:
        address = str(known.get("url", ""))
        folder, file = Path("~/.cache/clip").expanduser(), address.rpartition("/")[2]
        return Source(address, file, folder, (folder / file).is_file())
    files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cache = Path(constants.HF_HUB_CACHE)
    kept = any(isinstance(try_to_load_from_cache(repository, f, cache_dir=cache), str) for f in files)
    folder = cache / f"models--{repository.replace('/', '--')}"
    return Source(f"{constants.ENDPOINT}/{repository}", " or ".join(files), folder, kept)


def unreachable(address: str) -> str:
    """Why an address cannot be reached, in a few words, or '' if something answers there.

    Asked beforehand, since the downloader asks a dead network a dozen times over a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE):
            return ""
    except urllib.error.HTTPError:  # an answer, if not a friendly one
        return ""
    except http.client.HTTPException:  # no answer that it understands, but one
        return ""
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):  # the downloader may trust others than Python does
            return ""
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


def quick_name(name: str) -> str:
    """The architecture with OpenAI's activation, if open_clip has one under another name."""
    import open_clip

    return name + QUICK if name + QUICK in open_clip.list_models() else name


def scripted_weights(path: Path) -> dict[str, Tensor]:
    """The weights in an archive of TorchScript, in float32.

    Raises:
        BlendedError: if it cannot be read.
    """
    return {k: v.float() for k, v in read_torchscript(path).items() if k not in BESIDE}


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
