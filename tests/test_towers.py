"""The image encoder of CLIP against open_clip's, for every structure of vision transformer that open_clip lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from safetensors import safe_open
from torch import Tensor, nn

from blended_core.clip.embedded import load_word_clip
from blended_core.clip.model import LARGE_WIDTH, ClipModel, load_clip
from blended_core.clip.operations import WIDE, attention, linear, quick_gelu
from blended_core.clip.towers import clip_of, vision_transformer
from blended_core.clip.words import WordTokenizer
from blended_core.device import DeviceContext
from blended_core.toy.captions import describe
from blended_core.toy.models import CLIP
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


def embedded(encoder: Callable[[Tensor], Tensor], images: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
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


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result of a function and its gradients with respect to the inputs, for one random gradient of the result."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach().float(), *(gradient.float() for gradient in torch.autograd.grad(out, leaves, direction))]


def operations(work: Callable[[], object]) -> set[str]:
    """The names of the operations of torch that ``work`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return {entry.key for entry in profile.key_averages()}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ONEDNN = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.parametrize("biased", [True, False])
def test_a_wide_frozen_layer_is_that_of_torch(biased: bool) -> None:
    x, weight, bias = random(2, 5, WIDE), random(WIDE + 64, WIDE, seed=8), random(WIDE + 64) if biased else None
    for ours, theirs in zip(results(lambda x: linear(x, weight, bias), x), results(lambda x: F.linear(x, weight, bias), x), strict=True):
        assert difference(ours, theirs) < 2e-6
    ran = operations(lambda: results(lambda x: linear(x, weight, bias), x))
    assert ("mkldnn::_linear_pointwise" in ran) == ONEDNN and ({"aten::addmm", "aten::mm"} & ran == set()) == ONEDNN


def test_a_layer_in_training_has_gradients_of_its_weights() -> None:
    inputs = random(5, WIDE), random(WIDE, WIDE, seed=8), random(WIDE)
    assert [g.shape for g in results(linear, *inputs)[1:]] == [value.shape for value in inputs]
    assert "mkldnn::_linear_pointwise" not in operations(lambda: results(linear, *inputs))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_quick_gelu_is_one_operation(dtype: torch.dtype, limit: float) -> None:
    x = random(40, 30, dtype=dtype)
    written = results(lambda x: x * torch.sigmoid(1.702 * x), x.float())
    assert all(difference(ours, theirs) < limit for ours, theirs in zip(results(quick_gelu, x), written, strict=True))
    leaf = x.clone().requires_grad_()
    (saved,) = quick_gelu(leaf).grad_fn.saved_tensors  # type: ignore[union-attr]
    assert saved.data_ptr() == leaf.data_ptr()


def test_attention_in_bfloat16_multiplies_whole_matrices() -> None:
    inputs = [random(2, 2, 20, 32, seed=seed) for seed in (1, 2, 3)]
    exact = results(F.scaled_dot_product_attention, *inputs)
    near = results(attention, *(value.bfloat16() for value in inputs))
    assert all(difference(a, b) < 0.01 for a, b in zip(near, exact, strict=True))
    ran = operations(lambda: attention(*(value.bfloat16() for value in inputs)))
    assert "aten::bmm" in ran and not any("flash" in name for name in ran)
    fused = results(attention, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(fused, exact, strict=True))


def test_both_towers_are_those_of_open_clip() -> None:
    clip = load_word_clip(CLIP)
    model, tokenizer = clip.model, clip.tokenizer
    with safe_open(str(CLIP), "pt") as file:
        config = json.loads(file.metadata()["config"])
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
    tokenizer = load_word_clip(CLIP).tokenizer
    rng = np.random.default_rng(5)
    for name in OBJECTS:
        for _ in range(20):
            assert tokenizer.unknown not in tokenizer.encode(describe(rng, frozenset({name}), "snow").text)


def large_clip() -> ClipModel:
    """A CLIP with one block of the width from which bfloat16 pays."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": LARGE_WIDTH, "head_width": 64},
        "text_cfg": {"context_length": 8, "vocab_size": 12, "width": 32, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        weights = open_clip.CLIP(**config).state_dict()
    model = clip_of(config)
    model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()}, assign=True)
    return ClipModel(model.train(False).requires_grad_(False), WordTokenizer({}, 9, 8), "large", (0.5,) * 3, (0.5,) * 3, 32, 8)


@pytest.mark.parametrize(("asked", "able", "expected"), [
    ("auto", True, torch.bfloat16), ("auto", False, torch.float32), ("fp32", True, torch.float32), ("bf16", False, torch.bfloat16),
    ("fp16", True, torch.float16),
])  # fmt: skip
def test_the_precision_of_the_image_encoder_is_chosen(
    monkeypatch: pytest.MonkeyPatch, asked: str, able: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr("blended_core.clip.model.fast_precision", lambda device: torch.bfloat16 if able else torch.float32)
    exact, chosen = large_clip(), large_clip().in_precision(asked)
    assert chosen.image_dtype == expected
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    direction = torch.randn(2, 32, generator=torch.Generator().manual_seed(6))
    (near, gradient), (whole, exact_gradient) = (embedded(c.encode_image, picture, direction) for c in (chosen, exact))
    assert near.dtype == gradient.dtype == torch.float32
    limit = 1e-6 if expected == torch.float32 else 0.04
    assert difference(near, whole) < limit and difference(gradient, exact_gradient) < 2 * limit
    assert torch.equal(chosen.prompt("x").embeddings, exact.prompt("x").embeddings), "texts stay in float32"


def test_small_and_foreign_encoders_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blended_core.clip.model.fast_precision", lambda device: torch.bfloat16)
    assert load_clip(DeviceContext()).in_precision("auto").image_dtype == torch.float32
    foreign = large_clip()
    foreign.model.visual = tower("ViT-B-16")
    assert foreign.in_precision("bf16").image_dtype == torch.float32


def test_quick_gelu_in_float16_is_finite_wherever_its_result_is() -> None:
    x = torch.tensor([60000.0, -60000.0, 1.0], dtype=torch.float16)
    assert quick_gelu(x).tolist() == [60000.0, 0.0, pytest.approx(0.846, abs=1e-3)]
