"""The public names of the library, which :mod:`blended_core` imports on first use of one of them, because torch takes its time."""

# ruff: noqa: F401
from __future__ import annotations

from .adm.load import Checkpoint, load_checkpoint, load_ddpm
from .adm.probe import ProbeOptions
from .clip.model import ClipModel, Prompt, load_clip
from .denoiser import DiffusionModel
from .device import DeviceContext
from .diffusion import DiffusionConfig
from .edit import edit_picture
from .errors import BlendedError, BlendedWarning
from .io.images import Picture, read_mask, read_picture, to_uint8, write_png
from .losses import Loss, LossTerm, StepInput, differentiate
from .mask import EditMask
from .options import PRESETS, EditOptions, GuidanceOptions, preset
from .perceptual import load_perceptual
from .random import SeededRandom
from .result import Candidate, EditResult
from .sample import Models, Step, blended_diffusion, local_clip_guided_diffusion
from .schedule import Schedule
