"""Fetches a checkpoint from the Hugging Face hub into its cache: first the small files, then the weights on request.

Cache folder, endpoint, offline mode and token come from the environment, as huggingface_hub reads it (``HF_HOME``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``). A revision is resolved once, to a commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_runtime.errors import ModelNotFound

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.py", "*.tiktoken")
_SUBFOLDERS = "*/*"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def is_hub_id(model: str) -> bool:
    """Whether ``model`` has the form of a hub id: ``name`` or ``owner/name``."""
    return _ID.fullmatch(model) is not None and len(model) <= 96 and "--" not in model and ".." not in model


@dataclass(frozen=True)
class HubSnapshot:
    """A repository at one commit; ``directory`` is its folder in the cache."""

    id: str
    commit: str
    directory: Path

    @classmethod
    def fetch(cls, model: str, revision: str | None) -> HubSnapshot:
        """Resolve ``revision`` (branch, tag or commit; None: the default branch) and fetch the small files."""
        from huggingface_hub import snapshot_download

        with _explained(model, revision):
            folder = snapshot_download(
                model, revision=revision, allow_patterns=list(SMALL_FILES), ignore_patterns=[_SUBFOLDERS]
            )
        return cls(model, Path(folder).name, Path(folder))

    def fetch_files(self, names: list[str]) -> None:
        """Fetch weight files by name into :attr:`directory`; ones that do not exist are left out without a word."""
        from huggingface_hub import snapshot_download

        with _explained(self.id, self.commit):
            snapshot_download(self.id, revision=self.commit, allow_patterns=names, ignore_patterns=[_SUBFOLDERS])

    def remote_names(self) -> list[str]:
        """Names of all files of the repository, or of those in the cache when the hub cannot be asked."""
        from huggingface_hub import HfApi

        try:
            return list(HfApi().list_repo_files(self.id, revision=self.commit))
        except Exception:  # only decorates messages: the cache is the next best answer, offline it is the only one
            return sorted(path.name for path in self.directory.iterdir())


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into ModelNotFound with what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as cause:
        raise ModelNotFound(
            f"{model} is gated: accept its conditions on its hub page, and set HF_TOKEN to a token of that account"
        ) from cause
    except errors.DisabledRepoError as cause:
        raise ModelNotFound(f"{model} was disabled on the hub; choose another model") from cause
    except errors.RepositoryNotFoundError as cause:
        raise ModelNotFound(
            f"the hub has no model {model!r}, or it is private; check the spelling (owner/name), or set HF_TOKEN"
        ) from cause
    except errors.RevisionNotFoundError as cause:
        raise ModelNotFound(f"{model} has no revision {revision!r}; its hub page lists branches and tags") from cause
    except errors.HFValidationError as cause:
        raise ModelNotFound(f"{model!r} is not a valid hub id: {cause}") from cause
    except errors.LocalEntryNotFoundError as cause:
        if isinstance(cause.__cause__, errors.HfHubHTTPError):
            raise ModelNotFound(_refused(model, at, cause.__cause__)) from cause
        raise ModelNotFound(_unreachable(model, at, cause)) from cause
    except errors.HfHubHTTPError as cause:
        raise ModelNotFound(_refused(model, at, cause)) from cause
    except (errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as cause:
        raise ModelNotFound(_unreachable(model, at, cause)) from cause
    except OSError as cause:
        raise ModelNotFound(f"{model}{at} could not be downloaded: {' '.join(str(cause).split())[:300]}") from cause


def _refused(model: str, at: str, answer: HfHubHTTPError) -> str:
    code = answer.response.status_code
    login = "set HF_TOKEN to a token that may read it" if code in (401, 403) else "try again later"
    return f"the hub answered {code} for {model}{at}; {login}"


def _unreachable(model: str, at: str, cause: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"{model}{at} is not (completely) in the cache {constants.HF_HUB_CACHE}, and offline mode is on; unset "
            "HF_HUB_OFFLINE to download it, or pass a local folder"
        )
    root = cause.__cause__ or cause
    reason = " ".join(str(root).split())[:200] or type(root).__name__
    return (
        f"{model}{at} is not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached "
        f"({reason}); check the connection, or pass a local folder"
    )
