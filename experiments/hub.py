"""Sending an exported folder to the Hugging Face hub: what goes where is printed first, and nothing goes without a yes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.compose import ConfigError

LOGIN = "log in with `hf auth login`, or put a token that may write into HF_TOKEN (huggingface.co/settings/tokens)"


class NotSent(RuntimeError):
    """The hub refused, or could not be reached. One line that says what to do."""


def check_asked(repo: str, yes: bool) -> None:
    """Raise ConfigError unless ``repo`` is a name on the hub and there is somebody who can say yes. Before any work."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"hub={repo}: {str(error).splitlines()[0]}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"hub={repo} must be user/name")
    if not yes and not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on before sending; yes=true sends without asking")


def send(folder: Path, names: Sequence[str], repo: str, *, private: bool = False, yes: bool = False) -> str | None:
    """Send those of the files ``names`` that ``folder`` has to the model repository ``repo``, which is made if it is not there.

    Asks on the terminal unless ``yes``. Returns the address, or None where the answer was no.

    Raises:
        ConfigError: nobody is logged in, or ``private`` is wanted of a repository that others can see.
        NotSent: the hub refused, or could not be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    files = [folder / name for name in names if (folder / name).is_file()]
    try:
        api = huggingface_hub.HfApi()
        user = api.whoami()["name"]
        there = api.repo_exists(repo)
        hidden = api.repo_info(repo).private if there else private
        if private and not hidden:
            raise ConfigError(
                f"private=true, but {repo} is there already and public; change it in its settings, or name another"
            )
        print(
            f"to {api.endpoint}/{repo} ({'private' if hidden else 'PUBLIC'}, {'there already' if there else 'new'}), as {user}:"
        )
        for file in files:
            print(f"  {file.name:18}{size(file.stat().st_size)}")
        if left := sorted(path.name for path in folder.iterdir() if path not in files):
            print(f"  not sent: {', '.join(left)}")
        if not yes and not _agreed():
            print("nothing was sent")
            return None
        if not there:
            api.create_repo(repo, private=private, exist_ok=True)
        told = "Exported decoder" if not there else "Exported decoder, anew"
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[file.name for file in files], commit_message=told
        )
    except LocalTokenNotFoundError:
        raise ConfigError(f"nobody is logged in to the hub: {LOGIN}") from None
    except (OSError, HTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = LOGIN if status in (401, 403) else "what is in the folder is whole; try again later"
        raise NotSent(f"the hub did not take {folder} ({reason}): {advice}") from None
    print(f"sent: {api.endpoint}/{repo}")
    return f"{api.endpoint}/{repo}"


def _agreed() -> bool:
    try:
        return input("send? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def size(number: int) -> str:
    """1234567 bytes -> "1.2 MB"."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= step:
            return f"{number / step:.1f} {unit}"
    return f"{number} B"
