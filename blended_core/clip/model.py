"""CLIP models, embedded or of open_clip: prompts to embeddings, and a differentiable image encoder."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..device import DTYPES, DeviceContext, fast_precision
from ..errors import BlendedError, BlendedWarning
from ..paths import expanded
from ..toy.models import CLIP
from ..toy.world import BACKGROUNDS, OBJECTS
from ..weights.open import file_errors, open_weights
from .embedded import has_words, load_word_clip
from .files import ADVICE, QUICKGELU, architecture_in, open_clip_weights
from .hub import weights_of_tag
from .network import build_network, build_tokenizer, fill_network, text_settings
from .towers import VisionTransformer, vision_transformer

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LARGE_WIDTH = 512
"""Width of an image encoder from which bfloat16 pays: below it, what is saved in the matrices is lost in the conversions."""
MAX_TAGS = 8
"""Tags that an error lists."""


@dataclass(frozen=True)
class Prompt:
    """Encoded texts: ``embeddings`` [P, D] and one weight for each text. A prompt without texts asks for removal."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Prompt({', '.join(f'{text!r}: {weight:g}' for text, weight in zip(self.texts, self.weights, strict=True))})"


class ClipModel:
    """A CLIP model.

    Args:
        model: a module with ``encode_image`` and ``encode_text``.
        tokenizer: texts → token ids [P, context_length], truncated to that length.
        name: for messages and reports.
        mean, std: of the training images, in 0..1.
        image_size: side of the input images in pixels.
        context_length: number of tokens of a text, including start and end.
        known_tokens: the ids that occurred in training if others did not, else None.
        vocabulary: the words of ``known_tokens``, for a warning.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        context_length: int,
        known_tokens: frozenset[int] | None = None,
        vocabulary: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)
        self.image_size = image_size
        self.context_length = context_length
        self.known_tokens = known_tokens
        self.vocabulary = vocabulary

    def __repr__(self) -> str:
        return f"ClipModel({self.name!r}, {self.image_size} px, {self.context_length} tokens)"

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.model.parameters()).device

    def prompt(self, *texts: str, weights: Sequence[float] | None = None) -> Prompt:
        """Encodes texts. Blank texts are left out, so ``prompt('')`` asks for removal.

        Args:
            weights: one for each text; None: 1 for all.

        Raises:
            BlendedError: if there are not as many weights as texts.

        Warns:
            BlendedWarning: if a text is longer than the context and is truncated, or has words that did not occur in the training of the model.
        """
        chosen = [1.0] * len(texts) if weights is None else [float(w) for w in weights]
        if len(chosen) != len(texts):
            raise BlendedError(f"{len(texts)} prompts were given with {len(chosen)} weights; give one weight for each.")
        used = [(t.strip(), w) for t, w in zip(texts, chosen, strict=True) if t.strip()]
        if not used:
            return Prompt((), (), torch.zeros(0, 0))
        for text, _ in used:
            self._check_text(text)
        tokens = self.tokenizer([t for t, _ in used]).to(self.device)
        return Prompt(tuple(t for t, _ in used), tuple(w for _, w in used), self.encode_tokens(tokens))

    def _check_text(self, text: str) -> None:
        """Warns about a text that is too long or has unknown words."""
        encode, decode = self._coder()
        ids = list(encode(text))
        limit = self.context_length - 2  # without start and end
        if len(ids) > limit:
            message = f"the prompt has {len(ids)} tokens and {self.name} reads {limit}; it was cut before «{decode(ids[limit:]).strip()}»."
            warnings.warn(BlendedWarning(message), stacklevel=3)
        known = self.known_tokens
        unknown = [] if known is None else [w for w in text.lower().split() if any(i not in known for i in encode(w))]
        if unknown:
            message = (
                f"the {self.name} CLIP was not trained on {', '.join(f'«{w}»' for w in unknown)}; it knows {self.vocabulary}. "
                "For other words use a model of open_clip, such as ViT-B-16:openai."
            )
            warnings.warn(BlendedWarning(message, option="clip"), stacklevel=3)

    def _coder(self) -> tuple[Callable[[str], Sequence[int]], Callable[[Sequence[int]], str]]:
        """(text → ids without start and end, ids → text), for tokenizers of open_clip and of Hugging Face."""
        if hasattr(self.tokenizer, "encode"):
            return self.tokenizer.encode, self.tokenizer.decode
        inner = self.tokenizer.tokenizer
        return lambda text: inner.encode(text, add_special_tokens=False), inner.decode

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids [P, context_length] → embeddings [P, D] float32, not normalized; never inference tensors, so a gradient can use them."""
        with torch.inference_mode(False), torch.no_grad():
            out: Tensor = self.model.encode_text(tokens.clone()).float()  # type: ignore[operator]
        return out

    def encode_normalized(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], already normalized with mean and std → embeddings [B, D] float32, differentiable."""
        out: Tensor = self.model.encode_image(images.to(self.image_dtype)).float()  # type: ignore[operator]
        return out

    @property
    def image_dtype(self) -> torch.dtype:
        """The precision of the image encoder."""
        return next(getattr(self.model, "visual", self.model).parameters()).dtype

    def in_precision(self, name: str, device: torch.device | None = None) -> ClipModel:
        """This model, its image encoder in another precision; texts are always encoded in float32.

        Args:
            name: 'fp32', 'bf16', 'fp16', or 'auto': for a vision transformer of at least :data:`LARGE_WIDTH` what
                :func:`~blended_core.device.fast_precision` says of the device, else float32. Gradients in bfloat16 differ by about a hundredth.
                open_clip's own encoders, such as ResNets, stay in float32, because they are slower in bfloat16. The weights themselves are
                rounded: from half precision, load the model again for float32.
            device: where it will compute, if its weights are elsewhere now.

        Raises:
            BlendedError: for an unknown precision.
        """
        if name != "auto" and name not in DTYPES:
            raise BlendedError(f"unknown precision {name!r}; known are auto, {', '.join(DTYPES)}.", option="clip_dtype")
        visual = getattr(self.model, "visual", None)
        if isinstance(visual, VisionTransformer):
            large = visual.config.blocks.width >= LARGE_WIDTH
            automatic = fast_precision(device or self.device) if large else torch.float32
            visual.to(automatic if name == "auto" else DTYPES[name])
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in −1..1, S = ``image_size`` → embeddings [B, D] float32, differentiable."""
        if self.mean.device != images.device:  # once: a copy to a device waits for it
            with torch.inference_mode(False):
                self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return self.encode_normalized(((images + 1) / 2 - self.mean.to(images)) / self.std.to(images))


