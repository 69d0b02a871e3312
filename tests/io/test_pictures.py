"""Pictures: read upright and whole, resized, in sheets with captions, in moving pictures."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from starflow_jax.config import UserError
from starflow_jax.io import pictures
from tests.io.test_video import moving_square


def test_what_is_too_large_is_said_before_it_is_decoded(tmp_path):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    for side in (13_000, 60_000):
        size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") +
                                         chunk(b"IEND", b""))
        with pytest.raises(UserError, match=r"a\.png \(too large: "):
            pictures.read_image(tmp_path / "a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file, pytest.raises(pictures.NotAPicture, match="too large: 40x30, more"):
        pictures.open_picture(file, 1_000)


def test_no_other_program_reads_a_picture(tmp_path):
    """PostScript would be run by Ghostscript."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match="not a picture of a known kind"):
        pictures.read_image(tmp_path / "a.png")


def test_a_part_of_a_video_plays_once():
    frames = moving_square()[:4]
    moving = Image.open(io.BytesIO(pictures.webp_bytes(frames, fps=8, scale=3)))
    assert (moving.n_frames, moving.info["loop"], moving.size) == (4, 1, (3 * frames.shape[2], 3 * frames.shape[1]))
    for index, frame_HWC in enumerate(frames):
        moving.seek(index)
        shown = np.int32(moving.convert("RGB"))[1::3, 1::3]
        assert moving.info["duration"] == 125
        assert np.abs(shown - frame_HWC).mean() < 12
    assert Image.open(io.BytesIO(pictures.webp_bytes(frames[:1], fps=8))).size == frames.shape[2:0:-1]


def test_read_image(tmp_path):
    picture_HWC = moving_square()[3]
    Image.fromarray(picture_HWC).save(tmp_path / "picture.png")
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "picture.png"), picture_HWC)
    Image.fromarray(picture_HWC[:, :, 1]).save(tmp_path / "grey.png")
    assert pictures.read_image(tmp_path / "grey.png").shape == (32, 48, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(picture_HWC).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "turned.png"), np.rot90(picture_HWC, -1))
    whole = (tmp_path / "picture.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.png"):
        pictures.read_image(tmp_path / "cut.png")
    with pytest.raises(UserError, match="not found"):
        pictures.read_image(tmp_path / "none.png")


def test_resize_crop_covers_and_keeps_the_centre():
    wide_THWC = np.zeros((2, 20, 60, 3), np.uint8)
    wide_THWC[:, :, 20:40] = (10, 200, 60)  # the central square
    cropped_THWC = pictures.resize_crop(wide_THWC, 10, 10)
    error_THWC = np.abs(cropped_THWC.astype(int) - (10, 200, 60))
    assert error_THWC[:, :, 2:-2].max() == 0 and error_THWC.max() < 20  # the edge is antialiased
    tall_THWC = wide_THWC.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(pictures.resize_crop(tall_THWC, 10, 10), cropped_THWC.transpose(0, 2, 1, 3))
    for height, width in ((7, 13), (480, 848), (33, 5)):
        assert pictures.resize_crop(wide_THWC, height, width).shape == (2, height, width, 3)
    np.testing.assert_array_equal(pictures.resize_crop(wide_THWC, 20, 60), wide_THWC)


def test_resize_is_antialiased():
    checkers_HW = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small_THWC = pictures.resize_crop(np.stack([checkers_HW] * 3, -1)[None], 16, 16)
    assert np.abs(small_THWC.astype(int) - 127).max() < 20


def test_contact_sheet_shows_frames_and_captions(tmp_path):
    clips_BTHWC = np.stack([moving_square(), 255 - moving_square()])
    path = tmp_path / "sheet.png"
    pictures.contact_sheet(path, clips_BTHWC, ["a square", "a pale square"], columns=3, scale=2)
    sheet_HWC = pictures.read_image(path)
    cell_height, cell_width = 64 + pictures.MARGIN, 96 + pictures.MARGIN
    assert sheet_HWC.shape[1] == 3 * cell_width
    row_height = sheet_HWC.shape[0] // 2
    for row, clip_THWC in enumerate(clips_BTHWC):
        top = (row + 1) * row_height - cell_height
        for column, t in enumerate((0, 4, 8)):
            left = column * cell_width
            cell_HWC = sheet_HWC[top : top + 64 : 2, left : left + 96 : 2]
            np.testing.assert_array_equal(cell_HWC, clip_THWC[t])
        assert (sheet_HWC[row * row_height : top] < 100).sum() > 100  # ink of the caption


