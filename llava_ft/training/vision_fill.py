"""Computes the features that a vision cache lacks.

Pictures are decoded in data-loading workers, the tower runs on the training device, and a thread writes. Each rank has
its own share; after each round all add up how far they are, so none waits for long at the end.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset

from llava_ft.data.features.contents import RunImage, as_array
from llava_ft.data.features.store import FeatureStore
from llava_ft.data.image_processor import PixelNormalizer
from llava_ft.data.preparation.progress import Progress
from llava_ft.errors import ImageError, RunError
from llava_ft.models.vision import CLIPVisionTower

logger = logging.getLogger(__name__)

_IMAGES_PER_BATCH: Final = 32
"""Written together, so it is what a killed run loses."""
_TILES_PER_PASS: Final = 32
_BATCHES_PER_ROUND: Final = 16


@dataclass(frozen=True)
class Encoder:
    """The tower with what goes before it in a run.

    Attributes:
        tower: The tower, on its device.
        normalizer: Applied to the pixels on that device.
        autocast: Whether the run computes under autocast.
    """

    tower: CLIPVisionTower
    normalizer: PixelNormalizer
    autocast: bool

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode tiles: `(K, 3, H, W)` uint8 to `(K, N, C)`."""
        device, dtype = next(self.tower.parameters()).device, self.tower.dtype
        with torch.autocast(device.type, dtype) if self.autocast else nullcontext():
            passes = [self.tower(self.normalizer(tiles.to(device))) for tiles in pixels.split(_TILES_PER_PASS)]
        return torch.cat(passes)


def fill_store(
    store: FeatureStore,
    images: Mapping[bytes, RunImage],
    encoder: Encoder,
    *,
    num_workers: int,
    world_size: int = 1,
    total: int | None = None,
) -> list[RunImage]:
    """Compute the features of images and put them on disk.

    Args:
        store: Where they are put. What another run puts there in the meantime is not computed again.
        images: This rank's share, by the digest of their contents.
        encoder: The tower.
        num_workers: Processes that decode; 0 decodes in this one.
        world_size: Ranks that call this at the same time.
        total: Images of all ranks; those of this one when absent.

    Returns:
        Those of the images that could not be read.

    Raises:
        RunError: The disk is full, or the tower gives numbers that are not finite.
    """
    unreadable: list[RunImage] = []
    device = next(encoder.tower.parameters()).device
    contents = list(images)
    num_passed = 0  # images that are encoded, unreadable, or encoded by another run

    def missing() -> Iterator[list[bytes]]:
        nonlocal num_passed
        for start in range(0, len(contents), _IMAGES_PER_BATCH):
            digests = contents[start : start + _IMAGES_PER_BATCH]
            left = [digest for digest, at in zip(digests, store.find(as_array(digests)), strict=True) if at < 0]
            num_passed += len(digests) - len(left)
            if left:
                yield left

    loader: DataLoader[Any] = DataLoader(
        _Pictures(images),
        batch_sampler=missing(),
        num_workers=min(num_workers, len(images) // _IMAGES_PER_BATCH),
        collate_fn=list,
        generator=torch.Generator(),  # the run's own random numbers stay as they are
    )
    batches = iter(loader)
    with (
        Progress("Encoding images", total or len(images), "images") as progress,
        ThreadPoolExecutor(1) as thread,
    ):
        written: Future[None] | None = None
        is_done = False
        try:
            while not is_done:
                num_batches = 0
                for batch in islice(batches, _BATCHES_PER_ROUND):
                    num_batches, num_passed = num_batches + 1, num_passed + len(batch)
                    unreadable += [images[digest] for digest, pixels in batch if pixels is None]
                    readable = {digest: pixels for digest, pixels in batch if pixels is not None}
                    features = _encode(readable, images, encoder)
                    if written is not None:
                        written.result()  # one batch is written while the next is encoded, and no more wait
                    written = thread.submit(store.add, [*readable], features) if readable else None
                store.refresh()
                counts = torch.tensor([num_passed, num_batches == _BATCHES_PER_ROUND], device=device)
                num_passed = 0
                if world_size > 1:
                    torch.distributed.all_reduce(counts)
                progress.advance(int(counts[0]))
                is_done = not counts[1]
        finally:
            batches = iter(())  # ends the workers, also while an error is on its way
        if written is not None:
            written.result()
    return unreadable


class _Pictures(Dataset[tuple[bytes, torch.Tensor | None]]):
    """Decoded images by digest; None for one that cannot be read or has been changed."""

    def __init__(self, images: Mapping[bytes, RunImage]):
        self._images = images

    def __getitem__(self, digest: bytes) -> tuple[bytes, torch.Tensor | None]:
        image = self._images[digest]
        try:
            pixels = image.reader.read([image.ref])["pixel_values"]
        except ImageError as error:
            logger.debug("%s", error)
            return digest, None
        # A file may have been replaced since its content was looked at; its features must not get the old name.
        return digest, pixels if image.content_digest() == digest else None


def _encode(
    readable: Mapping[bytes, torch.Tensor], images: Mapping[bytes, RunImage], encoder: Encoder
) -> list[torch.Tensor]:
    """Return the features of each image, on the CPU."""
    if not readable:
        return []
    features = encoder(torch.cat([*readable.values()])).to(encoder.tower.dtype)
    parts = features.cpu().split([len(pixels) for pixels in readable.values()])
    for digest, part in zip(readable, parts, strict=True):
        if not bool(torch.isfinite(part).all()):
            raise RunError(
                f"The vision tower gives numbers that are not finite for {images[digest].ref.image} in "
                f"{encoder.tower.dtype}. Use bf16 instead of fp16, or check the tower's weights."
            )
    return list(parts)
