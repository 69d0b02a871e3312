"""Files on a model hub by name, "hub:OWNER/NAME[@REVISION][:FILE]", by huggingface_hub (extra `hub`)."""

import re
from pathlib import Path

from starflow_jax.settings.fields import UserError

PREFIX = "hub:"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.pth", "*.pt", "*.distcp", ".metadata")
BESIDE = ("*.json", "*.yaml", "spiece.model", "README.md", "LICEN[SC]E*", "NOTICE*")  # small files about the weights


def on_disk(name: str, setting: str) -> str:
    """A path as it is; for a name on the hub, the file or folder in the hub's own cache, downloaded if it is not there.

    Raises UserError where huggingface_hub is not installed, and for what the hub does not have.
    """
    if not name.startswith(PREFIX):
        return name
    found = re.fullmatch(r"hub:([^/:@]+/[^/:@]+)(?:@([^:]+))?(?::(.+))?", name)
    if not found:
        raise UserError(f"{setting}={name!r}: must be hub:OWNER/NAME, with @REVISION and :FILE where they are wanted")
    repository, revision, file = found.groups()
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{setting}={name!r}: names on a hub need huggingface_hub; pip install 'starflow_jax[hub]', or "
                        "download the files") from error
    try:
        folder = Path(huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=[file or "", *(() if file else WEIGHTS), *BESIDE]))
    except (OSError, ValueError) as error:  # the base classes of all its own errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{setting}={name!r}: can't be downloaded from the hub ({reason})") from error
    return str(_file_in(folder, file, f"{setting}={name!r}"))


def _file_in(folder: Path, file: str | None, asked: str) -> Path:
    """The file that is named; else the folder or, where the only weights in it are one PyTorch file, that."""
    if file:
        if not (folder / file).exists():
            raise UserError(f"{asked}: the hub has no such file there")
        return folder / file
    files = sorted(path for kind in ("*.pth", "*.pt") for path in folder.glob(kind))
    if any(folder.glob("*.safetensors")) or (folder / ".metadata").exists() or not files:
        return folder
    if len(files) > 1:
        raise UserError(f"{asked}: holds {', '.join(path.name for path in files)}; name one of them after a colon")
    return files[0]
