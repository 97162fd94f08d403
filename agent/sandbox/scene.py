"""Pictures of a road as a fixed camera sees it, drawn with Pillow alone: the same seed, number and time give the same bytes.

What costs time is drawn once; a frame then costs a few pastes, noise and the JPEG encoder.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, Self, get_args

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

Kind = Literal[
    "good", "blurry", "dark", "bright", "covered", "frozen", "moved", "corrupt", "slow", "silent"
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(Kind)
AMOUNTS = {"blurry": 4.0, "dark": 0.06, "bright": 3.2, "covered": 0.8, "moved": 0.15, "slow": 5.0}
NOISE_LEVELS = 3.0
NOISE_MARGIN = 64
LIGHT_PERIOD_S = 900.0
LIGHT_SWING = 0.10
EXIF_IFD, DATE_TIME_ORIGINAL, OFFSET_TIME_ORIGINAL, SUB_SEC_TIME_ORIGINAL = 0x8769, 0x9003, 0x9011, 0x9291


@dataclass(frozen=True)
class Behaviour:
    """How the camera goes wrong, and how much.

    `amount` is the Gaussian radius in pixels for `blurry`, the gain for `dark` and `bright`, the share of the picture for
    `covered` and `moved`, the factor on the interval for `slow`, and nothing for the others.
    """

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `blurry` or `blurry:6`. Raises ValueError that lists what there is."""
        name, _, amount = text.partition(":")
        for kind in get_args(Kind):
            if kind == name:
                return cls(kind, float(amount) if amount else AMOUNTS.get(kind, 0.0))
        raise ValueError(f"no behaviour {name!r}; there are {', '.join(KINDS)}")

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}" if self.kind in AMOUNTS else self.kind


GOOD = Behaviour("good", 0.0)


@dataclass(frozen=True)
class _Vehicle:
    picture: Image.Image
    mask: Image.Image
    paint: tuple[int, ...]
    bottom: int
    speed: float
    start: float
    margin: int = 0


@dataclass(frozen=True)
class _View:
    """What stands and what drives, as the lens shows it."""

    background: Image.Image
    vehicles: list[_Vehicle]