def load_clip(context: DeviceContext, spec: str = "embedded", *, folder: Path | None = None) -> ClipModel:
    """A CLIP model by name.

    Args:
        context: where it runs.
        spec: 'embedded'; ``MODEL:TAG`` of open_clip (``ViT-B-16:openai``), whose weights are downloaded if they are not on this computer;
            ``MODEL:FILE`` with a local file of weights; or ``FILE``, whose architecture is determined from its shapes.
        folder: where the user keeps files of weights, for the error about weights that cannot be downloaded.

    Raises:
        BlendedError: for an unknown model or tag, a file that is absent or does not fit, or a failed download.

    Warns:
        BlendedWarning: if the activation of a file is unknown.
    """
    if spec == "embedded":
        with context.autograd():
            return _of_words(context, CLIP, "embedded", f"{', '.join(OBJECTS)} and {', '.join(BACKGROUNDS)}")
    if os.path.isfile(expanded(spec)):  # False, and no error, for a name that no file can have
        return load_clip_file(context, Path(spec))
    name, weights, tags = _name_and_tag(spec)
    if weights in tags:
        return load_clip_tag(context, spec, folder=folder)
    if not os.path.isfile(expanded(weights)):
        raise BlendedError(f"{weights!r} is neither a file nor a tag of {name} in open_clip; {_listed(tags)}.", option="clip")
    return load_clip_file(context, Path(weights), name)


def load_clip_file(context: DeviceContext, path: Path, architecture: str = "") -> ClipModel:
    """A CLIP model from a file of weights. Nothing is downloaded.

    Args:
        context: where it runs.
        path: a safetensors file, a file of torch.save or a TorchScript archive. Names may have any prefix; averaged weights (EMA) are preferred.
            A file that states its words (:mod:`blended_core.clip.embedded`) needs no architecture.
        architecture: open_clip's name of the network; '' determines it from the shapes.

    Raises:
        BlendedError: if the architecture is unknown, the file is absent or damaged, does not match the network in every name and shape, or has
            values that are not finite.

    Warns:
        BlendedWarning: if the activation of the file is unknown.
    """
    path = expanded(path)
    with file_errors(path, "clip"):
        if has_words(open_weights(path, ADVICE)):
            with context.autograd():
                return _of_words(context, path, str(path))
    import open_clip

    known = _known(architecture) if architecture else ""
    name, model = _loaded(context, path, known, lambda: file_errors(path, "clip"))
    if name + QUICKGELU in open_clip.list_models():
        message = f"a file does not state its activation; for weights of OpenAI, MetaCLIP or DFN use {name + QUICKGELU}:FILE."
        warnings.warn(BlendedWarning(message, option="clip"), stacklevel=3)
    return model


