"""open_clip: prompts to embeddings, and a differentiable image encoder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..device import DeviceContext
from ..errors import BlendedError, BlendedWarning
from ..toy.models import CLIP
from .files import Source, unreachable

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Prompt:
    """Texts as CLIP sees them: ``embeddings`` [P, D], ``weights`` one for each. No text at all means removal."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.texts)


class ClipModel:
    """An open_clip model.

    Args:
        model: has ``encode_image`` and ``encode_text``.
        tokenizer: texts → [P, context_length] token ids, cut to that length.
        name: for reports.
        mean, std: of the pictures it was trained on, in 0..1.
        image_size: side of its pictures in pixels.
        context_length: tokens of a text, start and end included.
        known_tokens: the only ids that it was trained on, or None for an open vocabulary.
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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)
        self.image_size = image_size
        self.context_length = context_length
        self.known_tokens = known_tokens

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def prompt(self, *texts: str, weights: Sequence[float] | None = None) -> Prompt:
        """Encodes texts; blank ones are left out, so ``prompt('')`` is removal.

        Warns (BlendedWarning) where a text is longer than the context, naming what is cut, or, with the embedded model,
        has words that it never saw. Raises BlendedError if the weights do not match the texts.
        """
        chosen = [1.0] * len(texts) if weights is None else [float(w) for w in weights]
        if len(chosen) != len(texts):
            raise BlendedError(f"{len(texts)} prompts were given with {len(chosen)} weights; give one weight for each.")
        kept = [(t.strip(), w) for t, w in zip(texts, chosen, strict=True) if t.strip()]
        if not kept:
            return Prompt((), (), torch.zeros(0, 0))
        for text, _ in kept:
            self._warn_about(text)
        tokens = self.tokenizer([t for t, _ in kept]).to(self.device)
        return Prompt(tuple(t for t, _ in kept), tuple(w for _, w in kept), self.encode_tokens(tokens))

    def _warn_about(self, text: str) -> None:
        encode, decode = self._coder()
        ids = list(encode(text))
        room = self.context_length - 2  # start and end take two
        if len(ids) > room:
            cut = decode(ids[room:]).strip()
            warnings.warn(
                f"the prompt has {len(ids)} tokens and {self.name} reads {room}; it was cut before «{cut}».", BlendedWarning, stacklevel=3
            )
        if self.known_tokens is not None:
            strange = [w for w in text.lower().split() if any(i not in self.known_tokens for i in encode(w))]
            if strange:
                from ..toy.world import BACKGROUNDS, OBJECTS

                warnings.warn(
                    f"the embedded CLIP never saw {', '.join(f'«{w}»' for w in strange)}; its little world has "
                    f"{', '.join(OBJECTS)} and {', '.join(BACKGROUNDS)}. For other words use an open_clip model (--clip ViT-B-16:openai).",
                    BlendedWarning,
                    stacklevel=3,
                )

    def _coder(self) -> tuple[Any, Any]:
        """(text → ids without start and end, ids → text); open_clip's own tokenizers and those of Hugging Face differ."""
        if hasattr(self.tokenizer, "encode"):
            return self.tokenizer.encode, self.tokenizer.decode
        inner = self.tokenizer.tokenizer
        return lambda text: inner.encode(text, add_special_tokens=False), inner.decode

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """[P, context_length] ids → [P, D] float32, not normalised; usable in a gradient also if made in inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            out: Tensor = self.model.encode_text(tokens.clone()).float()  # type: ignore[operator]
        return out

    def encode_normalised(self, pictures: Tensor) -> Tensor:
        """[B, 3, S, S], already normalised with mean and std → [B, D] float32, differentiable."""
        dtype = next(self.model.parameters()).dtype
        out: Tensor = self.model.encode_image(pictures.to(dtype)).float()  # type: ignore[operator]
        return out

    def encode_image(self, pictures: Tensor) -> Tensor:
        """[B, 3, S, S] in −1..1, S = ``image_size`` → [B, D] float32, differentiable."""
        return self.encode_normalised(((pictures + 1) / 2 - self.mean.to(pictures)) / self.std.to(pictures))


def load_clip(context: DeviceContext, spec: str = "embedded", *, folder: Path | None = None) -> ClipModel:
    """A CLIP by name.

    Args:
        context: where it runs.
        spec: 'embedded'; ``MODEL:TAG`` of open_clip (``ViT-B-16:openai``; weights that are not on this computer are
            downloaded by open_clip, because the tag asks for them); ``MODEL:FILE`` with a local file of weights; or ``FILE``,
            whose architecture is told by its shapes.
        folder: where files of weights lie that a person chooses from, for the error about weights that cannot be fetched.

    Raises:
        BlendedError: for an unknown model or tag, a file that is absent or does not fit, or a failed download.
    """
    with context.autograd():
        return _embedded(context) if spec == "embedded" else _open_clip(context, spec, folder)


def _open_clip(context: DeviceContext, spec: str, folder: Path | None) -> ClipModel:
    import open_clip

    from ..weights.torchscript import is_torchscript
    from .files import architecture_of, quick_name, scripted_weights, source_of

    if Path(spec).expanduser().is_file():
        spec = f"{architecture_of(Path(spec).expanduser())}:{Path(spec).expanduser()}"
    name, _, weights = spec.partition(":")
    name = name.replace("/", "-")
    if name not in open_clip.list_models():
        alike = [m for m in open_clip.list_models() if m.lower().startswith(name.lower()[:5])][:6]
        raise BlendedError(
            f"open_clip has no model {name!r}; {'near it are ' + ', '.join(alike) if alike else 'try ViT-B-16:openai or embedded'}."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise BlendedError(
            f"--clip {name} names no weights; add a tag ({name}:{tags[0] if tags else 'TAG'}) or a file ({name}:weights.safetensors)."
        )
    if weights not in tags and not Path(weights).is_file():
        raise BlendedError(f"{weights!r} is neither a file nor a tag of {name} in open_clip; its tags are {', '.join(tags) or 'none'}.")
    scripted = weights not in tags and is_torchscript(Path(weights))
    # Some weights were trained with another activation than the model's configuration names; only their own entry tells.
    quick = weights in tags and bool(open_clip.get_pretrained_cfg(name, weights).get("quick_gelu"))
    if weights in tags:
        _can_be_had(spec, source_of(name, weights), quick_name(name) if quick else name, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            activation = {"force_quick_gelu": True} if quick else {}
            model, _, _ = open_clip.create_model_and_transforms(name, pretrained=None if scripted else weights, **activation)
            if scripted:
                model.load_state_dict(scripted_weights(Path(weights)))
    except Exception as error:  # open_clip passes on whatever its downloader or torch raised
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "fetch it again, or choose another tag" if weights in tags else "it is damaged, or of another architecture"
        raise BlendedError(f"open_clip could not load {spec} ({first.rstrip('.')}); {what}.") from error
    if weights not in tags and not scripted and f"{name}-quickgelu" in open_clip.list_models():
        warnings.warn(
            f"a file does not say which activation it was trained with; for weights of OpenAI, MetaCLIP or DFN write {name}-quickgelu:FILE.",
            BlendedWarning,
            stacklevel=4,
        )
    tokenizer = open_clip.get_tokenizer(name)
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else int(visual.image_size)
    mean = getattr(visual, "image_mean", None) or OPENAI_MEAN
    std = getattr(visual, "image_std", None) or OPENAI_STD
    return ClipModel(context.place(model), tokenizer, spec, mean, std, size, int(getattr(tokenizer, "context_length", 77) or 77))


def _can_be_had(spec: str, source: Source, architecture: str, folder: Path | None) -> None:
    """An error for weights that are neither here nor within reach; it says which file is wanted, and where it should lie."""
    reason = "" if source.kept else unreachable(source.address)
    if not reason:
        return
    if folder is None:
        chosen = f"give it as --clip {architecture}:FILE."
    else:
        chosen = f"put it into {folder}, and choose it in Load CLIP with the architecture {architecture}."
    raise BlendedError(
        f"the weights of {spec} are not on this computer, and {source.address} cannot be reached ({reason}). open_clip would keep them in "
        f"{source.folder}: copy that from a computer that has them. Or fetch {source.file} from there on another one, and {chosen}"
    )


def _embedded(context: DeviceContext) -> ClipModel:
    import open_clip
    from safetensors import safe_open

    with safe_open(str(CLIP), "pt") as file:
        meta = file.metadata()
        weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 (no mapping)
    config, ids = json.loads(meta["config"]), json.loads(meta["vocabulary"])
    # The file holds rows for the tokens that occur in the world, then one for all others, then start and end.
    rows = weights["token_embedding.weight"]
    table = rows[len(ids) - 2].repeat(config["text_cfg"]["vocab_size"], 1)
    table[torch.tensor(ids[:-2])] = rows[: len(ids) - 2]
    table[torch.tensor(ids[-2:])] = rows[-2:]
    weights["token_embedding.weight"] = table
    model = open_clip.CLIP(**config)
    model.load_state_dict(weights)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    return ClipModel(
        context.place(model), tokenizer, "embedded", json.loads(meta["mean"]), json.loads(meta["std"]),
        config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"], frozenset(ids),
    )  # fmt: skip
