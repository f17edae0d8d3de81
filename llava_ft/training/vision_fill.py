"""Computes the features that a vision cache lacks.

Pictures are decoded in data-loading workers, the tower runs on the training device, and a thread writes. Each rank has
its own share; after each round all add up how far they are, so none waits for long at the end.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_ft.data.features.entry_log import DIGEST, Array
from llava_ft.data.features.files import FeatureStore, FeatureWriter
from llava_ft.data.features.image_contents import LocatedImage, content_digest
from llava_ft.data.image_processor import PixelNormalizer
from llava_ft.data.image_reader import ImageReader, ImageRef
from llava_ft.data.preparation.progress import Progress
from llava_ft.errors import ImageError, RunError
from llava_ft.models.vision import CLIPVisionTower

logger = logging.getLogger(__name__)

_IMAGES_PER_BATCH: Final = 32
_TILES_PER_PASS: Final = 32
_BATCHES_PER_ROUND: Final = 16


@dataclass(frozen=True, slots=True)
class ImageToEncode:
    """An image whose features are wanted.

    Attributes:
        content: Digest of its content.
        reader: Reads it.
        image: Where it is.
    """

    content: bytes
    reader: ImageReader
    image: ImageRef


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
    images: Sequence[ImageToEncode],
    encoder: Encoder,
    *,
    num_workers: int,
    world_size: int = 1,
    total: int | None = None,
) -> list[ImageToEncode]:
    """Compute the features of images and put them on disk.

    Args:
        store: Where they are put. What another run puts there in the meantime is not computed again.
        images: This rank's share, each content once.
        encoder: The tower.
        num_workers: Processes that decode; 0 decodes in this one.
        world_size: Ranks that call this at the same time.
        total: Images of all ranks; those of this one when absent.

    Returns:
        Those of the images that could not be read.

    Raises:
        RunError: The disk is full, or the tower gives numbers that are not finite.
    """
    unreadable: list[ImageToEncode] = []
    work = _Work(store, images)
    batches = iter(_loader(images, work, num_workers))
    device = next(encoder.tower.parameters()).device
    with (
        Progress("Encoding images", total or len(images), "images") as progress,
        store.writer() as writer,
        ThreadPoolExecutor(1) as thread,
    ):
        written: Future[None] | None = None
        is_done = False
        try:
            while not is_done:
                num_batches, num_images = 0, -work.num_left_out
                for batch in islice(batches, _BATCHES_PER_ROUND):
                    num_batches, num_images = num_batches + 1, num_images + len(batch)
                    unreadable += [images[number] for number, pixels in batch if pixels is None]
                    readable = [(images[number], pixels) for number, pixels in batch if pixels is not None]
                    features = _encode(readable, encoder)
                    if written is not None:
                        written.result()
                    written = thread.submit(_write, writer, readable, features)
                store.refresh()
                num_images += work.num_left_out
                num_images, is_done = _of_all_ranks(num_images, num_batches < _BATCHES_PER_ROUND, world_size, device)
                progress.advance(num_images)
        finally:
            batches = iter(())  # ends the workers, also while an error is on its way
        if written is not None:
            written.result()
    return unreadable


def _loader(images: Sequence[ImageToEncode], work: "_Work", num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        _Pictures(images),
        batch_sampler=work,
        num_workers=min(num_workers, len(images) // _IMAGES_PER_BATCH),
        collate_fn=list,
        generator=torch.Generator(),  # the run's own random numbers stay as they are
    )


class _Work:
    """Gives out numbers of images in batches, leaving out those whose features have appeared in the store."""

    def __init__(self, store: FeatureStore, images: Sequence[ImageToEncode]):
        self._store = store
        self._images = images
        self.num_left_out = 0

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._images), _IMAGES_PER_BATCH):
            contents = [image.content for image in self._images[start : start + _IMAGES_PER_BATCH]]
            is_there: Array = self._store.find(np.frombuffer(b"".join(contents), dtype=DIGEST)) >= 0
            self.num_left_out += int(is_there.sum())
            if not is_there.all():
                yield [start + offset for offset in range(len(contents)) if not is_there[offset]]


class _Pictures(Dataset[tuple[int, torch.Tensor | None]]):
    """Decoded images; None for one that cannot be read or has been changed."""

    def __init__(self, images: Sequence[ImageToEncode]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor | None]:
        wanted = self._images[number]
        try:
            pixels = wanted.reader.read([wanted.image])["pixel_values"]
        except ImageError as error:
            logger.debug("%s", error)
            return number, None
        # A file may have been replaced since its content was looked at; its features must not get the old name.
        place = wanted.reader.places[wanted.image.source]
        is_as_before = content_digest(LocatedImage(place, wanted.image.image)) == wanted.content
        return number, pixels if is_as_before else None


def _encode(readable: Sequence[tuple[ImageToEncode, torch.Tensor]], encoder: Encoder) -> list[torch.Tensor]:
    """Return the features of each image, on the CPU."""
    if not readable:
        return []
    features = encoder(torch.cat([pixels for _, pixels in readable])).to(encoder.tower.dtype)
    is_finite = torch.isfinite(features).flatten(1).all(dim=1)
    parts = list(zip(readable, is_finite.split([len(pixels) for _, pixels in readable]), strict=True))
    wrong = [wanted.image.image for (wanted, _), finite in parts if not bool(finite.all())]
    if wrong:
        raise RunError(
            f"The vision tower gives numbers that are not finite for {wrong[0]} in {encoder.tower.dtype}. Use bf16 "
            "instead of fp16, or check the tower's weights."
        )
    return list(features.cpu().split([len(pixels) for _, pixels in readable]))


def _write(
    writer: FeatureWriter, readable: Sequence[tuple[ImageToEncode, Any]], features: Sequence[torch.Tensor]
) -> None:
    if readable:
        writer.add([wanted.content for wanted, _ in readable], features)


def _of_all_ranks(num_images: int, is_done: bool, world_size: int, device: torch.device) -> tuple[int, bool]:
    """Add up what all ranks did in a round; it is done when all of them are."""
    if world_size == 1:
        return num_images, is_done
    counts = torch.tensor([num_images, int(is_done)], device=device)
    torch.distributed.all_reduce(counts)
    return int(counts[0]), int(counts[1]) == world_size
