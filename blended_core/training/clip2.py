"""Trains the CLIP of world 2, an open_clip model of the embedded one's size.

    python -m blended_core.training.clip2 --init FILE.safetensors --ddpm runs/ddpm2/ddpm.safetensors --out runs/clip2 --minutes 60

It sees what guidance shows it: whole scenes and regions with gray outside, clean, noisy or blurred, and warped; with ``--ddpm`` most
pictures are what that diffusion model makes of noised scenes (its x̂0). Captions are matched with every picture of the batch that they
are true of. No caption is true of a corrupted object. ``--pictures FOLDER`` trains on one's own pictures in place of world 2: beside each
``NAME.png`` or ``.jpg`` a ``NAME.txt`` holds its captions, one a line. ``--init`` takes the weights of an earlier CLIP, whose words keep their vectors.
The same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clip.words import WORDS as WORDS_OF_TEXT
from ..clip.words import WordTokenizer
from ..evaluation.world2_cases import SHOWN, corrupted, coverage, describe, mask_in, random_mask
from ..io.atomic import replacing
from ..toy.world2 import GROUNDS, SIDE, WORDS, FloatImage, Scene, draw, random_scene
from ..toy.world2_sources import HELD_BACK, TRAINING
from .clip import CONFIG, CORRUPTED, ESTIMATE_LEVELS, MEAN, STD, Estimate, degrade, estimator, match_matrix, matching_loss
from .ddpm2 import stopwatch

Words = dict[str, list[int]]

SAVE_EVERY = 180.0
POOL, RENEWED = 4000, 8
CORRUPTED_SHARE = 0.15
"""Of the scenes with one object."""
ESTIMATES = 0.6
"""Share of pictures that are estimates of the diffusion model."""


def vocabulary(captions: Iterable[str], known: Words | None = None) -> Words:
    """Word → its tokens. Known words keep theirs; each new word gets the next token. Token 0 fills up short texts."""
    words = dict(known or {})
    token = last_token(words)
    for word in sorted({word for caption in captions for word in WORDS_OF_TEXT.findall(caption.lower())} - set(words)):
        token += 1
        words[word] = [token]
    return words


def last_token(words: Words) -> int:
    """The largest token of any word, or 0."""
    return max((token for tokens in words.values() for token in tokens), default=0)


def captions_of_world() -> Iterator[str]:
    """Many captions of every ground, with each word."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        for ground in GROUNDS:
            for things in (frozenset(), frozenset({WORDS[int(rng.integers(len(WORDS)))]})):
                yield describe(rng, things, ground).text


