"""Model hub client: file lists with sizes, and resumable downloads, by huggingface_hub.

Its errors become one line: what failed, and what to do. A download that was cut off goes on where it was.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lance_quant.errors import InputError

_LIBRARIES = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "hf_xet"}  # whose errors are the network's


class Hub(Protocol):
    """Where repositories of files are."""

    def files(self, repo: str) -> Mapping[str, int]:
        """Bytes of every file of a repository, by its path in there."""
        ...

    def fetch(self, repo: str, names: Sequence[str], folder: Path) -> None:
        """Bring files into a folder, under their paths; files that are there already, whole, are left alone."""
        ...


class HuggingFace:
    """huggingface.co, or what HF_ENDPOINT names."""

    def files(self, repo: str) -> Mapping[str, int]:
        """See Hub.

        Raises:
            InputError: it cannot be reached, or there is no such repository.
        """
        import huggingface_hub

        try:
            found = huggingface_hub.HfApi().model_info(repo, files_metadata=True).siblings or []
        except Exception as error:
            raise _said(error, repo) from error
        return {file.rfilename: file.size or 0 for file in found}

    def fetch(self, repo: str, names: Sequence[str], folder: Path) -> None:
        """See Hub.

        Raises:
            InputError: the connection broke; what came so far is kept.
        """
        import huggingface_hub

        try:
            huggingface_hub.snapshot_download(repo, local_dir=folder, allow_patterns=list(names))
        except Exception as error:
            raise _said(error, repo) from error


def _said(error: Exception, repo: str) -> Exception:
    """What a user is told of an error of the hub's; others stay as they are."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "GatedRepoError" in kinds:
        return InputError(f"{repo} wants its terms accepted: do so on https://huggingface.co/{repo}, log in with "
                          "`hf auth login`, and run this again")
    if "RepositoryNotFoundError" in kinds:
        return InputError(f"there is no {repo} on the hub, or it is private: {reason}")
    if "OfflineModeIsEnabled" in kinds:
        return InputError(f"HF_HUB_OFFLINE is set, so {repo} cannot be reached: unset it, or download on another "
                          "machine and copy the folder")
    network = any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__) \
        or isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno is None)
    if network:
        return InputError(f"{repo} cannot be reached ({reason}): check the connection, or name a mirror in HF_ENDPOINT."
                          " What has come so far is kept: the same command goes on from there")
    return error
