"""What open_clip's tags name on the Hugging Face Hub: copies on this computer, and downloads that a user asked for.

A file that is on this computer is used without a request. Nothing here opens a file of weights.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import BlendedError, one_line, reason

TIMEOUT_SECONDS = 10.0
"""For the first response of the server."""
DEFAULT_FILE = "open_clip_pytorch_model.bin"
"""The file of a repository whose tag names none."""
SAFE_FILE = "open_clip_model.safetensors"
"""The same weights as :data:`DEFAULT_FILE`."""
LONGEST_REASON = 60
"""Characters of the reason in the error about unreachable weights, which has long names of folders too."""
TEXT_FILES = ("*.json", "*.txt", "*.model")
"""Configuration and vocabulary of a text encoder; no weights and no program."""


def weights_of_tag(name: str, tag: str, use: str) -> Path:
    """The file with the weights of a tag of open_clip, downloaded if it is not on this computer.

    Args:
        name, tag: of open_clip.
        use: how a file that was downloaded by hand is used, as the end of a sentence.

    Raises:
        BlendedError: if it is not here and cannot be downloaded; the text says which file to copy where, and fits into a message of a surface.
    """
    import open_clip
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError  # type: ignore[attr-defined]  # where every version has it

    repository, _, file = str(open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "")).rpartition("/")
    if not repository:
        raise BlendedError(f"open_clip names no repository of the Hugging Face Hub for {name}:{tag}; choose another tag.", option="clip")
    files = _names(file)
    for known in files:
        if isinstance(found := try_to_load_from_cache(repository, known), str):
            return Path(found)
    why = "the server has no such file"
    for known in files:
        try:
            # Checked before the download, which would retry for half a minute if there is no network.
            get_hf_file_metadata(hf_hub_url(repository, known), timeout=TIMEOUT_SECONDS)
            return Path(hf_hub_download(repository, known, etag_timeout=TIMEOUT_SECONDS))
        except EntryNotFoundError as error:
            why = reason(error)
        except Exception as error:  # of the HTTP client, which is another one in each version of huggingface_hub
            why = reason(error)
            break
    raise BlendedError(
        f"the weights of {name}:{tag} are not on this computer, and {constants.ENDPOINT}/{repository} cannot be reached "
        f"({one_line(why, LONGEST_REASON)}). Copy the cache {constants.HF_HUB_CACHE} from a computer that has them, or download "
        f"{' or '.join(files)} from that address and {use}",
        option="clip",
    )


def text_folder(repository: str, download: bool) -> Path:
    """The folder with the configuration and the vocabulary of a text encoder of the transformers library.

    Args:
        repository: its name on the Hugging Face Hub.
        download: False uses only what is on this computer, without a request.

    Raises:
        BlendedError: if the files are not here and may not or cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repository, allow_patterns=list(TEXT_FILES), etag_timeout=TIMEOUT_SECONDS, local_files_only=not download)
    except Exception as error:  # as above
        why = f"cannot be downloaded ({reason(error)})" if download else "are not downloaded for a file of weights"
        raise BlendedError(
            f"this CLIP reads texts with the vocabulary of {repository}, whose files are not on this computer and {why}. Download "
            f"{', '.join(TEXT_FILES)} of {repository} into the cache of the Hugging Face Hub, or choose a CLIP with its own vocabulary.",
            option="clip",
        ) from None
    return Path(found)


def _names(file: str) -> list[str]:
    """The names that a file of weights may have in its repository, safetensors first."""
    if file in ("", DEFAULT_FILE):
        return [SAFE_FILE, DEFAULT_FILE]
    stem, dot, extension = file.rpartition(".")
    return [f"{stem}{dot}safetensors", file] if extension in ("bin", "pth") else [file]
