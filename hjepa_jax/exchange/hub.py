"""Uploads an exported encoder to the Hugging Face hub, with the package `huggingface_hub`."""

import pathlib
import re

from hjepa_jax.errors import InputError, first_line

FLAG = "--push"


def check_push(name: str) -> None:
    """Checks everything that does not need a connection.

    Raises:
      InputError: if the name is not USER/NAME, the package is not installed, or there is no token
        ("--push").
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(FLAG, name, "must be USER/NAME, a repository on the hub")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        rule = "needs the package huggingface_hub (extra hub): pip install huggingface_hub"
        raise InputError(FLAG, name, rule) from error
    if not huggingface_hub.get_token():
        rule = "needs a token of the hub: run `hf auth login`, or set HF_TOKEN"
        raise InputError(FLAG, name, rule)


def push(folder: pathlib.Path, name: str) -> str:
    """Uploads a folder. If the repository does not exist, a private one is created.

    Args:
      folder: a folder that `export` has written.
      name: USER/NAME.

    Returns:
      The address of the repository.

    Raises:
      InputError: see `check_push`, or if the hub refuses ("--push").
    """
    check_push(name)
    from huggingface_hub import HfApi  # pyright: ignore[reportMissingImports]

    try:
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an encoder")
    except Exception as error:  # errors of the connection, the hub or a full disk
        rule = f"could not be uploaded ({first_line(error)}); the files are in {folder}"
        raise InputError(FLAG, name, rule) from error
    return str(address)
