"""The vision tower on a batch of large images, through the encode stage's own runner and into its pool."""

from __future__ import annotations

import time

from epd.cluster.sizes import EMBEDDING_BLOCK_ROWS
from epd.model.device.vision import DeviceVisionModel
from epd.model.device.vision_runner import DeviceVisionRunner
from epd.model.preprocess import image_grid, num_image_tokens
from epd.model.weights import load_vision_weights
from epd.step import ImageInput
from gpu.pool import PoolSpec
from tools.bench.rows import make_row
from tools.gpu_check.figures.counts import vision_flop
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.figures.timing import median_wall_s
from tools.gpu_check.found import Figures
from tools.loadgen.images import draw_image


def run(rig: Rig) -> Figures:
    limits, config = rig.known_limits(), rig.config
    if config.vision is None or config.image is None:
        raise ValueError(f"{rig.folder} has no vision tower")
    rig.give_back()
    weights = load_vision_weights(config, rig.folder, "dummy", placement=rig.placement)
    tower = DeviceVisionModel(config.vision, config.image, weights, rig.device, rig.dtype)
    images = _images(rig)
    blocks_of = [-(-image.num_tokens // EMBEDDING_BLOCK_ROWS) for image in images]
    block_bytes = EMBEDDING_BLOCK_ROWS * config.embedding_width * rig.dtype.itemsize
    layout = config.embedding_layout(rig.backend.block_format)
    pool = rig.backend.allocate_pool(PoolSpec(sum(blocks_of), block_bytes, "embedding", layout))
    runner = DeviceVisionRunner(
        tower, config.image, pool.array(rig.dtype, (EMBEDDING_BLOCK_ROWS, config.embedding_width)), pool.checksum
    )
    stream = rig.stream("encode")
    stream.submit(runner.prepare).result()
    started = time.perf_counter()
    patches = [runner.preprocess(image) for image in images]
    preprocess_s = (time.perf_counter() - started) / len(images)
    ends = [sum(blocks_of[: place + 1]) for place in range(len(images))]
    ids = [list(range(end - count, end)) for end, count in zip(ends, blocks_of, strict=True)]
    grids = [image.grid for image in images]

    def encode() -> None:
        sums = stream.submit(runner.encode_patches, patches, grids, ids).result()
        if error := next((each for each in sums if isinstance(each, Exception)), None):
            raise error

    seconds = median_wall_s(encode, rounds=5, warm_ups=2)
    num_patches = [t * h * w for t, h, w in grids]
    flop = sum(vision_flop(config.vision, each) for each in num_patches)
    width, height = rig.loads.image_size
    name = f"vision tower, {len(images)} images of {width} x {height}"
    timed = ", ".join(
        f"{each.name} {'fails' if each.seconds is None else f'{1e3 * each.seconds:.2f} ms'}" for each in runner.timed
    )
    yield make_row(
        name,
        flop / seconds / 1e12,
        "TFLOP/s",
        baseline=limits.flop_per_s / 1e12,
        bar=">=0.45",
        note=f"{sum(num_patches)} patches in {1e3 * seconds:.1f} ms, from grey levels on the host to rows in the pool"
        + (f"; attention of 4096 patches: {timed}" if timed else ""),
    )
    yield make_row(f"{name}: preprocessing of one", 1e3 * preprocess_s, "ms", note="from a JPEG file, one thread of the host")
    runner.close()
    pool.close()


def _images(rig: Rig) -> list[ImageInput]:
    config = rig.config.image
    assert config is not None
    images = []
    for number in range(rig.loads.num_images):
        data = draw_image(0, number, rig.loads.image_size, "jpeg")
        grid = image_grid(data, config)
        images.append(ImageInput(str(number), data, grid, num_image_tokens(grid, config.merge_size)))
    return images
