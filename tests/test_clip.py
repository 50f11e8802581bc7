"""CLIP models: embedded, from a local file, from a tag; warnings about prompts."""

from __future__ import annotations

import http.server
import json
import pickle
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from blended_core import BlendedError, BlendedWarning, ClipModel, DeviceContext, load_clip
from blended_core.clip import files as clip_files
from blended_core.clip.files import architecture_of, known_signatures, signature
from blended_core.rank import clip_distance, clip_distance_of_views
from blended_core.toy.world import OBJECTS, Placed, Scene, render
from blended_core.weights.torchscript import is_torchscript, read_torchscript

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
    save_file({"visual.conv1.weight": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(BlendedError, match="could not load tiny-for-tests"):
        load_clip(CONTEXT, f"tiny-for-tests:{tmp_path / 'other.safetensors'}")


def test_weights_of_a_tag_get_the_activation_they_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def stop(*_: object, **options: object) -> None:
        asked.append(options)
        raise RuntimeError("no download in tests")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", stop)
    monkeypatch.setattr("blended_core.clip.files.unreachable", lambda address: "")
    for tag in ("openai", "dfn2b", "laion2b_s34b_b88k"):
        with pytest.raises(BlendedError, match="no download in tests"):
            load_clip(CONTEXT, f"ViT-B-16:{tag}")
    assert [o.get("force_quick_gelu", False) for o in asked] == [True, True, False]


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
    assert is_torchscript(path) and not is_torchscript(tiny_file)
    theirs = {k: v for k, v in torch.jit.load(str(path)).state_dict().items()}
    ours = read_torchscript(path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) and ours[k].dtype == v.dtype for k, v in theirs.items())
    assert {k: v.shape for k, v in read_torchscript(path, values=False).items()} == {k: v.shape for k, v in theirs.items()}
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
    for name in ("NO_PROXY", "no_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    begun = time.monotonic()
    with pytest.raises(BlendedError) as told:
        load_clip(CONTEXT, "ViT-B-16:openai", folder=tmp_path / "open_clip")
    assert time.monotonic() - begun < 10
    repository = "timm/vit_base_patch16_clip_224.openai"
    for part in (
        "ViT-B-16:openai are not on this computer",
        f"/{repository} cannot be reached",
        str(tmp_path / "hub" / f"models--{repository.replace('/', '--')}"),
        "open_clip_model.safetensors",
        f"put it into {tmp_path / 'open_clip'}",
        "architecture ViT-B-16-quickgelu.",
    ):
        assert part in str(told.value)
    with pytest.raises(BlendedError, match=r"use ViT-B-32:FILE\.$"):
        load_clip(CONTEXT, "ViT-B-32:laion2b_s34b_b79k")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BlendedError, match="HF_HUB_OFFLINE is set"):
        load_clip(CONTEXT, "ViT-B-32:laion2b_s34b_b79k")
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_downloaded_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not clip_files.source_of("ViT-B-32", "laion2b_s34b_b79k").downloaded
    home = tmp_path / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc" / "open_clip_pytorch_model.bin").write_bytes(b"weights")
    found = clip_files.source_of("ViT-B-32", "laion2b_s34b_b79k")
    assert found.downloaded and found.folder == home


def test_an_address_is_reachable_if_a_server_responds() -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403 if "closed" in self.path else 200)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert clip_files.unreachable(f"{address}/open") == "" and clip_files.unreachable(f"{address}/closed") == ""
        server.shutdown()
    assert "refused" in clip_files.unreachable(address).lower()
    assert clip_files.unreachable("no address")
