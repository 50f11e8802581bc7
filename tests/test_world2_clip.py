"""The recipe of world 2's CLIP: one's own captioned pictures, and words that an earlier CLIP lacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from blended_core.demo.train_clip2 import FolderExamples, merged_rows
from blended_core.demo.world2 import SIDE


def test_a_caption_is_true_of_every_picture_that_has_it(tmp_path: Path) -> None:
    for name, lines in (("a", "a red square\na square\n"), ("b", "a square\n"), ("c", "")):
        Image.new("RGB", (80, 70), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(lines, encoding="utf-8")
    examples = FolderExamples(np.random.default_rng(0), tmp_path)
    assert sorted(examples.captions()) == ["a red square", "a square", "a square"]
    x, mask, captions, truth = examples.draw(12)
    assert x.shape == (12, 3, SIDE, SIDE) and mask.shape == (12, 1, SIDE, SIDE)
    for caption, row in zip(captions, truth.tolist(), strict=True):
        assert (sum(row) == 12) == (caption == "a square")


def test_a_word_that_an_earlier_clip_lacked_begins_with_the_shared_row() -> None:
    rows = torch.arange(6.0)[:, None].repeat(1, 3)  # of tokens 0, 5 and 9, of all others, of start and end
    new = merged_rows(rows, [0, 5, 9, 49406, 49407], [0, 5, 7, 9, 49406, 49407])
    assert new[:, 0].round().tolist() == [0, 1, 3, 2, 3, 4, 5]
