"""Samples of WebDataset tars, as video2dataset and img2dataset write them: KEY.mp4, KEY.txt, KEY.json in a row.

A few megabytes of a compressed tar can unpack to more than a machine has memory: what a member's header says about its
size is checked before it is read.
"""

import tarfile
from collections.abc import Iterator
from typing import Self

from etils import epath

from starflow_jax.config import Prepare
from starflow_jax.data.raw.items import (
    MEDIA_SUFFIXES,
    Item,
    Rejected,
    Unusable,
    camera_of,
    captions_of,
    check_size,
    fields_of,
    is_image,
    printable,
    text_suffixes,
)

TARS = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"  # what it begins with
_ALWAYS = 2**26  # bytes that may be unpacked of any tar, however small it is
_LONG_NAME = 2**20  # bytes of a header that carries a name
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
          tarfile.SOLARIS_XHDTYPE)


class _Header(tarfile.TarInfo):
    """A member's header. What comes after one that carries a name, or a map of holes, tarfile reads at once."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE or (header.type in _NAMES and header.size > _LONG_NAME):
            raise tarfile.ReadError("a header that no tar of media has")
        return header


class _Sample:
    """The members of one key: the first video or picture, the captions and the camera."""

    def __init__(self, key: str, settings: Prepare) -> None:
        self.key, self._settings = key, settings
        self._files: dict[str, bytes] = {}
        self._media = ""
        self._reason = ""  # why it can't be used

    def take(self, suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        """Read a member, unless it is of no use or larger than the settings allow."""
        is_media = f".{suffix}".endswith(MEDIA_SUFFIXES)
        if not (suffix in text_suffixes(self._settings) or is_media and self._media in ("", suffix)):
            return
        limit = "max_file_mb" if is_media else "max_text_mb"
        try:
            check_size(f".{suffix}", member.size, getattr(self._settings, limit), limit)
        except Unusable as error:
            self._reason = self._reason or str(error)
            return
        content = tar.extractfile(member)
        self._files[suffix] = content.read() if content else b""
        self._media = suffix if is_media else self._media

    def item(self, tar_name: str) -> Item | Rejected:
        key = f"{tar_name}/{self.key}"
        try:
            if self._reason:
                raise Unusable(self._reason)
            fields = fields_of(self._files)
            if not self._media:
                said = fields.get("error_message")
                raise Unusable("no video or picture in the sample" + (f": {str(said)[:200]}" if said else ""))
            long, short = captions_of(fields, self._settings)
            camera = camera_of(self._files, self._settings, f".{self._media}")
        except Unusable as error:
            return Rejected(key, str(error))
        return Item(key, self._files[self._media], is_image(f".{self._media}"), long, short, camera=camera)


def read_tar(path: str, settings: Prepare) -> Iterator[Item | Rejected]:
    """A tar's samples in its order, one in memory at a time."""
    tar_name = epath.Path(path).name
    sample: _Sample | None = None
    count = 0
    try:
        for key, suffix, member, tar in _members(epath.Path(path), settings.max_unpacking):
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample.item(tar_name)
                sample = _Sample(key, settings)
            sample.take(suffix, member, tar)
            count += 1
    except Exception as error:  # a damaged tar can make tarfile fail in any way
        # The sample under way may lack what comes after the damage, so it is left out with the rest.
        yield Rejected(f"{tar_name}/{sample.key}" if sample else tar_name,
                       f"tar damaged: after {count} files, {error or type(error).__name__}")
        return
    if sample is not None:
        yield sample.item(tar_name)


def _members(path: epath.Path, most_times: int) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """(the sample's key, suffix, header, the tar to read it from) of each file; raises ReadError at what unpacks to
    more than so many times the tar's size."""
    most = _ALWAYS + most_times * path.stat().length
    with path.open("rb") as file:
        # No bzip2 and xz, of which ten kilobytes, that tarfile unpacks at once, can become gigabytes.
        packed = file.read(len(_GZIP)) == _GZIP
    with (path.open("rb") as file,
          tarfile.open(fileobj=file, mode="r|gz" if packed else "r|", tarinfo=_Header) as tar):
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header in memory
            if member.offset_data + member.size > most:
                raise tarfile.ReadError(f"it unpacks to more than prepare.max_unpacking={most_times} times its size")
            if member.isfile():
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                yield printable(folder + slash + stem), suffix.lower(), member, tar