def extended_rows(rows: Tensor, added: int) -> Tensor:
    """Token embeddings of a CLIP for ``added`` more words. A new word begins near the row that all unknown words share.

    The last three rows are those of unknown words, of the start and of the end, before and after.
    """
    shared = rows[-3]
    new = shared + 0.01 * torch.randn(added, rows.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat([rows[:-3], new, rows[-3:]])


Shown = tuple[Scene, np.ndarray, bool]
"""A scene, its picture [64, 64, 3] uint8, and whether its objects are whole."""


Batch = tuple[Tensor, Tensor, list[str], Tensor]
"""Pictures [B, 3, 64, 64] in −1..1, their masks [B, 1, 64, 64], captions, and [captions, pictures]: 1 where a caption is true."""


class FolderExamples:
    """An endless stream of crops of captioned pictures. A caption is true of every picture that has it among its own."""

    def __init__(self, rng: np.random.Generator, folder: Path) -> None:
        self.rng = rng
        self.rows: list[tuple[Image.Image, list[str]]] = []
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")):
            text = path.with_suffix(".txt")
            captions = [line.strip() for line in text.read_text("utf-8").splitlines() if line.strip()] if text.is_file() else []
            if captions:
                self.rows.append((Image.open(path, formats=("JPEG", "PNG", "WEBP")).convert("RGB"), captions))
        if len(self.rows) < 2:
            raise SystemExit(f"{folder} holds {len(self.rows)} pictures with a caption; at least 2 are needed (NAME.png beside NAME.txt).")

    def captions(self) -> list[str]:
        """All of them."""
        return [caption for _, captions in self.rows for caption in captions]

    def draw(self, batch: int) -> Batch:
        """The next pictures: each shows at least 0.7 of its short side, in half of the cases mirrored."""
        rng = self.rng
        chosen = [self.rows[int(i)] for i in rng.integers(len(self.rows), size=batch)]
        pictures = []
        for picture, _ in chosen:
            side = min(picture.size) * rng.uniform(0.7, 1)
            left, top = rng.uniform() * (picture.width - side), rng.uniform() * (picture.height - side)
            piece = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
            pictures.append(piece[:, ::-1] if rng.uniform() < 0.5 else piece)
        captions = [own[int(rng.integers(len(own)))] for _, own in chosen]
        truth = torch.tensor([[float(caption in own) for _, own in chosen] for caption in captions])
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return x, torch.ones(batch, 1, SIDE, SIDE), captions, truth


class Examples:
    """An endless stream of (picture, mask, what it shows), from a pool of scenes that is renewed slowly."""

    def __init__(self, rng: np.random.Generator, size: int, estimate: Estimate | None) -> None:
        self.rng, self.estimate = rng, estimate
        self.pool: list[Shown] = []
        while len(self.pool) < size:
            self.pool += self._scenes(min(64, size - len(self.pool)))

    def _scene(self) -> Shown:
        scene = random_scene(self.rng)
        whole = len(scene.objects) != 1 or self.rng.uniform() >= CORRUPTED_SHARE
        picture: FloatImage = draw(scene) if whole else corrupted(self.rng, scene)
        return scene, (picture * 255 + 0.5).clip(0, 255).astype(np.uint8), whole

    def _scenes(self, count: int) -> list[Shown]:
        scenes = [self._scene() for _ in range(count)]
        noised = [i for i in range(count) if self.estimate is not None and self.rng.uniform() < ESTIMATES]
        if noised and self.estimate is not None:
            levels = np.array([self.rng.integers(*ESTIMATE_LEVELS[scenes[i][2]]) for i in noised])
            for i, picture in zip(noised, self.estimate(np.stack([scenes[i][1] for i in noised]), levels), strict=True):
                scenes[i] = (scenes[i][0], picture, scenes[i][2])
        return scenes

    def draw(self, batch: int) -> Batch:
        """The next masked pictures, with a caption of each that is not corrupted."""
        rng = self.rng
        for shown in self._scenes(RENEWED):
            self.pool[int(rng.integers(len(self.pool)))] = shown
        pictures: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        truths: list[tuple[frozenset[str], str]] = []
        while len(pictures) < batch:
            scene, picture, whole = self.pool[int(rng.integers(len(self.pool)))]
            mask = np.ones((SIDE, SIDE), np.float32) if rng.uniform() < 0.25 else random_mask(rng, scene)
            if mask is None:
                continue
            inside = [placed.name for placed in scene.objects if coverage(mask, placed) >= SHOWN]
            pictures.append(picture)
            masks.append(mask)
            truths.append((frozenset(inside if whole else [CORRUPTED] * bool(inside)), scene.word))
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        said = [describe(rng, *t) for t in truths if CORRUPTED not in t[0]]
        return x, torch.from_numpy(np.stack(masks))[:, None], [c.text for c in said], match_matrix(said, truths)


def named(model: Any, tokens: Any, device: torch.device, split: str, noise: float, count: int = 320) -> float:
    """How often the right one of all words is named for a masked region, by captions like 'a dog'."""
    rng = np.random.default_rng(999)
    pictures, truth = [], []
    for i in range(count):
        scene = random_scene(rng, objects=1, split=split)
        placed = scene.objects[0]
        mask = mask_in(rng, placed.x, placed.y, (placed.size * 0.6, placed.size * 0.6))
        x = torch.from_numpy(draw(scene)).permute(2, 0, 1) * 2 - 1
        x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        pictures.append(x * torch.from_numpy(mask))
        truth.append(WORDS.index(placed.name))
    with torch.no_grad():
        text = model.encode_text(tokens([f"a {name}" for name in WORDS]), normalize=True)
        image = model.encode_image(torch.stack(pictures).to(device), normalize=True)
    return float(((image @ text.T).argmax(1).cpu() == torch.tensor(truth)).float().mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/clip2"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=Path, help="weights of a CLIP to begin from")
    parser.add_argument("--ddpm", type=Path, help="the diffusion model that it will guide")
    parser.add_argument("--pictures", type=Path, help="train on the captioned pictures of this folder instead of world 2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    folder = FolderExamples(np.random.default_rng(args.seed), args.pictures) if args.pictures else None
    known: Words = {}
    if args.init:
        with safe_open(str(args.init), "pt") as file:
            known = json.loads(file.metadata()["words"])
    words = vocabulary(folder.captions() if folder else captions_of_world(), known)
    unknown = 1 + last_token(words)
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": unknown + 3}}
    model = open_clip.CLIP(**config).to(device)
    if args.init:
        weights = {k: v.float() for k, v in load_file(args.init).items()}
        weights["token_embedding.weight"] = extended_rows(weights["token_embedding.weight"], len(words) - len(known))
        model.load_state_dict(weights)
    tokenizer = WordTokenizer(words, unknown, CONFIG["text_cfg"]["context_length"])
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, elapsed = 0, 0.0
    state_path = args.out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, elapsed = state["ema"], state["step"], state["elapsed"]

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(texts).to(device)

    def save() -> None:
        whole = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": step, "elapsed": elapsed}
        with replacing(state_path) as part:
            torch.save(whole, part)
        meta = {
            "format": "pt",
            "config": json.dumps(CONFIG),
            "mean": json.dumps(MEAN),
            "std": json.dumps(STD),
            "words": json.dumps(words),
            "trained_steps": str(step),
        }
        with replacing(args.out / "clip.safetensors") as part:
            save_file({k: v.half().contiguous() for k, v in ema.items()}, str(part), metadata=meta)

    def tell() -> None:
        if folder:
            return
        shadow = open_clip.CLIP(**config).to(device).eval()
        shadow.load_state_dict(ema)
        for split in (TRAINING, HELD_BACK):
            rates = ", ".join(f"noise {noise} {named(shadow, tokens, device, split, noise):.3f}" for noise in (0.0, 0.4, 0.8))
            print(f"  named, {split}: {rates}", flush=True)

    estimate = estimator(device, np.random.default_rng((args.seed, step, 1)), args.ddpm) if args.ddpm else None
    examples: Examples | FolderExamples = folder or Examples(np.random.default_rng((args.seed, step)), POOL, estimate)
    examples.rng = np.random.default_rng((args.seed, step, 2))
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    clock = stopwatch(device)
    average, last, saved = None, clock(), time.monotonic()
    while (progress := elapsed / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200, max(0.01, (1 - progress) / 0.6))
        x, mask, captions, truth = examples.draw(args.batch)
        image = model.encode_image(degrade(x, mask, generator).to(device), normalize=True)
        text = model.encode_text(tokens(captions), normalize=True)
        loss = matching_loss(model.logit_scale.exp() * text @ image.T, truth.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.0)
            decay = min(0.998, (1 + step) / (10 + step))
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        now = clock()
        elapsed, last = elapsed + now - last, now
        if step % 100 == 0:
            print(f"step {step} {elapsed / 60:.1f} min  loss {average:.3f}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            tell()
            last, saved = clock(), time.monotonic()
    save()
    tell()


if __name__ == "__main__":
    main()
