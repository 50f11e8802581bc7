"""CLIP models: embedded, from a local file, from a tag; warnings about prompts."""

from __future__ import annotations

import json
import pickle
import random
import re
import socket
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from blended_core import BlendedError, BlendedWarning, ClipModel, DeviceContext, load_clip
from blended_core.clip.files import architecture_of, known_signatures, signature
from blended_core.clip.hub import weights_of_tag
from blended_core.clip.model import OPENAI_MEAN as MEAN
from blended_core.clip.model import OPENAI_STD as STD
from blended_core.clip.model import load_clip_file, load_clip_tag
from blended_core.clip.network import build_tokenizer, text_settings
from blended_core.errors import with_controls
from blended_core.rank import clip_distance, clip_distance_of_views
from blended_core.toy.world import OBJECTS, Placed, Scene, render
from blended_core.weights.open import open_weights

from .fuzz import mutated

CONTEXT = DeviceContext.choose("cpu")
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model registered with open_clip under the name tiny-for-tests, and a file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-for-tests.json").write_text(json.dumps(TINY), "utf-8")
    open_clip.add_model_config(folder / "tiny-for-tests.json")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), str(folder / "weights.safetensors"))
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def embedded() -> ClipModel:
    return load_clip(CONTEXT)


def test_a_local_file_is_loaded_and_differentiable(tiny_file: Path) -> None:
    clip = load_clip(CONTEXT, f"tiny-for-tests:{tiny_file}")
    assert (clip.image_size, clip.context_length) == (16, 8)
    picture = torch.zeros(2, 3, 16, 16, requires_grad=True)
    embedding = clip.encode_image(picture)
    assert embedding.shape == (2, 16)
    embedding.square().sum().backward()
    assert picture.grad is not None and picture.grad.abs().max() > 0
    assert not any(p.requires_grad for p in clip.model.parameters())


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("ViT-Z-99:openai", "has no model 'ViT-Z-99'"),
        ("ViT-B-16", "names no weights; add a tag"),
        ("ViT-B-16:nowhere.pt", "neither a file nor a tag of ViT-B-16"),
    ],
)
def test_wrong_names_give_an_error(spec: str, sentence: str) -> None:
    with pytest.raises(BlendedError, match=sentence) as caught:
        load_clip(CONTEXT, spec)
    assert caught.value.options == ("clip",)