class Scene:
    """One camera's view of `width` × `height` pixels; `seed` decides everything in it but the vehicles' moves.

    `overlay` is burned into the lower edge after the clock.
    """

    def __init__(
        self, seed: int = 1, *, width: int = 1280, height: int = 720, quality: int = 85, overlay: str = ""
    ) -> None:
        self.width, self.height = width, height
        self.quality = quality
        self.overlay = overlay
        chance = random.Random(seed)
        self._sharp = _View(_draw_background(chance, width, height), _draw_vehicles(chance, width, height))
        self._blurred: tuple[float, _View] | None = None
        self._noise = _draw_noise(chance, width + NOISE_MARGIN, height + NOISE_MARGIN)
        self._seed = seed
        self._letters = max(12, height // 30)
        self._font = ImageFont.load_default(size=self._letters)
        self._cover: tuple[float, Image.Image, Image.Image] | None = None

    def frame(self, n: int, when: datetime, behaviour: Behaviour = GOOD) -> bytes:
        """The JPEG of picture number `n` taken at `when`, with EXIF times; of `corrupt` it is not a whole JPEG.

        `slow` and `silent` are about when pictures come, so their pictures are good ones.
        """
        view = self._out_of_focus(behaviour.amount) if behaviour.kind == "blurry" else self._sharp
        if behaviour.kind == "frozen":
            picture = self._live(view, 0, 0.0)
        else:
            picture = self._live(view, n, when.timestamp(), self._spoiler(behaviour))
        self._burn_in(picture, when)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=self.quality, exif=_exif(when))
        data = out.getvalue()
        return damage(data, n) if behaviour.kind == "corrupt" else data

    def _live(
        self, view: _View, n: int, at_s: float, spoil: Callable[[Image.Image], Image.Image] | None = None
    ) -> Image.Image:
        picture = view.background.copy()
        for vehicle in view.vehicles:
            length, tall = vehicle.picture.width - 2 * vehicle.margin, vehicle.picture.height - 2 * vehicle.margin
            span = self.width + 2 * length
            x = (vehicle.start * span + vehicle.speed * n) % span - length
            place = (int(x) - vehicle.margin, vehicle.bottom - tall - vehicle.margin)
            picture.paste(vehicle.picture, place, vehicle.mask)
        if spoil:
            picture = spoil(picture)
        light = 1.0 + LIGHT_SWING * math.sin(2 * math.pi * at_s / LIGHT_PERIOD_S)
        picture = picture.point([min(255, int(level * light + 0.5)) for level in range(256)] * 3)
        shift = random.Random(self._seed * 1_000_003 + n)
        x, y = shift.randrange(NOISE_MARGIN), shift.randrange(NOISE_MARGIN)
        noise = self._noise.crop((x, y, x + self.width, y + self.height))
        return ImageChops.add(picture, noise, scale=1.0, offset=-128)

    def _spoiler(self, behaviour: Behaviour) -> Callable[[Image.Image], Image.Image] | None:
        """What the behaviour does to the light before it reaches the sensor."""
        amount = behaviour.amount
        match behaviour.kind:
            case "dark" | "bright":
                gain = [min(255, int(level * amount)) for level in range(256)] * 3
                return lambda picture: picture.point(gain)
            case "covered":
                return lambda picture: self._covered(picture, amount)
            case "moved":
                return lambda picture: self._moved(picture, amount)
        return None

    def _out_of_focus(self, radius: float) -> _View:
        """The view through a lens whose Gaussian blur has `radius` pixels."""
        if self._blurred is None or self._blurred[0] != radius:
            blur = ImageFilter.GaussianBlur(radius)
            margin = math.ceil(3 * radius)
            vehicles = [
                replace(
                    vehicle,
                    picture=ImageOps.expand(vehicle.picture, margin, vehicle.paint).filter(blur),
                    mask=ImageOps.expand(vehicle.mask, margin, 0).filter(blur),
                    margin=margin,
                )
                for vehicle in self._sharp.vehicles
            ]
            self._blurred = (radius, _View(self._sharp.background.filter(blur), vehicles))
        return self._blurred[1]

    def _covered(self, picture: Image.Image, share: float) -> Image.Image:
        """A leaf on the glass: dark, out of focus, over `share` of the picture."""
        if self._cover is None or self._cover[0] != share:
            mask = Image.new("L", (self.width, self.height), 0)
            edge = int(self.width * share)
            bulge = self.height // 6
            ImageDraw.Draw(mask).polygon(
                [(0, 0), (edge - bulge, 0), (edge + bulge, self.height), (0, self.height)], 255
            )
            mask = mask.filter(ImageFilter.GaussianBlur(self.width / 60))
            self._cover = (share, Image.new("RGB", mask.size, (38, 44, 22)), mask)
        _, leaf, mask = self._cover
        return Image.composite(leaf, picture, mask)

    def _moved(self, picture: Image.Image, share: float) -> Image.Image:
        """Knocked aside by `share` of the width and a few degrees; the border repeats what was at the other side."""
        shifted = ImageChops.offset(picture, int(self.width * share), int(self.height * share / 2))
        return shifted.rotate(6, Image.Resampling.NEAREST, fillcolor=(90, 92, 94))

    def _burn_in(self, picture: Image.Image, when: datetime) -> None:
        text = f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d} {self.overlay}".rstrip()
        draw = ImageDraw.Draw(picture)
        left, top, right, bottom = draw.textbbox((12, self.height - 2 * self._letters), text, font=self._font)
        draw.rectangle((left - 6, top - 4, right + 6, bottom + 4), fill=(0, 0, 0))
        draw.text((12, self.height - 2 * self._letters), text, font=self._font, fill=(255, 255, 255))


