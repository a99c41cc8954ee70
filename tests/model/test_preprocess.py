"""Images against Qwen2VLImageProcessorPil, and the refusal of what is no image or too much of one."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from epd.errors import BadImage
from epd.model.config import ImageConfig
from epd.model.preprocess import (
    MAX_IMAGE_PIXELS,
    image_grid,
    normalized_levels,
    num_image_tokens,
    pixel_patches,
    preprocess,
    smart_resize,
)
from tests.model.reference import png

CONFIG = ImageConfig(16, 2, 2, 65536, 1 << 20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 3, 1 / 255)
SMALL = ImageConfig(8, 2, 2, 256, 40000, (0.48, 0.45, 0.40), (0.26, 0.27, 0.28), 3, 1 / 255)
SQUARES = ImageConfig(4, 1, 3, 100, 20000, (0.5, 0.4, 0.6), (0.5, 0.25, 0.3), 3, 1 / 255)


@pytest.mark.parametrize("config", [CONFIG, SMALL, SQUARES], ids=["published", "small", "merge3"])
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (3, 200), (997, 13), (640, 427), (129, 255)])
@pytest.mark.parametrize(("mode", "format"), [("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG")])
def test_patches_equal_those_of_the_reference(config: ImageConfig, size: tuple[int, int], mode: str, format: str) -> None:
    data = png(np.random.default_rng(sum(size)), *size, mode=mode, format=format)
    _assert_equal_to_reference(data, config)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_is_read(format: str) -> None:
    _assert_equal_to_reference(png(np.random.default_rng(1), 90, 70, format=format), CONFIG)


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "I;16"])
def test_other_pixel_modes_become_rgb(mode: str) -> None:
    image = Image.open(io.BytesIO(png(np.random.default_rng(1), 40, 50)))
    buffer = io.BytesIO()
    converted = image.convert("I").point(lambda v: v * 256).convert("I;16") if mode == "I;16" else image.convert(mode)
    converted.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    _assert_equal_to_reference(buffer.getvalue(), CONFIG)


def test_transparent_palette_is_laid_on_white() -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([10, 20, 30] * 256)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    patches = preprocess(buffer.getvalue(), image_grid(buffer.getvalue(), CONFIG), CONFIG)
    np.testing.assert_array_equal(patches, np.ones_like(patches))


def test_only_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    buffer, single = io.BytesIO(), io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    frames[0].save(single, "GIF")
    grid = image_grid(buffer.getvalue(), CONFIG)
    assert grid[0] == 1
    np.testing.assert_array_equal(preprocess(buffer.getvalue(), grid, CONFIG), preprocess(single.getvalue(), grid, CONFIG))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation: int) -> None:
    stored = Image.open(io.BytesIO(png(np.random.default_rng(1), 300, 200)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer, upright = io.BytesIO(), io.BytesIO()
    stored.save(buffer, "JPEG", exif=exif.tobytes(), quality=95)
    ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))).save(upright, "PNG")
    grid = image_grid(buffer.getvalue(), CONFIG)
    assert grid == image_grid(upright.getvalue(), CONFIG)
    np.testing.assert_array_equal(preprocess(buffer.getvalue(), grid, CONFIG), preprocess(upright.getvalue(), grid, CONFIG))


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([CONFIG, SMALL, SQUARES]))
def test_sizes_equal_those_of_the_reference(height: int, width: int, config: ImageConfig) -> None:
    factor = config.patch_size * config.merge_size
    limits = {"factor": factor, "min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    try:
        expected = reference_resize(height, width, **limits)
    except ValueError:
        with pytest.raises(BadImage, match="200 times"):
            smart_resize(height, width, factor=factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        return
    found = smart_resize(height, width, factor=factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    assert found == expected


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return chunks


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"hello", "send one of PNG, JPEG, WEBP, GIF, BMP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "looks like text"),
        (b'{"error": "not found"}', "looks like text"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC"),
        (b"II*\x00" + bytes(40), "TIFF"),
        (b"\x89PNG\r\n\x1a\n", "broken|can be read"),
        (png(np.random.default_rng(0), 8, 8)[:20], "broken|can be read"),
        (_png_header(20000, 20000), f"{MAX_IMAGE_PIXELS}"),
        (_png_header(10000, 8000), f"80000000 pixels; {MAX_IMAGE_PIXELS} at most"),
        (_png_header(2**31 - 1, 2**31 - 1), "pixels"),
        (_png_header(5000, 10), "200 times"),
        (_png_header(0, 10), "no pixels|broken|can be read"),
    ],
)
def test_what_the_header_tells_is_refused_by_the_header(data: bytes, said: str) -> None:
    with pytest.raises(BadImage, match=said):
        image_grid(data, CONFIG)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_refused(format: str) -> None:
    data = png(np.random.default_rng(0), 200, 150, format=format)
    grid = image_grid(data, CONFIG)
    with pytest.raises(BadImage, match=r"truncated|broken|complete|can be read"):
        preprocess(data[: len(data) // 2], grid, CONFIG)


@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.data())
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes, format: str, data: st.DataObject) -> None:
    good = png(np.random.default_rng(0), 30, 20, format=format)
    at = data.draw(st.integers(0, len(good)))
    broken = good[:at] + garbage + good[at + len(garbage) :]
    try:
        grid = image_grid(broken, SMALL)
        patches = preprocess(broken, grid, SMALL)
    except BadImage:
        return
    assert patches.shape == (grid[1] * grid[2], 3 * 2 * 8 * 8)


def test_a_promised_grid_is_held_to() -> None:
    data = png(np.random.default_rng(0), 64, 64)
    with pytest.raises(BadImage, match="promised"):
        preprocess(data, (1, 2, 2), CONFIG)


def test_reads_a_memoryview_without_copying_it_first() -> None:
    data = png(np.random.default_rng(0), 64, 64)
    view = memoryview(data)
    np.testing.assert_array_equal(
        preprocess(view, image_grid(view, CONFIG), CONFIG), preprocess(data, image_grid(data, CONFIG), CONFIG)
    )


@pytest.mark.parametrize("temporal", [1, 2])
def test_grey_levels_become_the_same_numbers(temporal: int) -> None:
    config = replace(CONFIG, temporal_patch_size=temporal, mean=(0.5, 0.4, 0.6), std=(0.5, 0.25, 0.3))
    data = png(np.random.default_rng(4), 150, 90)
    grid = image_grid(data, config)
    levels = pixel_patches(data, grid, config)
    assert levels.dtype == np.uint8
    pixels = levels.reshape(len(levels), 3, 1, -1)
    numbers = normalized_levels(config)[np.arange(3)[:, None, None], pixels]
    expected = preprocess(data, grid, config)
    np.testing.assert_array_equal(np.repeat(numbers, temporal, axis=2).reshape(expected.shape), expected)


def test_counts_tokens() -> None:
    assert num_image_tokens((1, 4, 6), 2) == 6
    assert num_image_tokens((1, 9, 3), 3) == 3


def test_the_configured_filter_is_used() -> None:
    data = png(np.random.default_rng(0), 200, 100)
    nearest = replace(CONFIG, resample=0)
    grid = image_grid(data, CONFIG)
    assert not np.array_equal(preprocess(data, grid, nearest), preprocess(data, grid, CONFIG))
    _assert_equal_to_reference(data, nearest)


def test_a_gateway_needs_no_torch() -> None:
    modules = "epd.model.config, epd.model.positions, epd.model.preprocess, epd.model.loader"
    script = f"import sys; import {modules}; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def _assert_equal_to_reference(data: bytes, config: ImageConfig) -> None:
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.merge_size,
        image_mean=list(config.mean),
        image_std=list(config.std),
        resample=config.resample,
    )
    expected = processor(images=[Image.open(io.BytesIO(data))], return_tensors="np")
    grid = image_grid(data, config)
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    patches = preprocess(data, grid, config)
    assert patches.dtype == np.float32
    np.testing.assert_array_equal(patches, expected["pixel_values"])
