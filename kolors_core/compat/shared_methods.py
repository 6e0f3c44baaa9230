"""Methods that models and pipelines share: uploads to a hub, and those for which there is nothing to do."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kolors_core import hub
from kolors_core.validation import as_path

logger = logging.getLogger("kolors_core")
ATTENTION_HINT = "attention runs torch's fused kernels already"


class SharedMethods:
    """Methods of every model and pipeline."""

    save_pretrained: Callable[..., None]

    def push_to_hub(
        self, repo_id: str, *, use_temp_dir: bool | None = None, commit_message: str | None = None,
        private: bool | None = None, token: str | bool | None = None, create_pr: bool = False,
        safe_serialization: bool = True, variant: str | None = None, max_shard_size: int | str = "10GB",
    ) -> str:  # fmt: skip
        """Save to a hub repository, which is created if needed; return the commit's address."""
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(
                folder := Path(scratch) / "saved", safe_serialization=safe_serialization, variant=variant,
                max_shard_size=max_shard_size,
            )  # fmt: skip
            return push_folder(
                folder, repo_id, commit_message=commit_message, private=private, token=token,
                create_pr=create_pr,
            )  # fmt: skip

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Log that there is nothing to do."""
        logger.warning("enable_xformers_memory_efficient_attention has no effect: %s", ATTENTION_HINT)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing."""


def push_folder(
    folder: str | Path, repo_id: str | None, *, commit_message: str | None = None,
    private: bool | None = None, token: str | bool | None = None, create_pr: bool = False,
) -> str:  # fmt: skip
    """Upload a folder to a hub repository, which is created if it is missing; return the commit's address.

    repo_id: "owner/name", or a name, of the token's owner; the folder's name if None. OSError, in one line,
    if the hub refuses it.
    """
    folder = as_path("folder", folder)
    repo_id = folder.name if repo_id is None else repo_id
    hub.check_token(token)
    hub.check_strings(repo_id=repo_id, commit_message=commit_message)
    from huggingface_hub import HfApi, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        message = "Upload a model by kolors_core" if commit_message is None else commit_message
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, create_pr=create_pr
        )
    except (errors.LocalTokenNotFoundError, HTTPError, ValueError, OSError) as error:
        raise OSError(f"{repo_id}: cannot be pushed to the hub: {hub.first_lines(error)}") from None
    return str(commit.commit_url)