def damage(jpeg: bytes, n: int) -> bytes:
    """`jpeg` truncated, with a tail of zeros, or with a hole of zeros, in turn with `n`."""
    middle = len(jpeg) // 2
    match n % 3:
        case 0:
            return jpeg[:middle]
        case 1:
            return jpeg[:middle] + bytes(len(jpeg) - middle)
    hole = min(4096, len(jpeg) // 4)
    return jpeg[:middle] + bytes(hole) + jpeg[middle + hole :]


def _exif(when: datetime) -> Image.Exif:
    exif = Image.Exif()
    offset = when.strftime("%z") or "+0000"
    exif.get_ifd(EXIF_IFD).update(
        {
            DATE_TIME_ORIGINAL: when.strftime("%Y:%m:%d %H:%M:%S"),
            SUB_SEC_TIME_ORIGINAL: f"{when.microsecond // 1000:03d}",
            OFFSET_TIME_ORIGINAL: f"{offset[:3]}:{offset[3:5]}",
        }
    )
    return exif


def _grain(chance: random.Random, width: int, height: int) -> Image.Image:
    """Grey noise, nearly Gaussian: mean 128, standard deviation 37."""
    layers = [Image.frombytes("L", (width, height), chance.randbytes(width * height)) for _ in range(4)]
    return ImageChops.add(
        ImageChops.add(layers[0], layers[1], 2.0), ImageChops.add(layers[2], layers[3], 2.0), 2.0
    )  # fmt: skip


def _draw_noise(chance: random.Random, width: int, height: int) -> Image.Image:
    """A sensor's noise around 128, with a standard deviation of NOISE_LEVELS in each colour."""
    soften = [round(128 + (level - 128) * NOISE_LEVELS / 37) for level in range(256)]
    return Image.merge("RGB", [_grain(chance, width, height).point(soften) for _ in range(3)])


def _texture(chance: random.Random, width: int, height: int, low: int, high: int) -> Image.Image:
    """Grey ground texture between the two levels, coarse and fine at once, as asphalt and grass are."""
    fine = _grain(chance, width, height)
    coarse = _grain(chance, max(2, width // 24), max(2, height // 24)).resize((width, height), Image.Resampling.BICUBIC)
    both = ImageChops.add(fine, coarse, 2.0)
    return both.point([int(low + (high - low) * min(1.0, max(0.0, (level - 70) / 116))) for level in range(256)])


def _tint(grey: Image.Image, dark: tuple[int, int, int], light: tuple[int, int, int]) -> Image.Image:
    ramps = [[a + (b - a) * level // 255 for level in range(256)] for a, b in zip(dark, light, strict=True)]
    return Image.merge("RGB", [grey.point(ramp) for ramp in ramps])


def _draw_background(chance: random.Random, width: int, height: int) -> Image.Image:
    """Sky with clouds, a row of houses, trees, grass, and the road with its markings."""
    horizon = height * 45 // 100
    picture = Image.new("RGB", (width, height))
    gradient = Image.linear_gradient("L").resize((width, horizon))
    sky = _tint(gradient, (96, 146, 204), (206, 218, 228))
    clouds = _grain(chance, width // 80, max(2, horizon // 40)).resize((width, horizon), Image.Resampling.BICUBIC)
    sky.paste((236, 238, 240), (0, 0), clouds.point([min(255, max(0, (level - 128) * 5)) for level in range(256)]))
    picture.paste(sky, (0, 0))
    picture.paste(_tint(_texture(chance, width, height - horizon, 0, 255), (44, 62, 30), (132, 146, 92)), (0, horizon))
    draw = ImageDraw.Draw(picture)
    x = -width // 20
    while x < width:
        house = chance.randrange(width // 10, width // 5)
        _draw_house(chance, draw, x, horizon + height // 50, house, chance.randrange(height // 6, height // 3))
        x += house + chance.randrange(0, width // 30)
    _draw_road(chance, picture, horizon + height // 14)
    for _ in range(7):
        _draw_tree(
            chance, draw, chance.randrange(width), horizon + height // 16, chance.randrange(height // 9, height // 5)
        )
    pole = width * 83 // 100
    draw.rectangle((pole, height // 8, pole + width // 160, height * 62 // 100), fill=(52, 54, 58))
    draw.rectangle((pole - width // 16, height // 8, pole, height // 8 + height // 90), fill=(52, 54, 58))
    return picture.filter(ImageFilter.GaussianBlur(0.6))


def _draw_house(
    chance: random.Random, draw: ImageDraw.ImageDraw, left: int, bottom: int, width: int, height: int
) -> None:
    plaster = chance.randrange(120, 190)
    wall = tuple(plaster + chance.randrange(-22, 23) for _ in range(3))
    top = bottom - height
    draw.rectangle((left, top, left + width, bottom), fill=wall)
    roof = tuple(chance.randrange(50, 110) for _ in range(3))
    draw.polygon([(left - 6, top), (left + width // 2, top - height // 3), (left + width + 6, top)], fill=roof)
    step_x, step_y = max(14, width // 6), max(16, height // 5)
    for y in range(top + step_y // 3, bottom - step_y // 2, step_y):
        for x in range(left + step_x // 3, left + width - step_x // 2, step_x):
            glass = chance.choice([(40, 52, 66), (72, 88, 104), (220, 206, 150)])
            draw.rectangle((x, y, x + step_x // 2, y + step_y // 2), fill=glass, outline=(236, 236, 230))


def _draw_tree(chance: random.Random, draw: ImageDraw.ImageDraw, x: int, bottom: int, height: int) -> None:
    draw.rectangle((x - height // 30, bottom - height // 2, x + height // 30, bottom), fill=(70, 54, 40))
    for _ in range(height * 6):
        angle, reach = chance.uniform(0, 2 * math.pi), chance.uniform(0, 1) ** 0.5
        leaf_x = x + math.cos(angle) * reach * height * 0.33
        leaf_y = bottom - height * 0.66 + math.sin(angle) * reach * height * 0.36
        shade = chance.randrange(-26, 34)
        draw.ellipse((leaf_x, leaf_y, leaf_x + 5, leaf_y + 4), fill=(56 + shade, 84 + shade, 40 + shade // 2))


def _draw_road(chance: random.Random, picture: Image.Image, top: int) -> None:
    width, height = picture.size
    asphalt = _tint(_texture(chance, width, height - top, 0, 255), (66, 67, 70), (128, 128, 130))
    mask = Image.new("L", asphalt.size, 0)
    road_top, road_bottom = height // 20, (height - top) * 88 // 100
    ImageDraw.Draw(mask).rectangle((0, road_top, width, road_bottom), fill=255)
    picture.paste(asphalt, (0, top), mask)
    draw = ImageDraw.Draw(picture)
    for y, thick in ((top + road_top, 5), (top + road_bottom, 8)):
        draw.rectangle((0, y, width, y + thick), fill=(196, 194, 186))
    middle, dash = top + (road_top + road_bottom) // 2, width // 16
    for x in range(-dash // 2, width, 2 * dash):
        draw.rectangle((x, middle, x + dash, middle + 6), fill=(222, 220, 206))


def _draw_vehicles(chance: random.Random, width: int, height: int) -> list[_Vehicle]:
    lanes: Iterable[tuple[float, int, float]] = ((0.68, 1, 0.11), (0.70, 1, 0.10), (0.86, -1, 0.15), (0.88, -1, 0.16))
    return [
        _draw_vehicle(
            chance, int(width * size), int(height * bottom), direction * width / 40 * chance.uniform(0.7, 1.3)
        )
        for bottom, direction, size in lanes
    ]


def _draw_vehicle(chance: random.Random, length: int, bottom: int, speed: float) -> _Vehicle:
    tall = length * 2 // 5
    paint = tuple(chance.randrange(30, 220) for _ in range(3))
    picture = Image.new("RGB", (length, tall), paint)
    mask = Image.new("L", (length, tall), 0)
    body = (0, tall * 2 // 5, length - 1, tall * 17 // 20)
    cabin = [
        (length // 5, tall * 2 // 5),
        (length * 3 // 10, 0),
        (length * 7 // 10, 0),
        (length * 17 // 20, tall * 2 // 5),
    ]
    wheels = [(x, tall * 7 // 10, x + tall * 3 // 10, tall - 1) for x in (length // 8, length * 7 // 10)]
    for canvas, body_fill, glass_fill, wheel_fill in (
        (picture, paint, (34, 44, 54), (16, 16, 18)),
        (mask, 255, 255, 255),
    ):
        draw = ImageDraw.Draw(canvas)
        draw.polygon(cabin, fill=glass_fill)
        draw.rounded_rectangle(body, radius=tall // 8, fill=body_fill)
        for wheel in wheels:
            draw.ellipse(wheel, fill=wheel_fill)
    return _Vehicle(picture, mask, paint, bottom, speed, chance.random())
