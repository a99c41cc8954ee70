"""Image bytes -> grid (from the header alone) -> patches, equal to transformers' Qwen2VLImageProcessorPil to the last bit.

Knows file formats through Pillow and the limits that keep one image from costing too much. Does not know torch or the vision
tower: a gateway imports this module for `image_grid` and must start fast.
"""

from __future__ import annotations

import io
import math
import struct
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from epd.errors import BadImage
from epd.model.config import ImageConfig

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_IMAGE_PIXELS = 64 * 2**20  # before resizing: what decoding may cost, 192 MiB as RGB
MAX_ASPECT_RATIO = 200

Grid = tuple[int, int, int]  # frames, rows, columns in patches

# EXIF orientations that turn the image by a quarter.
_QUARTER_TURNS = (5, 6, 7, 8)
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, OverflowError, MemoryError)


def image_grid(data: bytes | memoryview, config: ImageConfig, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Grid:
    """The grid (1, rows, columns) in patches that `preprocess` will make of this file; reads only the header.

    Raises BadImage for an unknown format, a broken header, too many pixels or too long a side. A file whose header is sound and
    whose pixels are not is found out by `preprocess`.
    """
    image, orientation = _open(data, max_image_pixels)
    width, height = image.size
    if orientation in _QUARTER_TURNS:
        width, height = height, width
    rows, columns = smart_resize(
        height, width, factor=config.patch_size * config.merge_size, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    return (1, rows // config.patch_size, columns // config.patch_size)


def num_image_tokens(grid: Grid, merge_size: int) -> int:
    """Placeholder tokens that an image of this grid takes in the prompt."""
    return grid[0] * grid[1] * grid[2] // merge_size**2


def preprocess(data: bytes | memoryview, grid: Grid, config: ImageConfig) -> npt.NDArray[np.float32]:
    """Patches [rows * columns, channels * frames * patch * patch] float32 of one still image.

    A patch's numbers are ordered (channel, frame, row, column); patches are ordered (block row, block column, row in block,
    column in block), a block being what the patch merger joins. The still is its own frame over the temporal patch. Raises
    BadImage when the pixels cannot be decoded or `grid` is not this file's grid.
    """
    blocks = _blocks(data, grid, config)
    levels = normalized_levels(config)
    patches = np.empty((len(blocks), 3, config.temporal_patch_size, config.patch_size, config.patch_size), np.float32)
    for channel in range(3):
        patches[:, channel] = levels[channel][blocks[:, channel]][:, None]
    return patches.reshape(len(blocks), -1)


def pixel_patches(data: bytes | memoryview, grid: Grid, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """The same patches as grey levels, [rows * columns, channels * patch * patch], of which `normalized_levels` makes numbers.

    One byte for each number, and one frame of the temporal patch: what a device is sent. Raises as `preprocess`.
    """
    blocks = _blocks(data, grid, config)
    return blocks.reshape(len(blocks), -1)


def normalized_levels(config: ImageConfig) -> npt.NDArray[np.float32]:
    """[3, 256]: what each grey level of each channel becomes."""
    return _normalized(config.rescale_factor, config.mean, config.std)


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, about the same shape, with min_pixels <= height * width <= max_pixels.

    Qwen2-VL's rule, halves rounded to even. Raises BadImage for a side more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise BadImage(f"the image is {width} x {height}; one side may be {MAX_ASPECT_RATIO} times the other at most: crop it")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def _blocks(data: bytes | memoryview, grid: Grid, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """Pixels in the order of patches, [rows * columns, 3, patch, patch]."""
    if image_grid(data, config) != grid:
        raise BadImage(f"the image's grid is {image_grid(data, config)}, not the {tuple(grid)} that was promised for it")
    image, orientation = _open(data)
    try:
        image.load()
        if orientation in _TRANSPOSES:
            image = image.transpose(_TRANSPOSES[orientation])
        rgb = _to_rgb(image)
    except _BROKEN as error:
        raise BadImage(f"the {image.format or 'image'} data is broken or truncated ({error}); send the complete file") from error
    size, merge, (_, rows, columns) = config.patch_size, config.merge_size, grid
    pixels = np.asarray(rgb.resize((columns * size, rows * size), resample=Image.Resampling(config.resample)))
    blocks = pixels.reshape(rows // merge, merge, size, columns // merge, merge, size, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, size, size)


def _open(data: bytes | memoryview, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[Image.Image, int]:
    """The image with nothing decoded yet, and its EXIF orientation (1: upright)."""
    if not data:
        raise BadImage("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage(f"not an image that can be read: {_describe(data)}; send one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"the image has too many pixels ({error}); scale it down below {MAX_IMAGE_PIXELS} pixels") from None
    except _BROKEN as error:
        raise BadImage(f"the image's header is broken ({error}); send the complete file") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"the image is {width} x {height}; it has no pixels")
    limit = min(max_image_pixels, MAX_IMAGE_PIXELS)
    if width * height > limit:
        raise BadImage(f"the image is {width} x {height} = {width * height} pixels; {limit} at most: scale it down")
    return image, _orientation(image)


def _orientation(image: Image.Image) -> int:
    # Pillow's getexif() decodes a whole PNG in search of a late chunk; only what stands before the pixels is honoured.
    if "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(0x0112, 1)
    except _BROKEN:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB with transparency composited onto white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@lru_cache(maxsize=8)
def _normalized(factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """Rescaled in float64, then rounded to float32 and normalized there."""
    levels = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
    return (levels[None, :] - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def _describe(data: bytes | memoryview) -> str:
    head = bytes(data[:16])
    if head.lstrip().startswith((b"<", b"{")):
        return "it looks like text (HTML, SVG, XML or JSON)"
    if head[4:8] == b"ftyp":
        return "it is an ISO media file (HEIC, AVIF or MP4)"
    if head.startswith((b"II*\x00", b"MM\x00*")):
        return "it is a TIFF file"
    if head.startswith(b"%PDF"):
        return "it is a PDF file"
    return f"{len(data)} bytes beginning with {head.hex(' ')}"
