"""The image encoder of CLIP against open_clip's, for every structure of vision transformer that open_clip lists."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from torch import Tensor, nn

from blended_core.clip.embedded import load_embedded
from blended_core.clip.towers import vision_transformer
from blended_core.clip.words import WordTokenizer
from blended_core.toy.captions import describe
from blended_core.toy.world import OBJECTS


@cache
def structures() -> dict[str, tuple[dict[str, Any], bool]]:
    """Name of a model → (its image encoder's configuration, QuickGELU), one for each structure, made small: two blocks, 4×4 patches."""
    found: dict[str, tuple[dict[str, Any], bool]] = {}
    seen = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = dict(config.get("vision_cfg", {}))
        if "timm_model_name" in vision or isinstance(vision.get("layers", 12), list):
            continue
        head = vision.get("head_width", 64)
        heads = 2
        small = {**vision, "layers": 2, "width": heads * head, "image_size": 4 * vision.get("patch_size", 16)}
        if "attn_pooler_heads" in small:
            small["attn_pooler_heads"] = 4
        key = json.dumps([small, config.get("quick_gelu", False)], sort_keys=True, default=str)
        if key not in seen:
            seen.add(key)
            found[name] = (small, bool(config.get("quick_gelu", False)))
    return found


def tower(name: str) -> nn.Module:
    """An image encoder of open_clip with random weights."""
    config, quick = structures()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        visual: nn.Module = _build_vision_tower(128, CLIPVisionCfg(**config), quick_gelu=quick)
        for key, parameter in visual.named_parameters():
            if "ln_" in key or "bias" in key or "gamma" in key:
                nn.init.normal_(parameter, mean=0.0 if "bias" in key else 1.0, std=0.2)
    return visual.eval().requires_grad_(False)


def embedded(encoder: nn.Module, images: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(embeddings, gradient of their product with a direction with respect to the images)."""
    leaf = images.clone().requires_grad_()
    out: Tensor = encoder(leaf)
    (out * direction).sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", sorted(structures()))
def test_embeddings_and_gradients_are_those_of_open_clip(name: str) -> None:
    visual = tower(name)
    own = vision_transformer(visual)
    if getattr(visual, "attn_pool", None) is not None or visual.output_tokens:  # CoCa's, which stay with open_clip
        assert own is None
        return
    assert own is not None
    size = visual.image_size[0]
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    direction = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))
    (theirs, their_gradient), (ours, our_gradient) = embedded(visual, images, direction), embedded(own, images, direction)
    assert difference(ours, theirs) < 2e-6
    assert difference(our_gradient, their_gradient) < 5e-6
    assert {k: v.data_ptr() for k, v in own.state_dict().items()} == {k: v.data_ptr() for k, v in visual.state_dict().items()}


def test_the_structures_are_the_families_that_people_use() -> None:
    configs = [config for config, _ in structures().values()]
    assert len(configs) > 15
    assert {quick for _, quick in structures().values()} == {False, True}
    assert {14, 16, 32} <= {config.get("patch_size", 16) for config in configs}


def test_an_encoder_of_another_structure_is_left_alone() -> None:
    visual = tower("ViT-B-16")
    visual.transformer.resblocks[0].attn.bias_k = nn.Parameter(torch.zeros(1, 1, 128))
    assert vision_transformer(visual) is None
    assert vision_transformer(nn.Linear(2, 2)) is None


def test_bfloat16_is_near(name: str = "ViT-B-16") -> None:
    visual = tower(name)
    own = vision_transformer(visual)
    assert own is not None
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    direction = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))
    exact, exact_gradient = embedded(own, images, direction)
    near, gradient = embedded(own.to(torch.bfloat16), images.to(torch.bfloat16), direction.to(torch.bfloat16))
    assert difference(near.float(), exact) < 0.03
    assert difference(gradient.float(), exact_gradient) < 0.05


def test_both_towers_are_those_of_open_clip() -> None:
    model, tokenizer, meta = load_embedded()
    config = meta["config"]
    config["text_cfg"]["vocab_size"] = len(model.state_dict()["token_embedding.weight"])
    theirs = open_clip.CLIP(**config).eval()
    theirs.load_state_dict(model.state_dict())
    texts = tokenizer(["an apple", "a toadstool in front of the sunset!", "", "a zebra " * 40])
    with torch.no_grad():
        assert difference(model.encode_text(texts), theirs.encode_text(texts)) < 1e-6
        pictures = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        assert difference(model.encode_image(pictures), theirs.encode_image(pictures)) < 2e-6


def test_words_become_tokens() -> None:
    tokenizer = WordTokenizer({"an": [1], "apple": [2], "toad": [3, 4], "toads": [3, 4, 5]}, 6, 7)
    assert tokenizer.encode("An APPLE, é zebra") == [1, 2, 6, 6, 6]
    assert tokenizer(["an apple", "toads toads toads", ""]).tolist() == [
        [7, 1, 2, 8, 0, 0, 0], [7, 3, 4, 5, 3, 4, 8], [7, 8, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert tokenizer.decode([3, 4, 5, 2, 6, 3, 4]) == "toads apple ? toad"


def test_every_word_of_a_caption_is_known() -> None:
    _, tokenizer, _ = load_embedded()
    rng = np.random.default_rng(5)
    for name in OBJECTS:
        for _ in range(20):
            assert tokenizer.unknown not in tokenizer.encode(describe(rng, frozenset({name}), "snow").text)
