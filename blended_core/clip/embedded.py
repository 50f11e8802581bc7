"""The embedded CLIP: small encoders for the words of the toy world, read from one file without open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..toy.models import CLIP
from .towers import Clip, clip_of
from .words import WordTokenizer


def load_embedded(path: Path = CLIP) -> tuple[Clip, WordTokenizer, dict[str, Any]]:
    """(encoders in float32, tokenizer, metadata) of the file.

    The file has one row of embeddings for each token of its words, one for all other words, and those of start and end. Its metadata are the sizes of
    the encoders, the mean and deviation of the training images, and the tokens of every word.
    """
    with safe_open(str(path), "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items() if key in ("config", "mean", "std", "words")}
        weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 (not a mapping)
    rows = len(weights["token_embedding.weight"])
    config = {**meta["config"], "text_cfg": {**meta["config"]["text_cfg"], "vocab_size": rows}}
    model = clip_of(config)
    model.load_state_dict(weights, assign=True)
    model.train(False).requires_grad_(False)
    return model, WordTokenizer(meta["words"], rows - 3, config["text_cfg"]["context_length"]), meta
