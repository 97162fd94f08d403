"""Container checks against every way a file is cut, and measures against pictures whose answer is known."""

from __future__ import annotations

import io
import random
import time
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from agent.capture.container import read_header
from agent.capture.image_quality import REGIONS, BrokenImageError, capture_time, check_container, measure


def scene(size: tuple[int, int] = (1280, 720)) -> Image.Image:
    draw_from = random.Random(7)
    image = Image.effect_noise(size, 12).point(lambda value: value // 2 + 40)
    draw = ImageDraw.Draw(image)
    for _ in range(600):
        x, y = draw_from.randrange(size[0]), draw_from.randrange(size[1])
        draw.rectangle(
            (x, y, x + draw_from.randrange(4, 60), y + draw_from.randrange(4, 60)), fill=draw_from.randrange(256)
        )
    return image


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **({"quality": 85} | options))
    return out.getvalue()


WHOLE = jpeg(scene((640, 480)).convert("RGB"))
SCAN = read_header(WHOLE).scan


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"quality": 30}, {"subsampling": 0}, {"restart_marker_rows": 1}],
)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_whole_files_pass(mode: str, options: dict[str, object]) -> None:
    data = jpeg(scene((320, 240)).convert(mode), **options)
    assert check_container(data) is None
    assert measure(data).width == 320


@pytest.mark.parametrize("level", [0, 16, 128, 255])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_flat_pictures_are_not_holes(level: int, options: dict[str, object]) -> None:
    assert check_container(jpeg(Image.new("RGB", (1920, 1080), (level,) * 3), **options)) is None


def test_every_cut_is_found() -> None:
    assert check_container(b"") == "empty"
    for length in [*range(1, SCAN + 64), *range(SCAN + 64, len(WHOLE) - 64, 997), *range(len(WHOLE) - 64, len(WHOLE))]:
        assert check_container(WHOLE[:length]) in ("truncated", "marker"), length


def test_zeroed_blocks_are_found() -> None:
    for length in range(64, len(WHOLE) - 64, 499):
        assert check_container(WHOLE[:length] + bytes(len(WHOLE) - length)) in ("zero_tail", "truncated"), length
    for begin in range(SCAN + 20, len(WHOLE) - 300, 499):
        assert check_container(WHOLE[:begin] + bytes(256) + WHOLE[begin + 256 :]) == "zero_hole", begin
    assert check_container(bytes(4096)) == "zero_tail"


def test_padding_and_an_appended_preview_are_no_fault() -> None:
    assert check_container(WHOLE + bytes(512)) is None
    assert check_container(WHOLE + b"\xff" * 100) is None
    assert check_container(WHOLE + jpeg(scene((160, 120)))) is None
    assert check_container(WHOLE + b"the rest of an older, longer file") == "truncated"


def test_other_files_and_impossible_markers() -> None:
    assert check_container(b"\x89PNG\r\n\x1a\n" + bytes(100)) == "not_jpeg"
    assert check_container(b"<html>no such camera</html>") == "not_jpeg"
    broken = WHOLE[: SCAN + 200] + b"\xff\x01\xff\x02" + WHOLE[SCAN + 204 :]
    assert check_container(broken) == "marker"


def with_frame(precision: int, height: int, width: int, components: int = 3, marker: int = 0xC0) -> bytes:
    frame = next(at for at in range(len(WHOLE)) if WHOLE[at : at + 2] == b"\xff\xc0")
    body = bytes([precision]) + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([components])
    return WHOLE[: frame + 1] + bytes([marker]) + WHOLE[frame + 2 : frame + 4] + body + WHOLE[frame + 10 :]


def test_bombs_and_depths_are_refused_before_decoding() -> None:
    assert check_container(with_frame(8, 65500, 65500)) == "too_large"
    assert check_container(with_frame(12, 480, 640)) == "unsupported"
    assert check_container(with_frame(8, 480, 640, marker=0xC3)) == "unsupported"
    assert check_container(with_frame(8, 480, 640, components=9)) == "unsupported"
    assert check_container(with_frame(8, 0, 640)) == "marker"
    assert check_container(WHOLE + bytes(64 * 2**20)) == "too_large"
    with pytest.raises(BrokenImageError) as caught:
        measure(with_frame(8, 65500, 65500))
    assert caught.value.kind == "too_large"
    with pytest.raises(BrokenImageError):
        measure(jpeg(Image.new("L", (4000, 2100)), progressive=True))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_garbage_raises_nothing_but_the_typed_error(data: st.DataObject) -> None:
    broken = bytearray(WHOLE[: data.draw(st.integers(0, len(WHOLE)))])
    for _ in range(data.draw(st.integers(0, 8))):
        if broken:
            broken[data.draw(st.integers(0, min(len(broken) - 1, SCAN + 500)))] = data.draw(st.integers(0, 255))
    broken += data.draw(st.binary(max_size=64))
    check_container(bytes(broken))
    capture_time(bytes(broken))
    with suppress(BrokenImageError):
        measure(bytes(broken))


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_random_bytes_are_never_whole(data: bytes) -> None:
    assert check_container(data) is not None
    assert check_container(b"\xff\xd8" + data) is not None
    assert capture_time(b"\xff\xd8\xff\xe1" + (len(data) + 8).to_bytes(2, "big") + b"Exif\0\0" + data) is None


