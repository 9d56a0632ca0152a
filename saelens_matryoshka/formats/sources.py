"""Where files come from: a folder, a repository of the Hugging Face hub, an artifact of Weights & Biases.

A `Source` gives files by their relative path, and never one outside of itself.
"""

from __future__ import annotations

import os
import re
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from saelens_matryoshka.formats.files import FormatError

_MAX_LISTED = 100_000
_WANDB = re.compile(r"(?:wandb:)?([\w.-]+/[\w.-]+/[\w.-]+:[\w.-]+)")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_URI = re.compile(r"hf://([\w.-]+/[\w.-]+)/([^?#]+?)(?:\?revision=([\w./-]+))?")


class Source(ABC):
    """Files by relative path."""

    label: str
    """what to call it in messages and metadata"""

    def file(self, relative: str) -> Path:
        """The file on disk, fetched if need be.

        Raises:
            FormatError: there is none, or the path leads out of the source.
        """
        found = self.find(relative)
        if found is None:
            raise FormatError(f"{self.label} has no file {relative!r}.")
        return found

    def find(self, relative: str) -> Path | None:
        """As `file`, but None where there is no such file."""
        return self._find(safe_relative(relative, self.label))

    @abstractmethod
    def _find(self, relative: str) -> Path | None: ...

    def names(self, inside: str = "") -> list[str]:
        """The relative paths of the files at or below a path in it, sorted."""
        return sorted(self._names(safe_relative(inside, self.label).removeprefix(".")))

    @abstractmethod
    def _names(self, inside: str) -> list[str]: ...


class Folder(Source):
    """A folder on disk.

    Args:
        root: The folder.
        label: What to call it; None: its path.
        named: A path in it that the user named: if that is a link, it is followed.
    """

    def __init__(self, root: Path | str, label: str | None = None, named: Path | None = None) -> None:
        self.root = Path(root).resolve()
        self.label = label or str(root)
        # The files of a cached hub snapshot are links into the cache's folder of that repository.
        above = (self.root, *self.root.parents)
        caches = [folder.parent / "blobs" for folder in above if folder.name == "snapshots"]
        self._allowed = [self.root, *caches, *([] if named is None else [named.resolve()])]

    def _find(self, relative: str) -> Path | None:
        path = self.root / relative
        try:
            if not path.is_file():
                return None
        except OSError:  # a name that no file system takes
            return None
        resolved = path.resolve()
        if not any(resolved.is_relative_to(folder) for folder in self._allowed):
            raise FormatError(f"{self.label}: {relative!r} is a link to {resolved}, outside of the folder.")
        return path

    def _names(self, inside: str) -> list[str]:
        start = self.root / inside
        if start.is_file():
            return [inside]
        found: list[str] = []
        for path in start.rglob("*"):
            if path.is_file():
                found.append(path.relative_to(self.root).as_posix())
            if len(found) > _MAX_LISTED:
                raise FormatError(f"{start} holds more than {_MAX_LISTED:,} files: name what to read.")
        return found


class HubRepository(Source):
    """A model repository of the Hugging Face hub, or of the offline cache.

    Args:
        repo_id: "user/name".
        revision: Branch, tag or commit; None: the main one.
        force_download: Fetch files even if they are in the cache.
    """

    def __init__(self, repo_id: str, revision: str | None = None, force_download: bool = False) -> None:
        self.repo_id, self.revision, self.force_download = repo_id, revision, force_download
        self.label = f"{repo_id}@{revision}" if revision else repo_id

    def _find(self, relative: str) -> Path | None:
        try:
            path = hf_hub_download(
                self.repo_id, relative, revision=self.revision, force_download=self.force_download
            )
        except LocalEntryNotFoundError:
            # Not in the cache and the hub cannot be asked: absent only if the repository is cached at all.
            if self._snapshot() is None:
                raise
            return None
        except EntryNotFoundError:
            return None
        return Path(path)

    def _names(self, inside: str) -> list[str]:
        try:
            names = HfApi().list_repo_files(self.repo_id, revision=self.revision)
        except OfflineModeIsEnabled:
            snapshot = self._snapshot()
            if snapshot is None:
                raise
            return Folder(snapshot).names(inside)
        return [name for name in names if not inside or name == inside or name.startswith(inside + "/")]

    def _snapshot(self) -> Path | None:
        try:
            return Path(snapshot_download(self.repo_id, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None


def wandb_artifact(name: str) -> Folder:
    """The files of a W&B artifact, downloaded into a temporary folder.

    Args:
        name: "entity/project/artifact:version".

    Raises:
        ImportError: wandb is not installed.
        FormatError: the artifact cannot be had.
    """
    try:
        import wandb
    except ImportError:
        raise ImportError("Reading a W&B artifact needs `pip install wandb`.") from None
    folder = tempfile.mkdtemp(prefix="saelens-matryoshka-")
    try:
        wandb.Api().artifact(name).download(root=folder)
    except (wandb.Error, ValueError, OSError) as error:
        raise FormatError(f"W&B artifact {name!r} cannot be had: {error}") from None
    return Folder(folder, label=f"W&B artifact {name}")


def open_source(src: str) -> tuple[Source, str]:
    """The source that a user means, and the path in it ("" for all of it).

    Args:
        src: A path, a hub repository "user/name", "user/name/folder/in/it" or a W&B artifact
            "entity/project/artifact:version".

    Raises:
        FormatError: there is no such path and it is no name of the others.
    """
    path = Path(src).expanduser()
    if src and path.exists():  # "", a variable that is not set, is not the current folder
        # From the folder above, because some formats keep part of their settings there.
        path = Path(os.path.abspath(path))
        return Folder(path.parent, label=str(path.parent), named=path), path.name
    if artifact := _WANDB.fullmatch(src):
        return wandb_artifact(artifact[1]), ""
    repo_id, inside = "/".join(src.split("/")[:2]), "/".join(src.split("/")[2:])
    if src.startswith((".", "/", "~")) or not _HUB.fullmatch(repo_id):
        raise FormatError(
            f"{src!r} is neither a file nor a folder here, nor a hub repository ('user/name'), nor a W&B "
            "artifact ('entity/project/artifact:version')."
        )
    return HubRepository(repo_id), inside


def hub_uri(uri: str) -> tuple[HubRepository, str]:
    """The repository and the path of "hf://user/name/path?revision=x".

    Raises:
        FormatError: it is not such a reference.
    """
    match = _HUB_URI.fullmatch(uri)
    if match is None:
        raise FormatError(f"{uri!r} is not a reference like 'hf://user/name/path?revision=main'.")
    repo_id, path, revision = match.groups()
    return HubRepository(repo_id, revision), safe_relative(path, uri)


def safe_relative(relative: str, label: str) -> str:
    """The path, if it is relative and stays below where it starts.

    Raises:
        FormatError: it is absolute, or has a part "..".
    """
    path = PurePosixPath(relative)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in relative or "\0" in relative
    if unsafe or re.match(r"[A-Za-z]:", relative):
        raise FormatError(f"{label}: path {relative!r} leads out of its folder; it is not read.")
    return path.as_posix()
