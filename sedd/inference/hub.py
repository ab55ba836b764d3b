"""An exported model as a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from sedd import __version__
from sedd.errors import UserError


def push(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload the files of an exported model.

    Parameters
    ----------
    folder
        What `sedd.inference.export.write_export` made, and nothing else.
    repo_id, private, token
        As in `sedd.Pretrained.push_to_hub`.

    Returns
    -------
    url
        Of the repository.

    Raises
    ------
    UserError
        If `huggingface_hub` is not installed or the upload failed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("push_to_hub needs the package huggingface_hub, which is not installed: pip install huggingface_hub.") from None
    api = HfApi(token=token, library_name="sedd", library_version=__version__)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"A model of sedd {__version__}")
    except Exception as error:  # its own, and those of the HTTP library that it uses, which changed with its versions
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if token:
            reason = reason.replace(token, "...")
        raise UserError(
            f"{repo_id}: the model was not uploaded ({reason}). Expected the name of a repository that you may write to, as in ada/blood, "
            "and to be logged in (`hf auth login`) or a token."
        ) from error
    return str(url)