def test_brightness_and_contrast_are_those_of_the_picture() -> None:
    half = Image.new("L", (1000, 800), 40)
    half.paste(200, (500, 0, 1000, 800))
    found = measure(jpeg(half, quality=95))
    assert found.mean == pytest.approx(120, abs=1)
    assert found.std == pytest.approx(80, abs=1)
    assert (found.p1, found.p99) == (pytest.approx(40, abs=2), pytest.approx(200, abs=2))
    assert found.contrast == found.p99 - found.p1
    dark = measure(jpeg(Image.new("L", (1000, 800), 5)))
    assert (dark.under, dark.over, dark.assessable) == (1.0, 0.0, False)
    assert measure(jpeg(Image.new("L", (1000, 800), 250))).over == 1.0


def test_blur_lowers_sharpness_in_proportion_and_brightness_does_not_matter() -> None:
    image = scene((1920, 1080))
    sharp = measure(jpeg(image)).sharpness
    blurred = [measure(jpeg(image.filter(ImageFilter.GaussianBlur(sigma)))).sharpness for sigma in (3, 5, 8)]
    assert sharp - blurred[0] > 0.25
    assert blurred == sorted(blurred, reverse=True)
    dimmed = measure(jpeg(image.point(lambda value: value // 2))).sharpness
    assert abs(sharp - dimmed) < 0.1


def test_a_sharp_overlay_does_not_hide_blur() -> None:
    image = scene((1920, 1080))
    sharp = measure(jpeg(image))
    blurred = image.filter(ImageFilter.GaussianBlur(5))
    blurred.paste(image.crop((0, 0, 1920, 80)), (0, 0))
    found = measure(jpeg(blurred))
    assert len(found.regions) == REGIONS
    assert sharp.sharpness - found.sharpness > 0.25


def test_noise_is_seen() -> None:
    calm = Image.new("L", (640, 480), 128)
    noisy = Image.effect_noise((640, 480), 40)
    assert measure(jpeg(calm)).noise == 0
    assert measure(jpeg(noisy)).noise > 5


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (3, 900), (900, 3)])
def test_tiny_pictures_have_measures(size: tuple[int, int]) -> None:
    found = measure(jpeg(Image.new("L", size, 100)))
    assert (found.width, found.height) == size
    assert found.mean == pytest.approx(100, abs=2)


def with_exif(**tags: str) -> bytes:
    numbers = {"taken": 0x9003, "fraction": 0x9291, "offset": 0x9011}
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({numbers[name]: value for name, value in tags.items()})
    return jpeg(Image.new("L", (64, 64)), exif=exif)


def test_the_capture_time_comes_from_exif() -> None:
    moment = datetime(2026, 3, 1, 12, 30, 15, tzinfo=UTC).timestamp()
    taken = "2026:03:01 12:30:15"
    assert capture_time(with_exif(taken=taken, offset="+00:00")) == moment
    assert capture_time(with_exif(taken=taken, offset="+00:00", fraction="25")) == pytest.approx(moment + 0.25)
    assert capture_time(with_exif(taken=taken, offset="-05:30")) == moment + 5.5 * 3600
    local = time.mktime((2026, 3, 1, 12, 30, 15, 0, 0, -1))
    assert capture_time(with_exif(taken=taken)) == local


@pytest.mark.parametrize("taken", ["0000:00:00 00:00:00", "2026:13:01 00:00:00", "    :  :     :  :  ", "x" * 19, ""])
def test_a_senseless_capture_time_is_none(taken: str) -> None:
    assert capture_time(with_exif(taken=taken, offset="+00:00")) is None
    assert capture_time(WHOLE) is None
