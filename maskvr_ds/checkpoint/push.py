"""Upload of an exported folder to a Hugging Face hub, by huggingface_hub with its endpoint and its token."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from maskvr_ds.checkpoint.export import ExportError

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_push(name: str, *, private: bool) -> str:
    """The complete name, OWNER/NAME, of a model that this user can upload as `name`.

    Call before the export. private: a new model will be private. Raises ExportError for an invalid name, without a
    token or with one that the hub does not accept or that may not write, if the hub cannot be reached, and if the
    model exists and is public although it was to be private.
    """
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ExportError(f"--push {name}: {_first_line(error)}; OWNER/NAME expected") from None
    if get_token() is None:
        raise ExportError(f"--push {name}: there is no token for {constants.ENDPOINT}; {_LOG_IN}")
    api = HfApi()
    try:
        user = api.whoami()
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        name = name if "/" in name else f"{user['name']}/{name}"
        existing = _existing(api, name)
    except Exception as error:  # of the library and of its HTTP client
        raise ExportError(f"--push {name}: {_why(error, name)}") from None
    if role == "read":
        raise ExportError(f"--push {name}: the token of {user['name']} may only read; {_LOG_IN}")
    if private and existing is False:
        raise ExportError(
            f"--push {name}: {constants.ENDPOINT}/{name} exists and is public, and --private is for new models; change "
            "its visibility in its settings, choose another name, or omit --private"
        )
    return name


def push(folder: Path, name: str, *, private: bool) -> tuple[str, bool]:
    """Create the model if there is none, and upload all files of the folder.

    name: OWNER/NAME. private: of a new model; one that exists keeps its visibility. Returns the URL of the commit and
    whether the model is private. Raises ExportError if that fails; the folder stays.
    """
    api = HfApi()
    disable_progress_bars()
    try:
        # None: as the owner's settings say, in general public.
        api.create_repo(name, private=True if private else None, exist_ok=True)
        # Before the upload: afterwards an error would deny it.
        is_private = bool(_existing(api, name))
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by maskvr export")
    except Exception as error:  # of the library and of its HTTP client
        again = f"hf upload {name} {shlex.quote(str(folder))} .{' --private' if private else ''}"
        raise ExportError(
            f"--push {name}: {_why(error, name)}. The export is complete in {folder}; to upload it later: {again}"
        ) from None
    return str(commit.commit_url), is_private


def _existing(api: HfApi, name: str) -> bool | None:
    """Whether the model is private; None if there is none."""
    try:
        return bool(api.model_info(name).private)
    except RepositoryNotFoundError:
        return None


def _why(error: Exception, name: str) -> str:
    """Reason and remedy."""
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "offline mode is set (HF_HUB_OFFLINE); unset it, or upload from a machine with access"
    # None: the request was not answered.
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return f"{endpoint} does not accept the token (401); {_LOG_IN}"
    if status == 403:
        owner = name.partition("/")[0]
        return (
            f"{endpoint} does not let this token write there (403); {_LOG_IN} to models of {owner}, or choose an owner "
            "that is you or one of your organizations"
        )
    reason = _first_line(error.__cause__ or error)
    if status is None:
        return f"{endpoint} cannot be reached ({reason}); correct HF_ENDPOINT, or upload from a machine with access"
    return f"{endpoint} answers {status}: {reason}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
