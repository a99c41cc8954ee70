"""Where a checkpoint lies: a folder as it is, a hub id through the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from epd.errors import BadConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve_model(path_or_hub_id: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint; downloads a hub id once, without its weights where those are not wanted.

    Raises BadConfig when there is no such folder, or the hub has or gives no such model.
    """
    folder = Path(path_or_hub_id).expanduser()
    if path_or_hub_id and folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise BadConfig(f"model {path_or_hub_id!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download  # 0.3 s to import, and only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = _WANTED if weights else [pattern for pattern in _WANTED if pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise BadConfig(
            f"model {path_or_hub_id!r} is no folder here, is not in the hub's cache, and the hub cannot be reached: {error}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BadConfig(f"model {path_or_hub_id!r} is no folder here and the hub does not give it: {error}") from error
