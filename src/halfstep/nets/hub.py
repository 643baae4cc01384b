"""Models of the Hugging Face hub, by name: what is in its cache is taken from there, the rest is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfstep.core.errors import ModelError
from halfstep.core.typed import shown

SCHEME = "hub:"
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Configs, weights, vocabularies. Nothing pickled is fetched, and no code."""


def hub_folder(source: str) -> Path:
    """The folder of `hub:OWNER/NAME`, or of a revision `hub:OWNER/NAME@REVISION`, in the hub's own cache.

    Without the network, or with HF_HUB_OFFLINE set, what is cached is found all the same. Raises ModelError for a name
    that is none, and for a model that is neither cached nor to be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = source.removeprefix(SCHEME).partition("@")
    known: dict[str, Any] = {"repo_id": name, "revision": revision or None, "allow_patterns": list(WANTED)}
    try:
        return Path(snapshot_download(**known, local_files_only=True))
    except HFValidationError as error:
        expected = "a name of the hub, OWNER/NAME"
        raise ModelError(got=shown(name), expected=expected, where="--model", do="check the name") from error
    except Exception:  # not in the cache: of whichever kind the library says so with
        if constants.HF_HUB_OFFLINE:
            raise _missing(source, "HF_HUB_OFFLINE is set") from None
    try:
        return Path(snapshot_download(**known))
    except Exception as error:  # of whichever client the library uses
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise _missing(source, told[0]) from error


def _missing(source: str, why: str) -> ModelError:
    return ModelError(
        got=f"nothing in the cache, and {why}",
        expected="a model of the hub",
        where=source,
        do="check the name, connect, or give a folder with a copy of it",
    )
