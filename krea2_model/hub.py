"""Model folders of the Hugging Face hub, fetched when a program names a repository."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checkpoints.identify import CheckpointError, CheckpointNotFoundError

# The parts of a diffusers folder; repositories also hold the same weights as single files.
PATTERNS = [
    "model_index.json",
    *(f"{part}/*.json" for part in ("transformer", "text_encoder", "vae", "scheduler")),
    *(f"{part}/*.safetensors" for part in ("transformer", "text_encoder", "vae")),
    "tokenizer/*",
]


def fetch_folder(
    repository: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The diffusers folder of a repository, `owner/name`, in the hub's cache on this machine.

    Arguments are those of `huggingface_hub.snapshot_download`, which resumes interrupted downloads
    and fetches nothing that is there. Raises CheckpointError where there is no such repository,
    access is not granted, or the hub cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise CheckpointNotFoundError(
            f"There is no file or folder {repository}, and it is no repository of the Hugging Face "
            "hub, such as krea/Krea-2-Turbo. Check the name and the folder."
        )
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=PATTERNS,
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} asks for consent. Accept its licence on its page of the Hugging Face "
            "hub, then log in with `hf auth login` or give token=."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointNotFoundError(
            f"There is no folder {repository} here, and no repository {repository}"
            f"{f' with revision {revision}' if revision else ''} that the hub shows you. Check the "
            "name; private ones need token=."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repository} is not on this machine and cannot be fetched ({_first_line(error)}). "
            "Check the connection and HF_HUB_OFFLINE, or name a local folder."
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