def test_a_file_of_another_architecture_gives_an_error(tiny_file: Path, tmp_path: Path) -> None:
    state = open_clip.CLIP(**TINY).state_dict()
    path = tmp_path / "other.safetensors"
    for change, sentence in (
        ({"visual.conv1.weight": torch.zeros(32, 3, 4, 4)}, r"visual\.conv1\.weight \(32, 3, 4, 4\) instead of \(32, 3, 8, 8\)"),
        ({"text_projection": None, "ln_final.bias": None}, r"missing: text_projection, ln_final\.bias\. "),
        ({f"transformer.resblocks.{i}.ls_1.gamma": torch.zeros(16) for i in range(6)}, r"surplus: .*resblocks\.2\.ls_1\.gamma and 3 more"),
        ({"text_projection": torch.zeros(16, 16, dtype=torch.int8)}, "text_projection is not a dense floating-point tensor"),
        ({"image_encoder.model.patch_emb.0.block.conv.weight": torch.zeros(1)}, "cannot be brought into the layout of open_clip"),
    ):
        save_file({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        with pytest.raises(BlendedError, match=rf"^other\.safetensors: .*{sentence}") as caught:
            load_clip(CONTEXT, f"tiny-for-tests:{path}")
        assert caught.value.options == ("clip",)


PREFIXES = ("", "_orig_mod.", "module.module.", "model.", "clip_model.", "module._orig_mod.model.")
EXTRAS = {"input_resolution": 16, "context_length": 8, "vocab_size": 49408, "logit_bias": -10.0}
SCALARS = {name: torch.tensor(value) for name, value in EXTRAS.items()}
AS_SAFETENSORS, AS_TORCH = ("bin", "pt", "ckpt", "safetensors"), ("safetensors", "pth")


def layouts(state: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """What the files hold in which the weights of one CLIP are found."""
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    under = {prefix: {prefix + k: v for k, v in state.items()} for prefix in PREFIXES}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        **{f"prefix {prefix}": content for prefix, content in under.items()},
        **{f"wrapper {name}": {name: state, "epoch": 3, "optimizer": optimizer} for name in ("model", "model_state_dict", "state_dict")},
        "lightning": {
            "epoch": 1, "global_step": 7, "pytorch-lightning_version": "2.1", "state_dict": under["clip_model."],
            "optimizer_states": [optimizer], "hyper_parameters": {"lr": 0.1},
        },
        "model + ema": {"model": other, "ema": state, "step": 9},
        "ema inside": {**{f"model.{k}": v for k, v in other.items()}, **{f"model_ema.{k}": v for k, v in state.items()}},
        "ema of a part": {"model": state, "ema": {k: v for k, v in other.items() if k.startswith("visual.")}},
        "average": {"n_averaged": torch.tensor(5), **under["module.module."]},
        "extra keys": {**state, **SCALARS},
        "half": {k: v.half() for k, v in state.items()},
    }  # fmt: skip


def test_a_clip_is_found_under_every_prefix_in_every_wrapper_and_container(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer("tiny-for-tests", TINY["text_cfg"])
    monkeypatch.setattr("blended_core.clip.model.build_tokenizer", lambda *_: tokenizer)  # takes longer than all the rest
    torch.manual_seed(1)
    state = {k: v.half().float() for k, v in open_clip.CLIP(**TINY).state_dict().items()}
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = open_clip.CLIP(**TINY)
    reference.load_state_dict(state)
    with torch.no_grad():
        wanted = reference.eval().encode_image((picture - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    found = {}
    for name, content in layouts(state).items():
        saved = {"zip.pt": True, "legacy.pt": False}
        for file, zipped in saved.items():
            torch.save(content, tmp_path / file, _use_new_zipfile_serialization=zipped)
        found[name] = [tmp_path / file for file in saved]
        if all(isinstance(value, torch.Tensor) for value in content.values()):
            save_file(content, tmp_path / "x.safetensors")
            found[name].append(tmp_path / "x.safetensors")
        for path in found[name]:
            clip = load_clip(CONTEXT, str(path) if path.stem == "zip" else f"tiny-for-tests:{path}")
            assert torch.allclose(clip.encode_normalized((picture - clip.mean) / clip.std), wanted, atol=1e-6), (name, path)
            assert clip.name == f"tiny-for-tests:{path}"
    for kind, suffixes in {"safetensors": AS_SAFETENSORS, "torch": AS_TORCH}.items():
        for suffix in suffixes:  # the name says nothing about the content
            path = tmp_path / f"renamed.{suffix}"
            if kind == "safetensors":
                path.write_bytes(tiny_file.read_bytes())
            else:
                torch.save(state, path)
            assert architecture_of(path) == "tiny-for-tests" and load_clip(CONTEXT, str(path)).image_size == 16


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, tiny_file: Path) -> None:
    state = open_clip.CLIP(**TINY).state_dict()
    for name, value in (("visual.proj", float("nan")), ("logit_scale", float("inf")), ("visual.ln_post.bias", float("-inf"))):
        damaged = {**state, name: state[name].clone()}
        damaged[name].view(-1)[-1] = value
        save_file(damaged, tmp_path / "damaged.safetensors")
        torch.save({"state_dict": damaged}, tmp_path / "damaged.pt")
        for suffix in ("safetensors", "pt"):
            with pytest.raises(BlendedError, match=rf"^damaged\.{suffix}: 1 of the \d+ values of {name} are not finite"):
                load_clip(CONTEXT, str(tmp_path / f"damaged.{suffix}"))


def test_damaged_clip_files_are_loaded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 64}}
    (tmp_path / "tiny-damaged.json").write_text(json.dumps(config), "utf-8")
    open_clip.add_model_config(tmp_path / "tiny-damaged.json")
    tokenizer = build_tokenizer("tiny-damaged", config["text_cfg"])
    monkeypatch.setattr("blended_core.clip.model.build_tokenizer", lambda *_: tokenizer)
    state = {k: v.half() for k, v in open_clip.CLIP(**config).state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pt")
    torch.save({"ema": state, "step": 3}, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=False)
    originals = sorted(tmp_path.glob("whole.*"))
    rng, refused = random.Random(1), 0
    for i in range(300):
        whole = originals[i % 3]
        path = tmp_path / f"damaged{whole.suffix}"
        path.write_bytes(mutated(whole.read_bytes(), rng))
        for architecture in ("", "tiny-damaged"):
            try:
                load_clip_file(CONTEXT, path, architecture)
            except BlendedError as error:
                assert str(error).startswith("damaged.")
                refused += 1
    assert 300 < refused < 600


def test_layouts_of_other_architectures_are_brought_into_that_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat text encoder for a network that has it in a module of its own; counters that a file lacks."""
    config = {**TINY, "custom_text": True, "vision_cfg": {**TINY["vision_cfg"], "layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}
    (tmp_path / "tiny-custom.json").write_text(json.dumps(config), "utf-8")
    open_clip.add_model_config(tmp_path / "tiny-custom.json")
    reference = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
    state = {k.removeprefix("text."): v for k, v in reference.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) < len(reference.state_dict()) and "token_embedding.weight" in state
    save_file(state, tmp_path / "flat.safetensors")
    clip = load_clip(CONTEXT, f"tiny-custom:{tmp_path / 'flat.safetensors'}")
    assert isinstance(clip.model, open_clip.CustomTextCLIP)
    assert all(torch.equal(v, clip.model.state_dict()[k]) for k, v in reference.state_dict().items())
    assert clip.prompt("a dog").embeddings.shape == (1, 16)


# --- tags and the network ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face Hub, and tags for the tiny model."""
    from huggingface_hub import constants
    from open_clip import pretrained

    entry = {"hf_hub": "acme/tiny/", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    tags = {"plain": entry, "quick": {**entry, "quick_gelu": True}}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-for-tests", tags)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into(hub: Path, repository: str, **files: bytes) -> Path:
    """A repository as huggingface_hub keeps it."""
    home = hub / f"models--{repository.replace('/', '--')}"
    (home / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text("abc")
    for name, data in files.items():
        (home / "snapshots" / "abc" / name.replace("__", ".")).write_bytes(data)
    return home / "snapshots" / "abc"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to reach a network fails, and is listed."""
    asked: list[str] = []

    def refuse(*args: Any, **_: Any) -> Any:
        asked.append(repr(args[:2]))
        raise OSError(f"a socket was opened: {args[:2]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


def test_weights_of_a_tag_are_read_with_their_activation_and_normalization(tiny_file: Path, hub: Path, no_network: list[str]) -> None:
    torch.save(dict(load_file(tiny_file)), tiny_file.parent / "weights.bin")
    put_into(hub, "acme/tiny", open_clip_pytorch_model__bin=(tiny_file.parent / "weights.bin").read_bytes())
    plain, quick = (load_clip(CONTEXT, f"tiny-for-tests:{tag}") for tag in ("plain", "quick"))
    assert plain.mean.flatten().tolist() == [0.5] * 3 and plain.std.flatten().tolist() == [0.25] * 3
    kinds = [c.model.visual.config.blocks.activation for c in (plain, quick)]
    assert kinds == ["gelu", "quick_gelu"] and quick.name == "tiny-for-tests:quick"
    # The tags of an architecture state the normalization for a file of it, too.
    assert load_clip(CONTEXT, f"tiny-for-tests:{tiny_file}").mean.flatten().tolist() == [0.5] * 3
    folder = put_into(hub, "acme/tiny", open_clip_pytorch_model__bin=b"damaged")
    with pytest.raises(BlendedError, match=rf"^tiny-for-tests:plain: .*{re.escape(str(folder))}.*if you delete it"):
        load_clip(CONTEXT, "tiny-for-tests:plain")
    put_into(hub, "acme/tiny", open_clip_model__safetensors=tiny_file.read_bytes())
    assert load_clip(CONTEXT, "tiny-for-tests:plain").image_size == 16, "safetensors are preferred"
    assert not no_network


def test_nothing_is_downloaded_that_the_user_did_not_ask_for(tiny_file: Path, hub: Path, no_network: list[str], tmp_path: Path) -> None:
    """A file of weights never leads to a request, even if its text encoder needs a vocabulary that is not here."""
    load_clip(CONTEXT)
    load_clip(CONTEXT, str(tiny_file))
    (tmp_path / "roberta.safetensors").write_bytes(tiny_file.read_bytes())
    for model in ("roberta-ViT-B-32", "ViT-L-14-CLIPA", "ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32"):
        with pytest.raises(BlendedError, match="are not on this computer and are not downloaded for a file"):
            load_clip(CONTEXT, f"{model}:{tmp_path / 'roberta.safetensors'}")
    for wrong in (
        "roberta-ViT-B-32:nowhere.pt",
        "hf-hub:acme/tiny",
        "local-dir:acme",
        "http://127.0.0.1/x.pt",
        "ViT-B-32:https://127.0.0.1/x.pt",
    ):
        with pytest.raises(BlendedError):
            load_clip(CONTEXT, wrong)
    assert not no_network and not hub.exists()
    with pytest.raises(BlendedError, match="cannot be reached"):
        load_clip(CONTEXT, "tiny-for-tests:plain")
    assert no_network, "a tag is a request for a download, so the list would show it"


def test_a_vocabulary_on_this_computer_is_used_without_a_request(hub: Path, no_network: list[str]) -> None:
    with pytest.raises(BlendedError, match="vocabulary of roberta-base"):
        text_settings("roberta-ViT-B-32", download=False)
    folder = put_into(hub, "roberta-base", config__json=b"{}", tokenizer__json=b"{}")
    settings = text_settings("roberta-ViT-B-32", download=False)
    assert settings["hf_model_name"] == settings["hf_tokenizer_name"] == str(folder) and settings["hf_model_pretrained"] is False
    assert not no_network


def test_the_name_of_a_tag_opens_no_file(tiny_file: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    """Names from a request: the answer is the same whether a file exists or not."""
    monkeypatch.chdir(tiny_file.parent)
    for there, absent in (
        (str(tiny_file), str(tiny_file.parent / "absent.safetensors")),
        (tiny_file.name, "absent.safetensors"),
        (f"tiny-for-tests:{tiny_file}", f"tiny-for-tests:{tiny_file.parent / 'absent.safetensors'}"),
        (f"tiny-for-tests:{tiny_file.name}", "tiny-for-tests:absent.safetensors"),
        (f"tiny-for-tests:../{tiny_file.parent.name}/{tiny_file.name}", f"tiny-for-tests:../{tiny_file.parent.name}/absent.safetensors"),
        ("tiny-for-tests:/etc/passwd", "tiny-for-tests:/etc/absent"),
        ("/etc/passwd", "/etc/absent"),
    ):
        told = []
        for spec in (there, absent):
            with pytest.raises(BlendedError) as caught:
                load_clip_tag(CONTEXT, spec)
            told.append(str(caught.value).replace("/", "-").replace(re.split("[/:]", spec)[-1], "NAME"))
        assert told[0] == told[1]
    assert not no_network


def test_a_file_that_does_not_state_its_activation_gives_a_warning(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-for-tests-quickgelu.json").write_text(json.dumps({**TINY, "quick_gelu": True}), "utf-8")
    open_clip.add_model_config(tmp_path / "tiny-for-tests-quickgelu.json")
    with pytest.warns(BlendedWarning, match="use tiny-for-tests-quickgelu:FILE"):
        load_clip(CONTEXT, f"tiny-for-tests:{tiny_file}")


def test_a_warning_names_the_part_of_a_text_that_is_cut(embedded: ClipModel) -> None:
    words = "a dog in the snow and " * 6 + "a castle"
    with pytest.warns(BlendedWarning, match="it was cut before «.*castle»"):
        prompt = embedded.prompt(words)
    assert prompt.embeddings.shape == (1, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded.prompt("a dog in the snow")


def test_tokenizers_of_hugging_face_give_the_same_warning(embedded: ClipModel) -> None:
    class Inner:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return list(range(len(text.split())))

        def decode(self, ids: list[int]) -> str:
            return f"{len(ids)} more"

    class Outer:
        tokenizer = Inner()

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), 24, dtype=torch.long)

    clip = ClipModel(embedded.model, Outer(), "hugging", (0.5,) * 3, (0.5,) * 3, 64, 24)
    with pytest.warns(BlendedWarning, match="has 30 tokens and hugging reads 22; it was cut before «8 more»"):
        clip.prompt("word " * 30)


def test_words_that_the_embedded_model_does_not_know_are_named(embedded: ClipModel) -> None:
    with pytest.warns(BlendedWarning, match="not trained on «zebra»; it knows apple, .* and meadow, "):
        embedded.prompt("a zebra")


def test_blank_prompts_ask_for_removal_and_weights_must_match(embedded: ClipModel) -> None:
    assert len(embedded.prompt("", "  ")) == 0
    prompt = embedded.prompt("a dog", "", "a cat", weights=[1, 2, 3])
    assert prompt.weights == (1, 3) and repr(prompt) == "Prompt('a dog': 1, 'a cat': 3)"
    assert repr(embedded) == "ClipModel('embedded', 64 px, 24 tokens)"
    with pytest.raises(BlendedError, match="2 prompts were given with 1 weights"):
        embedded.prompt("a", "b", weights=[1])


def test_prompts_encoded_in_inference_mode_can_guide(embedded: ClipModel) -> None:
    with torch.inference_mode():
        prompt = load_clip(CONTEXT).prompt("a dog")
    picture = torch.zeros(1, 3, 64, 64, requires_grad=True)
    (embedded.encode_image(picture) @ prompt.embeddings.T).sum().backward()
    assert picture.grad is not None


def test_the_embedded_model_recognizes_the_objects_of_the_toy_world(embedded: ClipModel) -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 10:54, 10:54] = 1
    prompts = [embedded.prompt(f"a {name}") for name in OBJECTS]
    right = 0
    for name in OBJECTS:
        pixels = render(Scene("meadow", (Placed(name, 0.5, 0.5, 0.6),), 1))
        picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        distances = [float(clip_distance(picture, mask, embedded, p)) for p in prompts]
        right += list(OBJECTS)[distances.index(min(distances))] == name
    assert right >= len(OBJECTS) - 1


def test_ranking_by_many_views_is_not_deceived_by_a_pattern_for_one_view(embedded: ClipModel) -> None:
    mask = torch.ones(1, 1, 64, 64)
    prompt = embedded.prompt("a dog")
    real = torch.from_numpy(render(Scene("meadow", (Placed("dog", 0.5, 0.5, 0.6),), 1))).permute(2, 0, 1)[None].float() / 127.5 - 1
    empty = torch.from_numpy(render(Scene("meadow", (), 1))).permute(2, 0, 1)[None].float() / 127.5 - 1
    pattern = empty.clone().requires_grad_()
    for _ in range(40):  # changes single pixels until CLIP sees a dog in the one unwarped view
        (gradient,) = torch.autograd.grad((embedded.encode_image(pattern) @ prompt.embeddings.T).sum(), pattern)
        pattern = (pattern + 0.02 * gradient.sign()).clamp(-1, 1).detach().requires_grad_()
    pictures = torch.cat([real, empty, pattern.detach()])
    one, many = (score(pictures, mask, embedded, prompt).tolist() for score in (clip_distance, clip_distance_of_views))
    assert one[2] < one[0] < one[1], "by one view the pattern is nearer to a dog than the dog"
    assert many[0] < many[2], "by many it is not"
    again = [float(clip_distance_of_views(picture[None], mask, embedded, prompt)) for picture in pictures]
    assert again == pytest.approx(many, abs=1e-5), "a picture's score does not depend on those beside it"
    assert clip_distance_of_views(pictures, mask, embedded, prompt, at_once=3).tolist() == pytest.approx(many, abs=1e-5)


REAL = {
    "ViT-B-32": "ViT-B-32", "ViT-B-16": "ViT-B-16", "ViT-L-14": "ViT-L-14", "ViT-L-14-336": "ViT-L-14-336", "ViT-H-14": "ViT-H-14",
    "RN50": "RN50", "RN101": "RN101", "RN50x4": "RN50x4",
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_architectures_are_determined_from_their_shapes(name: str) -> None:
    with torch.device("meta"):
        network = open_clip.CLIP(**{k: v for k, v in open_clip.get_model_config(name).items() if k in TINY})
    shapes = {f"state_dict.module.{k}": tuple(v.shape) for k, v in network.state_dict().items()}
    found = signature(shapes)
    names = [known for known, has in known_signatures().items() if has == found]
    assert name in names and {n.removesuffix("-quickgelu") for n in names} <= {name, f"{name}-worldwide"}, names


def test_the_architecture_of_a_file_is_determined(tiny_file: Path, tmp_path: Path) -> None:
    assert architecture_of(tiny_file) == "tiny-for-tests"
    by_name, alone = load_clip(CONTEXT, f"tiny-for-tests:{tiny_file}"), load_clip(CONTEXT, str(tiny_file))
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(by_name.encode_image(picture), alone.encode_image(picture))
    wrapped = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in by_name.model.state_dict().items()}}, wrapped)
    assert torch.equal(load_clip(CONTEXT, str(wrapped)).encode_image(picture), alone.encode_image(picture))


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an archive."""
    file = open_weights(path)
    return {name: file.take(name) for name in file.tensors}


def test_a_torchscript_archive_is_read_without_running_it(tiny_file: Path, tmp_path: Path) -> None:
    clip = load_clip(CONTEXT, f"tiny-for-tests:{tiny_file}")

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.transformer = clip.model.visual, clip.model.transformer
            self.token_embedding, self.ln_final = clip.model.token_embedding, clip.model.ln_final
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(clip.model, name))
            self.register_buffer("input_resolution", torch.tensor(16))

        def forward(self, picture: torch.Tensor) -> torch.Tensor:
            return self.visual(picture)  # type: ignore[no-any-return]

    path = tmp_path / "tiny.pt"
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Archive().half().float(), picture, check_trace=False).save(str(path))
    assert open_weights(path).format == "torchscript" and open_weights(tiny_file).format == "safetensors"
    theirs = {k: v for k, v in torch.jit.load(str(path)).state_dict().items()}
    ours = read_torchscript(path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) and ours[k].dtype == v.dtype for k, v in theirs.items())
    assert open_weights(path).shapes == {k: tuple(v.shape) for k, v in theirs.items()}
    again = load_clip(CONTEXT, str(path))
    assert torch.allclose(again.encode_image(picture), clip.encode_image(picture), atol=2e-2)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BlendedError, match=r"tiny\.pt"):
        load_clip(CONTEXT, str(path))


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


class Plain:
    pass


def archive(path: Path, description: bytes, **values: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", description)
        made.writestr("x/code/__torch__.py", "")
        for name, data in values.items():
            made.writestr(f"x/data/{name[1:]}", data)
    return path


def described(key: str = "0", count: int = 4, size: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1), offset: int = 0) -> bytes:
    """A module with one tensor, as PyTorch's pickler writes it."""
    import io

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(item, Plain) else None

        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                return torch._utils._rebuild_tensor_v2, (Plain(), offset, size, stride, False, {})
            return NotImplemented

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(torch.zeros(1))
    # A module around it: GLOBAL, empty tuple, NEWOBJ, then its state {'weight': tensor}.
    return b"\x80\x02c__torch__\nNet\n)\x81}X\x06\x00\x00\x00weight" + stream.getvalue()[2:-1] + b"sb."


def test_the_description_of_an_archive_can_only_build_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    data = torch.arange(4.0).numpy().tobytes()
    assert torch.equal(read_torchscript(archive(path, described(), _0=data))["weight"], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    for description, sentence in (
        (pickle.dumps(Hostile(), 2), r"asks for .*which weights do not need, so it is refused"),
        (described(size=(3, 2)), "exceeds its storage"),
        (described(size=(2, 2), stride=(2, -1)), "exceeds its storage"),
        (described(offset=-1), "exceeds its storage"),
        (described(count=5), "does not have the declared size"),
        (described(key="../../0"), "is not a storage"),
        (described(key="7"), "not a complete TorchScript archive"),
        (described()[:-9], "not a complete TorchScript archive"),
        (b"", "not a complete TorchScript archive"),
    ):
        with pytest.raises(BlendedError, match=sentence):
            read_torchscript(archive(path, description, _0=data))
    # A module that contains itself twice is read once, not two to the power of the depth times.
    itself = b"\x80\x02c__torch__\nNet\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00K\x05h\x00ub."
    with pytest.raises(BlendedError, match="holds no tensors"):
        read_torchscript(archive(path, itself))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x/data.pkl", described(count=1 << 20))
        packed.writestr("x/data/0", bytes(4 << 20))
    with pytest.raises(BlendedError, match="is compressed"):
        read_torchscript(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (("vision_model.embeddings.patch_embedding.weight",), "layout of the transformers library"),
        (("visual.trunk.stem.0.weight", "logit_scale"), "cannot be determined from its shapes"),
        (("text_model.embeddings.token_embedding.weight",), "text encoder of a CLIP"),
        (("model.output_blocks.0.0.weight",), "diffusion model, not a CLIP"),
        (("weight",), "is not a CLIP: no tensor is named visual.conv1.weight"),
        (("visual.conv1.weight",), "tensors are missing"),
    ],
)
def test_the_error_about_another_file_states_what_it_holds(tmp_path: Path, keys: tuple[str, ...], sentence: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    with pytest.raises(BlendedError, match=rf"other\.safetensors: .*{sentence}"):
        load_clip(CONTEXT, str(path))


def test_odd_shapes_and_names_are_refused_with_a_sentence() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (8, 3, 16, 16), "logit_scale": (), "token_embedding.weight": (100, 8), "positional_embedding": (77, 8),
        "text_projection": (8, 8), "transformer.resblocks.0.x": (1,), "visual.transformer.resblocks.0.x": (1,),
    }  # fmt: skip
    resnet = {"visual.layer1.0.conv1.weight": (8,), **{f"visual.layer{i}.0.x": (1,) for i in (2, 3, 4)}}
    for odd in (
        {"visual.positional_embedding": (0, 8)},
        {"visual.positional_embedding": (5, 8), "visual.conv1.weight": (8,)},
        {**resnet, "visual.attnpool.positional_embedding": (0, 4)},
    ):
        with pytest.raises(BlendedError, match="tensors are missing or have other shapes"):
            signature({**shapes, **odd})
    for name in ("a" * 300, f"ViT-B-32:{'a' * 300}", "ViT-B-32:a\0b"):
        with pytest.raises(BlendedError, match=r"has no model|neither a file nor a tag"):
            load_clip(CONTEXT, name)
    with pytest.raises(BlendedError, match="cannot be read"):
        load_clip_file(CONTEXT, Path("a" * 300))


def test_a_network_that_open_clip_does_not_have_is_described(tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(open_clip.CLIP(**{**TINY, "embed_dim": 24}).state_dict(), path)
    with pytest.raises(BlendedError, match=r"1 layers, patch 8, width 32, 16 px and an embedding of 24, and open_clip has no such"):
        architecture_of(path)


def test_the_error_about_unreachable_weights_names_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the error comes at once and states which file to copy where."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    begun = time.monotonic()
    with pytest.raises(BlendedError) as told:
        load_clip(CONTEXT, "ViT-B-16:openai", folder=tmp_path / "open_clip")
    assert time.monotonic() - begun < 10
    repository = "timm/vit_base_patch16_clip_224.openai"
    for part in (
        "ViT-B-16:openai are not on this computer",
        f"/{repository} cannot be reached",
        f"Copy the cache {tmp_path / 'hub'} from",
        "open_clip_model.safetensors",
        f"put it into {tmp_path / 'open_clip'}",
        "(architecture ViT-B-16-quickgelu).",
    ):
        assert part in str(told.value)
    with pytest.raises(BlendedError, match=r"use ViT-B-32:FILE\.$"):
        load_clip(CONTEXT, "ViT-B-32:laion2b_s34b_b79k")
    assert not list(tmp_path.iterdir()), "nothing was written"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/home/somebody/.cache/huggingface/hub")
    with pytest.raises(BlendedError) as told:
        load_clip(CONTEXT, "ViT-B-16:laion2b_s34b_b88k", folder=Path("/home/somebody/ComfyUI/models/open_clip"))
    assert with_controls(told.value, lambda _: None) == str(told.value), "a message of a surface says all of it"


def test_a_file_is_looked_for_under_every_name_that_it_may_have(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has only the older of two formats; a server that refuses is not asked again."""
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError

    class NoFile(EntryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    asked: list[str] = []

    def head(url: str, timeout: float) -> None:
        assert timeout <= 10
        asked.append(url.rpartition("/")[2])
        if url.endswith("safetensors"):
            raise NoFile
        if "refused" in url:
            raise RuntimeError("403 refused")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", head)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, **_: str(tmp_path / file))
    assert weights_of_tag("tiny-for-tests", "plain", "") == tmp_path / "open_clip_pytorch_model.bin"
    assert asked == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for place, names, reason in (
        ("acme/refused/w.pth", ["w.safetensors", "w.pth"], "403 refused"),
        ("acme/refused/w.pt", ["w.pt"], "403 refused"),
        ("acme/tiny/w.safetensors", ["w.safetensors"], "404"),
    ):
        asked.clear()
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_, place=place: {"hf_hub": place})
        with pytest.raises(BlendedError, match=rf"cannot be reached \({reason}\).*or download {' or '.join(names)} from that address and "):
            weights_of_tag("tiny-for-tests", "plain", "")
        assert asked == names
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"url": "http://127.0.0.1/x.pt"})
    with pytest.raises(BlendedError, match="names no repository"):
        weights_of_tag("tiny-for-tests", "plain", "")