def load_clip_tag(context: DeviceContext, spec: str, *, folder: Path | None = None) -> ClipModel:
    """A CLIP model with published weights, downloaded if they are not on this computer. Opens no file that ``spec`` names.

    Args:
        context: where it runs.
        spec: ``MODEL:TAG`` of open_clip.
        folder: as for :func:`load_clip`.

    Raises:
        BlendedError: for an unknown model or tag, a failed download, or weights as for :func:`load_clip_file`.
    """
    import open_clip

    name, tag, tags = _name_and_tag(spec)
    if tag not in tags:
        raise BlendedError(f"{tag!r} is not a tag of {name} in open_clip; {_listed(tags)}.", option="clip")
    # The activation that weights were trained with may differ from the configuration of the model; only the entry of their tag states it.
    quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    architecture = name + QUICKGELU if quick and name + QUICKGELU in open_clip.list_models() else name
    use = f"use {architecture}:FILE." if folder is None else f"put it into {folder} (architecture {architecture})."
    path = weights_of_tag(name, tag, use)
    return _loaded(context, path, name, lambda: _errors_of_tag(spec, path), tag)[1]


@contextlib.contextmanager
def _errors_of_tag(spec: str, path: Path) -> Iterator[None]:
    """Adds to the errors about a downloaded file where it is."""
    try:
        yield
    except BlendedError as error:
        raise BlendedError(f"{spec}: {error} The file is {path}; if you delete it, it is downloaded again.", option="clip") from None


def _loaded(
    context: DeviceContext, path: Path, name: str, errors: Callable[[], contextlib.AbstractContextManager[None]], tag: str = ""
) -> tuple[str, ClipModel]:
    """(architecture, model) with the weights in a file.

    Args:
        name: of the architecture; '' determines it from the shapes.
        errors: the scope in which the file is read, for the errors about it.
        tag: the file is that of a tag; what its text encoder needs beside the weights is downloaded with it.
    """
    import open_clip

    with context.autograd():
        with errors():
            file, names = open_clip_weights(path)
            name = name or architecture_in(file)
            file.check_size(names.values())
        tags = open_clip.list_pretrained_tags_by_model(name)
        # The weights of one architecture were trained with the same normalization of pictures, so that of a tag is right for a file too.
        entry = open_clip.get_pretrained_cfg(name, tag or tags[0]) if tag or tags else {}
        text = text_settings(name, download=bool(tag))
        network: Any = build_network(name, text, quick=bool(tag and entry.get("quick_gelu")))
        with errors():
            fill_network(network, file, names)
        tokenizer, size = build_tokenizer(name, text), network.visual.image_size
        network.visual = vision_transformer(network.visual) or network.visual
        return name, ClipModel(
            context.place(network), tokenizer, f"{name}:{tag or path}", entry.get("mean") or OPENAI_MEAN, entry.get("std") or OPENAI_STD,
            int(size[0] if isinstance(size, (tuple, list)) else size), int(getattr(tokenizer, "context_length", 77) or 77),
        )  # fmt: skip


def _name_and_tag(spec: str) -> tuple[str, str, list[str]]:
    """(model, what follows it, its tags) of ``MODEL:TAG``; BlendedError if open_clip does not have the model, or nothing follows."""
    import open_clip

    name, _, weights = spec.partition(":")
    name = _known(name)
    tags: list[str] = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise BlendedError(
            f"{name} names no weights; add a tag ({name}:{tags[0] if tags else 'TAG'}) or a file ({name}:weights.safetensors).",
            option="clip",
        )
    return name, weights, tags


def _known(name: str) -> str:
    """The name of a model of open_clip, also where it was written with a slash; BlendedError if there is no such model."""
    import open_clip

    name = name.replace("/", "-")
    if name not in open_clip.list_models():
        similar = [m for m in open_clip.list_models() if m.lower().startswith(name.lower()[:5])][:6]
        suggestion = f"similar names are {', '.join(similar)}" if similar else "try ViT-B-16:openai or embedded"
        raise BlendedError(f"open_clip has no model {name!r}; {suggestion}.", option="clip")
    return name


def _listed(tags: Sequence[str]) -> str:
    more = f" and {len(tags) - MAX_TAGS} more" if len(tags) > MAX_TAGS else ""
    return f"its tags are {', '.join(tags[:MAX_TAGS])}{more}" if tags else "it has no tags"


def _of_words(context: DeviceContext, path: Path, name: str, vocabulary: str = "") -> ClipModel:
    """A CLIP with whole words as tokens; ``vocabulary`` describes them in a warning about other words."""
    clip = load_word_clip(path)
    known = frozenset(range(clip.tokenizer.unknown))
    return ClipModel(
        context.place(clip.model), clip.tokenizer, name, clip.mean, clip.std, clip.image_size, clip.tokenizer.context_length, known,
        vocabulary or ", ".join(clip.tokenizer.words),
    )  # fmt: skip
