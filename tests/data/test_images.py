"""Sane conversions, and errors that name the picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffalign.data.images import BadImage, EncodedImage, decode_image


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(size=(32, 24)):
    width, height = size
    values = np.add.outer(np.arange(height) * 3, np.arange(width) * 2).astype(np.uint8)
    return Image.fromarray(np.stack([values, values[::-1], np.full_like(values, 90)], -1))


def first_pixel(image):
    return tuple(int(value) for value in np.asarray(image)[0, 0])


def test_bytes_files_images_and_dicts_give_the_same_pixels(tmp_path):
    content = encode(ramp())
    (tmp_path / "a.png").write_bytes(content)
    for data in (content, tmp_path / "a.png", str(tmp_path / "a.png"), ramp(), {"bytes": content, "path": None}):
        image = decode_image(data)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(ramp()))


def test_cmyk_jpeg():
    cmyk = encode(Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    assert first_pixel(decode_image(cmyk)) == pytest.approx((200, 40, 40), abs=4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB key"])
def test_transparency_is_composited_on_white(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    if mode == "P":
        content = encode(image.quantize())
    elif mode == "RGB key":
        content = encode(Image.new("RGB", (16, 16), (1, 2, 3)), transparency=(1, 2, 3))
    else:
        content = encode(image.convert(mode))
    assert first_pixel(decode_image(content)) == (255, 255, 255)


def test_half_transparent_black_is_gray():
    assert first_pixel(decode_image(Image.new("RGBA", (16, 16), (0, 0, 0, 128)))) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_other_modes(mode):
    assert first_pixel(decode_image(encode(Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)))) == (255,) * 3


@pytest.mark.parametrize(("sample", "expected"), [(0, 0), (32768, 128), (65535, 255), (257, 1)])
def test_16_bit_is_scaled_not_clipped(sample, expected):
    samples = np.full((16, 16), sample, np.uint16)
    pgm = b"P5 16 16 65535\n" + samples.astype(">u2").tobytes()
    for content in (encode(Image.fromarray(samples)), encode(Image.fromarray(samples), "TIFF"), pgm):
        assert first_pixel(decode_image(content)) == (expected,) * 3


def test_unknown_white_is_an_error():
    with pytest.raises(BadImage, match=r"row 3 has floating-point samples.*Convert"):
        decode_image(encode(Image.new("F", (16, 16), 0.5), "TIFF"), "row 3")
    with pytest.raises(BadImage, match=r"row 3 has 32-bit samples from 70000"):
        decode_image(encode(Image.new("I", (16, 16), 70000), "TIFF"), "row 3")


def test_exif_orientation_turns_picture_and_size():
    image = ramp((32, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(image, exif=exif)
    assert EncodedImage(content).inspect().size == (32, 24)
    turned = decode_image(content)
    assert turned.size == (24, 32)
    assert np.array_equal(np.asarray(turned), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_truncated_files_are_found_without_and_with_decoding(kind):
    content = encode(ramp((200, 160)), kind)
    image = EncodedImage(content, "row 4")
    assert image.inspect().size == (160, 200)
    for broken in (content[: len(content) // 2], content[: len(content) - 40]):
        for look in ("inspect", "decode"):
            with pytest.raises(BadImage, match=r"row 4 cannot be decoded: .*Replace the picture or remove the row"):
                getattr(EncodedImage(broken, "row 4"), look)()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"row 4 is empty \(0 bytes\). Replace the picture or remove the row"),
        (b"no picture at all", r"row 4 cannot be decoded: cannot identify image file. Replace"),
        (Image.new("RGB", (1, 1)), r"row 4 is 1x1 pixels; the smallest usable side is 8"),
        (encode(Image.new("RGB", (1, 400))), r"row 4 is 1x400 pixels"),
        (None, r"row 4: no picture there \(NoneType\).*`columns`"),
        ("gone.png", r"row 4: cannot read gone.png \(No such file"),
        ({"bytes": None, "path": None}, r"row 4: no picture there"),
    ],
)
def test_bad_pictures(data, message):
    with pytest.raises(BadImage, match=message):
        decode_image(data, "row 4")


def test_equal_content_has_an_equal_digest(tmp_path):
    content = encode(ramp())
    (tmp_path / "a.png").write_bytes(content)
    digest = EncodedImage(content).inspect().digest
    assert EncodedImage(tmp_path / "a.png").inspect().digest == digest
    assert EncodedImage(encode(Image.new("RGB", (32, 24)))).inspect().digest != digest
    one, two = Image.new("P", (16, 16), 0), Image.new("P", (16, 16), 0)
    two.putpalette([9, 9, 9])
    assert EncodedImage(one).inspect().digest != EncodedImage(two).inspect().digest
