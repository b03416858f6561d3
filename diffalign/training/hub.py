"""Uploading a finished run. The token is the user's own login and never a setting."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from diffalign.errors import UserError
from diffalign.training.config import RunConfig


def push(config: RunConfig, output_dir: Path) -> str:
    """Upload everything but checkpoints and tracker logs; returns the repository's name.

    Raises:
        UserError: not logged in, or the hub refused. The run's folder is complete whatever happens here.
    """
    name = config.hub_model_id or output_dir.name
    try:
        repo = create_repo(name, exist_ok=True).repo_id
        upload_folder(
            repo_id=repo, folder_path=output_dir, ignore_patterns=["checkpoint-*", ".checkpoint-*", "logs/*"]
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"the upload to {name!r} failed: {error}. The results are complete in {output_dir}; log in with "
            "`hf auth login` and upload them with `hf upload`."
        ) from error
    return str(repo)
