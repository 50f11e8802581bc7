"""CLIP models with whole words as tokens, read without open_clip: the embedded one, and those that :mod:`blended_core.training.clip2` trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BlendedError
from ..weights.open import WeightsFile, json_object, open_weights
from .towers import Clip, clip_of
from .words import WordTokenizer

MAX_SIZE = 1 << 16
"""The largest number in a configuration."""
KEYS = ("config", "mean", "std", "words")
"""Entries of the metadata of a file, in JSON."""


@dataclass(frozen=True)
class WordClip:
    """Encoders in float32, their tokenizer, the mean and deviation of the training images, and the side of an image in pixels."""

    model: Clip
    tokenizer: WordTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int


def has_words(file: WeightsFile) -> bool:
    """Whether a file states the words of its text encoder."""
    return "words" in file.metadata


def load_word_clip(path: Path) -> WordClip:
    """The CLIP in a safetensors file whose metadata state the sizes of the encoders, the mean and deviation of the images, and the tokens of every word.

    The file has one row of embeddings for each token of its words, then one for all other words, and those of the start and the end of a text.

    Raises:
        BlendedError: if the file cannot be read, or its metadata or tensors are not of that form. The text does not name the file.
    """
    file = open_weights(path)
    missing = [key for key in KEYS if key not in file.metadata]
    if missing:
        raise BlendedError(
            f"its metadata lack {', '.join(missing)}, which a CLIP of whole words states; train it with blended_core.training.clip2."
        )
    # One object around the four texts: each is JSON of its own kind.
    meta = json_object("{" + ", ".join(f'"{key}": {file.metadata[key]}' for key in KEYS) + "}", "its metadata")
    rows = file.shapes.get("token_embedding.weight", (0, 0))[0]
    try:
        config = _checked(meta["config"])
        words = {str(word): tuple(map(int, tokens)) for word, tokens in meta["words"].items()}
        mean, std = (tuple(map(float, meta[key])) for key in ("mean", "std"))
        if not 4 <= rows <= MAX_SIZE or not all(0 < token <= rows - 4 for tokens in words.values() for token in tokens):
            raise ValueError(f"a token is not one of its {rows} rows of embeddings")
        if len(mean) != 3 or len(std) != 3 or not all(-10 < m < 10 for m in mean) or not all(0 < s < 10 for s in std):
            raise ValueError("mean and std must be three numbers each, std above 0")
        config["text_cfg"]["vocab_size"] = rows
        model = clip_of(config)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise BlendedError(
            f"its metadata do not describe a CLIP of whole words ({type(error).__name__}: {error}); use another file."
        ) from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := sorted(name for name in wanted.keys() | file.shapes.keys() if wanted.get(name) != file.shapes.get(name)):
        name = wrong[0]
        raise BlendedError(
            f"{len(wrong)} tensors do not fit its configuration, such as {name}: {file.shapes.get(name, 'absent')} instead of "
            f"{wanted.get(name, 'absent')}; use another file."
        )
    file.check_size(wanted)
    model.load_state_dict({name: file.take(name).float() for name in wanted}, assign=True)
    model.train(False).requires_grad_(False)
    tokenizer = WordTokenizer(words, rows - 3, config["text_cfg"]["context_length"])
    return WordClip(model, tokenizer, mean, std, config["vision_cfg"]["image_size"])


def _checked(config: Any) -> dict[str, Any]:
    """A copy of a configuration whose values are whole numbers from 1 to MAX_SIZE, or groups of such."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out[key] = _checked(value)
        elif type(value) is int and 1 <= value <= MAX_SIZE:
            out[key] = value
        else:
            raise ValueError(f"{key} is {value!r:.40}, not a whole number from 1 to {MAX_SIZE}")
    return out
