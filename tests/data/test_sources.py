"""Every input is read as it is meant, and what can't be used is named with its reason."""

import dataclasses
import io
import json
import math
import os
import re
import sys
import tarfile
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from starflow_jax.config import Prepare, UserError
from starflow_jax.data.raw import tars
from starflow_jax.data.raw.items import Item, Rejected
from starflow_jax.data.raw.sources import Unit, list_units, read_unit

FIELDS = Prepare(long_captions="caption_long", short_captions="caption_short, txt, caption")


def read(source, size=3, **settings):
    """All items of an input, in order."""
    units = list_units(str(source), size)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert json.dumps([dataclasses.asdict(unit) for unit in units])  # they are written down
    return [item for unit in units for item in read_unit(unit, dataclasses.replace(FIELDS, **settings))]


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def reasons(items):
    return {item.key: item.reason for item in items if isinstance(item, Rejected)}


def test_a_folder_with_captions_beside_the_files(tmp_path):
    write(tmp_path, b_mp4="B", b_txt="  two\nlines ", sub__a_MOV="A", c_jpg="C",
          c_json='{"caption_long": "a long one", "caption": "short"}', d_webm="D",
          d_json='{"caption_long": ["best", "second"]}', d_txt="from the txt")
    (tmp_path / "sub" / "a.txt").write_bytes("\ufeffüber".encode())
    (tmp_path / "notes.pdf").write_text("not media")
    items = read(tmp_path)
    assert items == [
        Item("b", str(tmp_path / "b.mp4"), False, "two lines", "two lines"),
        Item("c", str(tmp_path / "c.jpg"), True, "a long one", "short"),
        Item("d", str(tmp_path / "d.webm"), False, "best", "from the txt"),
        Item("sub/a", str(tmp_path / "sub" / "a.MOV"), False, "über", "über")]


def test_units_hold_so_many_files_and_are_plain_data(tmp_path):
    write(tmp_path, **{f"v{index}_mp4": "x" for index in range(5)})
    units = list_units(str(tmp_path), 2)
    assert [unit.entries for unit in units] == [("v0.mp4", "v1.mp4"), ("v2.mp4", "v3.mp4"), ("v4.mp4",)]
    assert json.loads(json.dumps([vars(unit) for unit in units]))[2]["entries"] == ["v4.mp4"]


