"""The recipe of world 2's CLIP: one's own captioned pictures, and words that an earlier CLIP lacked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blended_core.clip.model import load_clip
from blended_core.device import DeviceContext
from blended_core.errors import BlendedError, BlendedWarning
from blended_core.toy.models import CLIP
from blended_core.toy.world2 import SIDE
from blended_core.training.clip2 import FolderExamples, extended_rows, vocabulary


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


def test_an_earlier_clip_keeps_its_words_and_new_ones_begin_with_the_row_of_unknown_words() -> None:
    known = {"apple": [1], "red": [2]}
    words = vocabulary(["a red apple", "a tree"], known)
    assert words == {**known, "a": [3], "tree": [4]}
    rows = torch.arange(6.0)[:, None].repeat(1, 3)  # of the filler, two words, unknown words, start and end
    assert extended_rows(rows, 2)[:, 0].round().tolist() == [0, 1, 2, 3, 3, 3, 4, 5]


def changed(path: Path, **metadata: str) -> Path:
    """A copy of the embedded CLIP with other metadata."""
    with safe_open(str(CLIP), "pt") as file:
        meta = {**file.metadata(), **metadata}
    save_file(load_file(CLIP), str(path), metadata=meta)
    return path


def test_a_trained_clip_of_words_is_loaded_from_its_path(tmp_path: Path) -> None:
    context = DeviceContext()
    own, embedded = load_clip(context, str(changed(tmp_path / "mine.safetensors"))), load_clip(context)
    assert torch.equal(own.prompt("an apple").embeddings, embedded.prompt("an apple").embeddings)
    assert own.name.endswith("mine.safetensors") and own.image_size == embedded.image_size
    with pytest.warns(BlendedWarning, match="zebra"):
        own.prompt("a zebra")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("config", "{}", "KeyError"),
        ("config", "[]", "AttributeError"),
        ("config", '{"embed_dim": 1e300}', "whole number"),
        (
            "config",
            '{"embed_dim": 128, "vision_cfg": {"image_size": 64, "layers": 65536, "width": 65536, "head_width": 1, "patch_size": 1}}',
            "text_cfg",
        ),
        ("words", '{"apple": [999999]}', "not one of"),
        ("words", '["apple"]', "AttributeError"),
        ("words", "{", "not valid JSON"),
        ("words", '{}, "mean": []', "three numbers"),
        ("std", "[0, 1, 1]", "above 0"),
        ("mean", "[NaN, 1, 1]", "three numbers"),
    ],
)
def test_damaged_metadata_of_a_clip_of_words_are_an_error_with_the_name_of_the_file(
    tmp_path: Path, key: str, value: str, says: str
) -> None:
    path = changed(tmp_path / "mine.safetensors", **{key: value})
    with pytest.raises(BlendedError, match=says) as error:
        load_clip(DeviceContext(), str(path))
    assert "mine.safetensors" in str(error.value)


def test_tensors_that_do_not_fit_the_stated_sizes_are_named(tmp_path: Path) -> None:
    with safe_open(str(CLIP), "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["vision_cfg"]["layers"] += 1
    with pytest.raises(BlendedError, match=r"tensors do not fit.*visual\.transformer"):
        load_clip(DeviceContext(), str(changed(tmp_path / "mine.safetensors", config=json.dumps(config))))
