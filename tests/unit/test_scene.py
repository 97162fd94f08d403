"""The synthetic camera: each behaviour shows in the picture as its name says, and good pictures look alive."""

from __future__ import annotations

import io
import itertools
import math
from datetime import UTC, datetime, timedelta

import pytest
from PIL import Image, ImageChops, ImageFilter, ImageStat

from agent.sandbox.scene import EXIF_IFD, KINDS, Behaviour, Scene, damage

START = datetime(2026, 3, 1, 12, 0, 0, 123000, tzinfo=UTC)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(7, overlay="front")


def grey(jpeg: bytes) -> Image.Image:
    """Luma at half scale, without the burned-in bar."""
    picture = Image.open(io.BytesIO(jpeg))
    picture.draft("L", (640, 360))
    picture = picture.convert("L")
    return picture.crop((0, 0, picture.width, picture.height * 9 // 10))


def sharpness(picture: Image.Image) -> float:
    return ImageStat.Stat(picture.filter(ImageFilter.FIND_EDGES)).stddev[0]


def changed(one: bytes, other: bytes) -> float:
    histogram = ImageChops.difference(grey(one), grey(other)).histogram()
    return sum(histogram[3:]) / sum(histogram)


def mean(picture: Image.Image) -> float:
    return ImageStat.Stat(picture).mean[0]


def shot(scene: Scene, n: int, behaviour: str = "good") -> bytes:
    return scene.frame(n, START + timedelta(seconds=n), Behaviour.parse(behaviour))


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    one, same, other = Scene(3), Scene(3), Scene(4)
    assert shot(one, 5) == shot(same, 5)
    assert shot(one, 5) != shot(other, 5)


def test_good_frame_is_a_whole_jpeg_with_its_time(scene: Scene) -> None:
    data = shot(scene, 2)
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert picture.size == (1280, 720)
    assert data.endswith(b"\xff\xd9")
    times = picture.getexif().get_ifd(EXIF_IFD)
    assert times[0x9003] == "2026:03:01 12:00:02"
    assert times[0x9291] == "123"
    assert times[0x9011] == "+00:00"


def test_size_and_quality_are_taken() -> None:
    small, fine = Scene(1, width=640, height=360, quality=40), Scene(1, width=640, height=360, quality=90)
    assert Image.open(io.BytesIO(shot(small, 0))).size == (640, 360)
    assert len(shot(small, 0)) < len(shot(fine, 0)) / 2


def test_live_pictures_differ_and_frozen_ones_do_not(scene: Scene) -> None:
    live = [shot(scene, n) for n in range(4)]
    assert min(changed(a, b) for a, b in itertools.pairwise(live)) > 0.062
    frozen = [shot(scene, n, "frozen") for n in range(4)]
    assert max(changed(a, b) for a, b in itertools.pairwise(frozen)) < 0.002
    assert len(set(frozen)) == 4, "the burned-in clock goes on"


@pytest.mark.parametrize("radius", [2, 4, 8])
def test_blur_lowers_sharpness(scene: Scene, radius: int) -> None:
    assert sharpness(grey(shot(scene, 1, f"blurry:{radius}"))) < 0.6 * sharpness(grey(shot(scene, 1)))


def test_blur_grows_with_its_radius(scene: Scene) -> None:
    by_radius = [sharpness(grey(shot(scene, 1, f"blurry:{radius}"))) for radius in (1, 2, 3, 5, 9)]
    assert by_radius == sorted(by_radius, reverse=True)


def test_dark_bright_and_covered(scene: Scene) -> None:
    good = mean(grey(shot(scene, 1)))
    assert 60 < good < 190
    dark = grey(shot(scene, 1, "dark")).histogram()
    assert sum(dark[29:]) / sum(dark) < 0.01
    assert mean(grey(shot(scene, 1, "bright"))) > 220
    covered = grey(shot(scene, 1, "covered"))
    left = covered.crop((0, 0, covered.width // 2, covered.height))
    assert ImageStat.Stat(left).stddev[0] < 8
    assert ImageStat.Stat(grey(shot(scene, 1))).stddev[0] > 30


def test_moved_is_another_view(scene: Scene) -> None:
    assert changed(shot(scene, 1), shot(scene, 1, "moved")) > 0.5


def test_light_changes_slowly(scene: Scene) -> None:
    minutes = [mean(grey(scene.frame(1, START + timedelta(minutes=m)))) for m in range(15)]
    steps = [abs(a - b) for a, b in itertools.pairwise(minutes)]
    assert max(minutes) - min(minutes) > 10
    assert max(steps) < 8


@pytest.mark.parametrize("n", [0, 1, 2])
def test_corrupt_pictures_are_damaged_three_ways(scene: Scene, n: int) -> None:
    whole, broken = shot(scene, n), shot(scene, n, "corrupt")
    assert broken != whole
    assert broken == damage(whole, n)
    truncated, zeros = not broken.endswith(b"\xff\xd9"), bytes(512) in broken
    assert (truncated, zeros) == [(True, False), (True, True), (False, True)][n]


def test_behaviours_are_read_from_text() -> None:
    assert [str(Behaviour.parse(str(Behaviour.parse(kind)))) for kind in KINDS] == [
        str(Behaviour.parse(kind)) for kind in KINDS
    ]
    assert math.isclose(Behaviour.parse("blurry:2.5").amount, 2.5)
    with pytest.raises(ValueError, match="no behaviour 'wobbly'; there are good, blurry"):
        Behaviour.parse("wobbly")
    with pytest.raises(ValueError):
        Behaviour.parse("blurry:very")


def test_slow_and_silent_pictures_are_good_ones(scene: Scene) -> None:
    assert shot(scene, 3, "slow") == shot(scene, 3) == shot(scene, 3, "silent")