def test_captions_are_wrapped_to_their_width():
    caption = "an orange seven drifts slowly to the upper left corner of the picture"
    picture_HWC = pictures._caption_picture(caption, 120)
    assert picture_HWC.shape[1] == 120 and picture_HWC.shape[0] >= 3 * pictures.FONT_SIZE
    assert (picture_HWC[:, -1] == 255).all()  # nothing is cut off at the right
    narrow = pictures._caption_picture(caption, 8)
    assert narrow.shape[1] == 8


def test_gif_moves_and_is_small(tmp_path):
    clips_BTHWC = np.stack([moving_square(16)] * 5)
    path = tmp_path / "grid.gif"
    pictures.write_gif(path, clips_BTHWC, [f"square {i}" for i in range(5)], fps=10, columns=4, scale=2)
    with Image.open(path) as gif:
        assert gif.n_frames == 16 and gif.info["duration"] == 100 and gif.info["loop"] == 0
        assert gif.size[0] == 4 * (96 + pictures.MARGIN)
        gif.seek(15)
        last_HWC = np.asarray(gif.convert("RGB"))
    cell_height = 64 + pictures.MARGIN
    top = last_HWC.shape[0] - cell_height
    shown_HWC = last_HWC[top : top + 64 : 2, 0:96:2].astype(int)
    assert np.abs(shown_HWC - clips_BTHWC[4, 15]).max() <= 12
    assert path.stat().st_size < 60_000


def test_diagrams_and_frames_lie_where_they_belong(tmp_path):
    """Two rows of three videos, each of one colour, in their places; a curve, and a level in grey behind it."""
    colours = 250 * np.array([[(1, 0, 0), (0, 1, 0), (0, 0, 1)], [(1, 1, 0), (1, 0, 1), (0, 1, 1)]], np.uint8)
    frames = np.broadcast_to(colours[:, :, None, None, None], (2, 3, 2, 8, 8, 3))
    curve = pictures.Diagram("a share", {"one": [0.0, 0.5, 1.0], "two": [0.2, 0.2, 0.2]}, {"one": [0.8]})
    bare = pictures.Diagram("another", {"only": [1.0, 2.0]}, {}, places=[2, 4])
    path = tmp_path / "diagrams.png"
    pictures.draw_diagrams(path, [curve, bare], frames, ["first", "last"], ["a", "b", "c"], "all", "time")
    picture = pictures.read_image(path).astype(int)

    def centre(colour) -> np.ndarray:
        found = np.argwhere(np.abs(picture - colour).max(-1) < 3)
        assert len(found) > 500
        return found.mean(axis=0)

    places = np.array([[centre(colour) for colour in row] for row in colours])
    np.testing.assert_allclose(places[..., 0], places[:, :1, 0].repeat(3, axis=1), atol=1)  # rows
    np.testing.assert_allclose(places[..., 1], places[:1, :, 1].repeat(2, axis=0), atol=1)  # columns
    assert np.diff(places[:, 0, 0]).min() > 50 and np.diff(places[0, :, 1]).min() > 100
    line, level, compared = (np.argwhere(np.abs(picture[:, :420] - colour).max(-1) < 3)  # blue, orange, grey
                             for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (153, 153, 153)))
    assert level[:, 0].mean() > compared[:, 0].mean()  # 0.2 lies below 0.8
    left, right = (line[np.abs(line[:, 1] - side) < 20, 0].mean() for side in (line[:, 1].min(), line[:, 1].max()))
    assert left > right  # it rises


def test_a_picture_is_fitted_as_the_release_does_it() -> None:
    """Bilinear to whole pixels cut down, then the centre: 720 rows to 832 give 831, and the last one is black."""
    random = np.random.default_rng(0)
    picture = random.integers(1, 256, (1, 720, 1280, 3), np.uint8)
    fitted = pictures.resize_then_crop(picture, 832, 832)
    resized = np.asarray(Image.fromarray(picture[0]).resize((1479, 831), Image.Resampling.BILINEAR))
    assert fitted.shape == (1, 832, 832, 3)
    np.testing.assert_array_equal(fitted[0, :831], resized[:, 324:324 + 832])  # (1479 - 832) / 2, rounded to even
    assert fitted[0, 831].max() == 0 < fitted[0, 830].min()
    whole = pictures.resize_then_crop(picture[:, :32, :48], 16, 16)
    resized = np.asarray(Image.fromarray(picture[0, :32, :48]).resize((24, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(whole[0], resized[:, 4:20])