def test_each_real_folder_is_read_once_however_many_links_lead_to_it(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "outside"
    write(inside, a_mp4="", b__c_mp4="", b__d__e_mp4="")
    write(outside, f_mp4="", g__h_mp4="")
    (inside / "b" / "d" / "loop").symlink_to(inside)
    (inside / "itself").symlink_to("itself")
    (inside / "a_before_b").symlink_to(inside / "b")  # read under its own name, b
    (inside / "m").symlink_to(outside)
    (inside / "n").symlink_to(outside)
    (inside / "z.mp4").symlink_to(inside / "a.mp4")  # a file may have several names: each is a video
    (outside / "g" / "back").symlink_to(inside / "b" / "d")
    (outside / "g" / "up").symlink_to(outside)
    unit, = list_units(str(inside), 99)
    assert unit.entries == ("a.mp4", "b/c.mp4", "b/d/e.mp4", "m/f.mp4", "m/g/h.mp4", "z.mp4")
    (tmp_path / "link").symlink_to(inside)
    assert list_units(str(tmp_path / "link"), 99)[0].entries == unit.entries


def test_what_is_wrong_with_a_folder_s_captions_is_said(tmp_path):
    write(tmp_path, none_mp4="", empty_mp4="", empty_txt=" \n", latin_mp4="", latin_txt="na\xefve".encode("latin-1"),
          broken_mp4="", broken_json="{", list_mp4="", list_json="[1]", good_mp4="", good_txt="yes")
    found = reasons(read(tmp_path))
    assert found.pop("none") == found.pop("empty") == "no caption"
    assert found.pop("latin") == "wrong encoding: the caption is not UTF-8 (byte 2)"
    assert found.pop("broken").startswith("unreadable JSON: ") and found.pop("list").startswith("unreadable JSON: not")
    assert not found


def test_a_csv_list_with_stretches(tmp_path):
    write(tmp_path, a_mp4="A", b_mp4="B")
    (tmp_path / "list.csv").write_text('path,caption,caption_long,start,end\na.mp4,"one, two",long,1.5,4\n'
                                       "b.mp4,three,,,\nb.mp4,four,,9,2\nb.mp4,five,,soon,\ngone.mp4,six,,,\n"
                                       "http://x/y.mp4,seven,,,\nlist.csv,eight,,,\n,nine,,,\nb.mp4,,,,\n")
    items = read(tmp_path / "list.csv")
    assert items[0] == Item("a.mp4#0", str(tmp_path / "a.mp4"), False, "long", "one, two", 1.5, 4.0)
    assert items[1] == Item("b.mp4#1", str(tmp_path / "b.mp4"), False, "three", "three", 0.0, math.inf)
    found = reasons(items)
    assert "no stretch" in found["b.mp4#2"] and "not a number of seconds" in found["b.mp4#3"]
    assert found["gone.mp4#4"] == "file not found" and "download it first" in found["http://x/y.mp4#5"]
    assert "not a video" in found["list.csv#6"] and found["row 7"] == "no path" and found["b.mp4#8"] == "no caption"
    assert len(items) == 9


def test_one_bad_line_of_a_jsonl_list_costs_one_line(tmp_path):
    write(tmp_path, a_mp4="A")
    good = json.dumps({"path": "a.mp4", "caption": "fine"}).encode()
    latin = b'{"path": "a.mp4", "caption": "na\xefve"}'
    (tmp_path / "list.jsonl").write_bytes(b"\n".join([good, b"{oops", b"", latin, b"3", good]))
    items = read(tmp_path / "list.jsonl", size=2)
    assert [type(item) for item in items] == [Item, Rejected, Rejected, Rejected, Item]
    found = reasons(items)
    assert found["row 1"].startswith("unreadable JSON") and "not UTF-8" in found["a.mp4#2"]
    assert found["row 3"] == "no path" and items[4].key == "a.mp4#4"


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    write(tmp_path, b_mp4="", c_mp4="", c_txt="fine")
    (tmp_path / "list.csv").write_text("path,caption\na.mp4,one\nd.mp4,two\n")
    os.mkfifo(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "d.mp4").symlink_to("/dev/zero")
    reason = "unreadable: not a regular file"
    assert reasons(read(tmp_path)) == {"a": reason, "b": reason, "d": reason}
    assert reasons(read(tmp_path / "list.csv")) == {"a.mp4#0": reason, "d.mp4#1": reason}


DEEP = "[" * 100_000


def test_json_nested_without_end_costs_its_item_only(tmp_path):
    write(tmp_path, a_mp4="", a_json=DEEP, b_mp4="", b_txt="fine")
    assert read(tmp_path)[1].key == "b" and reasons(read(tmp_path)) == {"a": "unreadable JSON: nested too deeply"}
    # Also what can be read, but not be copied or written down again.
    deep = '{"path": "b.mp4", "caption": "fine", "tree": ' + "[" * 400 + "]" * 400 + ', "start": {"s": 1}}'
    (tmp_path / "list.jsonl").write_text(
        f'{DEEP}\n{deep}\n{{"path": "b.mp4", "caption": "fine", "start": 1{"0" * 400}}}\n'
        '"text"\n{"path": "b.mp4", "caption": ["best", "worse"], "start": null, "end": 1e400}\n')
    *bad, good = read(tmp_path / "list.jsonl")
    assert [entry.reason for entry in bad] == [
        "unreadable JSON: nested too deeply", "start is '[]', not a number of seconds",
        f"start is '1{'0' * 99}', not a number of seconds", "no path"]
    assert good == Item("b.mp4#4", str(tmp_path / "b.mp4"), False, "best", "best")


def test_a_huge_field_costs_its_row_only(tmp_path):
    write(tmp_path, a_mp4="")
    (tmp_path / "list.csv").write_text(f"path,caption\na.mp4,{'x' * 17_000_000}\na.mp4,fine\n")
    first, second = read(tmp_path / "list.csv")
    assert first == Rejected("a.mp4#0", "too large: the caption has 17 MB, more than prepare.max_text_mb=16")
    assert second.caption_long == "fine"
    (tmp_path / "a.txt").write_text("x" * 1_100_000)
    assert reasons(read(tmp_path, max_text_mb=1)) == {
        "a": "too large: the .txt has 1 MB, more than prepare.max_text_mb=1"}


def test_a_parquet_list(tmp_path):
    write(tmp_path, a_mp4="A", b_png="B")
    columns = {"path": ["a.mp4", "b.png", None], "caption": ["one", None, "x"], "caption_long": [None, "two", "y"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    items = read(tmp_path / "list.parquet")
    assert items[:2] == [Item("a.mp4#0", str(tmp_path / "a.mp4"), False, "one", "one"),
                         Item("b.png#1", str(tmp_path / "b.png"), True, "two", "two")]
    assert reasons(items) == {"row 2": "no path"}
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        read(tmp_path / "bad.parquet")


def tar_of(path, files, mode="w", header=None):
    """header: a further member of this type and content, at the end."""
    with tarfile.open(path, mode, **({"compresslevel": 1} if mode == "w:gz" else {})) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if header:
            info = tarfile.TarInfo("header")
            info.type, info.size = header[0], len(header[1])
            tar.addfile(info, io.BytesIO(header[1]))


SAMPLES = {"0/001.mp4": b"one", "0/001.txt": b"first", "0/001.json": b'{"caption_long": "the first"}',
           "0/002.json": b'{"status": "failed_to_download", "error_message": "HTTP 404"}',
           "0/003.jpg": b"three", "0/003.txt": b"third", "0/004.mp4": b"four" * 2000, "0/004.txt": b"fourth"}


def test_tars_as_video2dataset_writes_them(tmp_path):
    for number in (1, 0):
        tar_of(tmp_path / f"0000{number}.tar", SAMPLES)
    first = [Item("00000.tar/0/001", b"one", False, "the first", "first"),
             Rejected("00000.tar/0/002", "no video or picture in the sample: HTTP 404"),
             Item("00000.tar/0/003", b"three", True, "third", "third"),
             Item("00000.tar/0/004", b"four" * 2000, False, "fourth", "fourth")]
    for source in (tmp_path, tmp_path / "*.tar"):
        items = read(source)
        assert items[:4] == first and items[4].key == "00001.tar/0/001" and len(items) == 8
    assert read(tmp_path / "00000.tar") == first


@pytest.mark.parametrize("end", [100, 5_700, -12_000])
def test_a_damaged_tar_gives_what_comes_before_the_damage(tmp_path, end):
    tar_of(tmp_path / "whole.tar", SAMPLES)
    whole = read(tmp_path / "whole.tar")
    (tmp_path / "part.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:end])
    *before, last = read(tmp_path / "part.tar")
    assert "tar damaged: after" in last.reason
    assert [vars(item) | {"key": ""} for item in before] == [vars(item) | {"key": ""} for item in whole[:len(before)]]
    assert len(before) < 4


def test_what_a_tar_unpacks_to_is_limited_before_it_is_read(tmp_path, monkeypatch):
    zeros = bytes(20_000_000)
    samples = {"1.mp4": b"one", "1.txt": zeros, "2.mp4": zeros, "2.txt": b"two", "3.mp4": b"three", "3.txt": b"three",
               "3.npy": zeros}
    tar_of(tmp_path / "bomb.tar.gz", samples, "w:gz")
    tracemalloc.start()
    first, second, third = read(tmp_path / "bomb.tar.gz", max_file_mb=19, max_unpacking=5_000)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert third.media == b"three"
    assert first.reason == "too large: the .txt has 20 MB, more than prepare.max_text_mb=16"
    assert second.reason == "too large: the .mp4 has 20 MB, more than prepare.max_file_mb=19"
    # What lies before the one that is too much is kept.
    monkeypatch.setattr(tars, "_ALWAYS", 50_000_000)
    first, second, rest = read(tmp_path / "bomb.tar.gz", max_unpacking=10)
    assert (first.key, second.key) == ("bomb.tar.gz/1", "bomb.tar.gz/2")
    assert rest == Rejected("bomb.tar.gz/3", "tar damaged: after 6 files, it unpacks to more than "
                                             "prepare.max_unpacking=10 times its size")


def test_a_tar_is_packed_by_gzip_or_not_at_all(tmp_path):
    tar_of(tmp_path / "a.tar.gz", SAMPLES, "w:gz")
    tar_of(tmp_path / "b.tar", SAMPLES)
    tar_of(tmp_path / "c.tar", SAMPLES, "w:bz2")
    gzipped, plain, others = (read(tmp_path / name) for name in ("a.tar.gz", "b.tar", "c.tar"))
    assert [item.key.partition("/")[2] for item in gzipped] == [item.key.partition("/")[2] for item in plain]
    assert len(plain) == 4 and others[0].key == "c.tar" and "tar damaged: after 0 files" in others[0].reason


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_headers_of_a_tar_take_no_memory(tmp_path, kind):
    zeros = bytes(30_000_000)
    tar_of(tmp_path / "a.tar.gz", {"1.mp4": b"one", "1.txt": b"one"}, "w:gz", (kind, zeros))
    tracemalloc.start()
    *before, last = read(tmp_path / "a.tar.gz", max_unpacking=5_000)
    assert tracemalloc.get_traced_memory()[1] < 15_000_000
    tracemalloc.stop()
    assert not before and last.reason == "tar damaged: after 2 files, a header that no tar of media has"


@pytest.mark.parametrize("name,message", [
    ("", "prepare.input is empty"), ("missing", "not found"), ("missing.tar", "no videos"), ("none", "no videos"),
    ("text.txt", "neither a folder"), ("columns.csv", 'no column "path"; its columns are file, caption')])
def test_inputs_that_can_not_be_are_refused(tmp_path, name, message):
    (tmp_path / "none").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "columns.csv").write_text("file,caption\n")
    with pytest.raises(UserError, match=message):
        list_units(str(tmp_path / name) if name else "", 2)


@pytest.mark.parametrize("source,message", [
    ("gs://bucket/videos", "needs its driver; pip install gcsfs"), ("gs://b/*.tar", "pip install gcsfs"),
    ("s3://bucket/list.csv", "pip install s3fs"), ("http://host/videos.tar", "addresses of http:// are not taken"),
    ("https://host/list.csv", "name a local path or one of gs://")])
def test_addresses_that_can_not_be_read_are_refused(source, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        list_units(source, 2)
    assert f"prepare.input={source}: " in str(raised.value)


def test_a_unit_reads_its_own_files_only(tmp_path):
    write(tmp_path, a_mp4="A", a_txt="a", b_mp4="B", b_txt="b")
    assert [item.key for item in read_unit(Unit(0, "folder", str(tmp_path), ("b.mp4",)), FIELDS)] == ["b"]
