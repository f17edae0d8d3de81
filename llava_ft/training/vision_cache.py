"""`--vision_cache`: the features of the frozen vision tower, computed once and read in every later epoch and run.

What is notable: images are known by their content, so a renamed or copied file costs nothing; disk use is announced and
compared with what is free before any is taken; whatever is missing is computed by all ranks together before the
language model is loaded, so the tower and the model are never on the device at the same time. Pictures are decoded in
data-loading workers, the tower runs on the training device, and a thread writes.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich import filesize
from torch.utils.data import DataLoader, Dataset

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.base import BaseModel, load_tower
from llava_ft.checkpoint.fingerprint import vision_tower_fingerprint
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.features.contents import NO_CONTENT, RunImage, as_array, known_contents, read_contents
from llava_ft.data.features.reader import FeatureReader
from llava_ft.data.features.store import DIGEST, Array, FeatureFormat, FeatureSettings, FeatureStore
from llava_ft.data.image_processor import PixelNormalizer
from llava_ft.data.image_reader import ImageReader
from llava_ft.data.preparation.processes import num_cores
from llava_ft.data.preparation.progress import Progress
from llava_ft.errors import ImageError, RunError, UserError
from llava_ft.models.config import hidden_state_index
from llava_ft.models.vision import CLIPVisionTower
from llava_ft.training.distributed import blind_ranks, from_all_ranks, from_first_rank
from llava_ft.tuning.freeze import TuningPlan

logger = logging.getLogger(__name__)

_IMAGES_PER_BATCH: Final = 32
"""Written together, so it is what a killed run loses."""
_TILES_PER_PASS: Final = 32
_BATCHES_PER_ROUND: Final = 16
_MOST_WORKERS: Final = 16
_MOST_NAMED: Final = 5
_SECONDS_TILL_SEEN = 120.0
_SECONDS_BETWEEN_LOOKS: Final = 1.0
_size = partial(filesize.decimal, precision=2)


def use_vision_cache(
    args: ParsedArgs, base: BaseModel, plan: TuningPlan, datasets: BuiltDatasets, compute_dtype: torch.dtype
) -> bool:
    """Let the data sets read features of the vision tower instead of images, after computing what is missing.

    Args:
        args: The request.
        base: The model's files.
        plan: What is trained.
        datasets: Their readers of images are replaced.
        compute_dtype: Type of the run's matrix products.

    Returns:
        Whether the run needs no vision tower: a cache is asked for, and nothing forbids it.

    Raises:
        UserError: The directory cannot be used, or the disk has too little room.
        RunError: The disk is full after all, or the tower gives numbers that are not finite.
    """
    if args.data.vision_cache is None:
        return False
    images = _images_by_name(datasets)
    reason = None
    # Images are prepared without random numbers: that is no reason against it.
    if base.config.mm_vision_config is None:
        reason = "the model has no vision tower"
    elif plan.trains("model.vision_tower."):
        reason = "the vision tower is trained, so its features change with every step"
    elif not images:
        reason = "the data has no images"
    if reason:
        logger.info("The vision cache is off: %s.", reason)
        return False
    directory = Path(args.data.vision_cache)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"vision_cache={directory} cannot be made or is no directory: {error.strerror}. Give a directory that can "
            "be written to."
        ) from None
    blind = blind_ranks(directory, args.training)
    if blind:
        raise UserError(
            f"vision_cache={directory} on the machine of rank 0 is another folder than on that of rank {blind[0]}. "
            "Give a folder that all machines share."
        )
    settings = _settings(args, base, next(iter(images.values())).reader, compute_dtype)
    store = FeatureStore(settings.folder(directory), settings)
    if store.num_damaged:
        logger.warning(
            "%d files in %s are damaged or not of this cache; the images in them are encoded anew. Delete them.",
            store.num_damaged,
            store.folder,
        )
    located = list(images.values())
    contents = _contents_of(located, directory / "contents", args)
    # What another run writes meanwhile may be seen by some ranks and not by others, so the first one decides for all.
    firsts = np.sort(np.unique(contents, return_index=True)[1])
    is_missing = (store.find(contents[firsts]) < 0) & (contents[firsts] != np.void(NO_CONTENT))
    numbers: list[int] = from_first_rank(firsts[is_missing].tolist(), args.training.world_size)
    missing = {bytes(contents[number]): located[number] for number in numbers}
    _announce(store, int((contents[firsts] != np.void(NO_CONTENT)).sum()), missing, args)
    if missing:
        _compute(args, base, store, missing, compute_dtype)
    names = as_array(list(images))
    order = np.argsort(names)
    positions = store.find(contents[order])
    positions[contents[order] == np.void(NO_CONTENT)] = -1
    for dataset in (datasets.train, datasets.validation):
        if dataset is not None and isinstance(dataset.image_reader, ImageReader):
            dataset.image_reader = FeatureReader(dataset.image_reader, store, names[order], positions)
    return True


def _images_by_name(datasets: BuiltDatasets) -> dict[bytes, RunImage]:
    """Find the images of training and validation data, each name once; those without a usable name are left out."""
    found: dict[bytes, RunImage] = {}
    for dataset in (datasets.train, datasets.validation):
        reader = dataset.image_reader if dataset is not None else None
        if dataset is None or not isinstance(reader, ImageReader):
            continue
        for position in range(len(dataset)):
            for ref in dataset.image_refs(position):
                image = RunImage(reader, ref)
                try:
                    found.setdefault(image.name_digest(), image)
                except ImageError:
                    continue
    return found


def _settings(args: ParsedArgs, base: BaseModel, reader: ImageReader, dtype: torch.dtype) -> FeatureSettings:
    """Return everything that features depend on besides the image."""
    config, geometry, width = base.config, base.config.image_geometry, base.config.mm_hidden_size
    assert geometry is not None
    assert width is not None
    assert config.vision_config is not None
    key: dict[str, Any] = {
        "tower": {
            "fingerprint": vision_tower_fingerprint(base.sources),
            "hidden_state": hidden_state_index(config.mm_vision_select_layer, config.vision_config.num_hidden_layers),
            "select_feature": config.mm_vision_select_feature,
            "s2_scales": list(geometry.s2_scales),
        },
        "preprocessing": {
            "processor": reader.transform.settings.to_dict(),
            "aspect_ratio": geometry.aspect_ratio.partition("_")[0],  # the N of anyres_max_N changes no tile
            "grid_pinpoints": [list(size) for size in geometry.grid_pinpoints],
            "exif_transpose": reader.exif_transpose,
            "fast_decode": reader.fast_decode,
        },
        "autocast": _computes_under_autocast(args),
    }
    return FeatureSettings(key, FeatureFormat.of_tower(geometry, width, dtype, args.data.vision_cache_dtype))


def _computes_under_autocast(args: ParsedArgs) -> bool:
    return bool((args.training.bf16 or args.training.fp16) and not args.training.deepspeed)


def _contents_of(images: Sequence[RunImage], folder: Path, args: ParsedArgs) -> Array:
    """Return the digest of each image's content; ranks share the reading of those that are not known yet."""
    training = args.training
    contents = known_contents(folder, images) if training.process_index == 0 else np.zeros(len(images), dtype=DIGEST)
    contents = from_first_rank(contents, training.world_size)
    unknown = np.flatnonzero(contents == np.void(NO_CONTENT))
    mine = unknown[training.process_index :: training.world_size]
    with Progress("Reading images to know their content", len(mine), "images") as progress:
        done = 0
        for some in read_contents(folder, [images[number] for number in mine]):
            contents[mine[done : done + len(some)]] = some
            done += len(some)
            progress.advance(len(some))
    for rank, some in enumerate(from_all_ranks(contents[mine], training.world_size)):
        contents[unknown[rank :: training.world_size]] = some
    return contents


def _announce(store: FeatureStore, num_images: int, missing: Mapping[bytes, RunImage], args: ParsedArgs) -> None:
    """Say what there is and what computing the rest takes of the disk.

    Raises:
        UserError: It does not fit.
    """
    tiles = store.settings.tiles
    if not missing:
        logger.info("Vision cache %s: the features of all %d images are there.", store.folder, num_images)
        return
    geometry = next(iter(missing.values())).reader.transform.geometry
    num_tiles = sum(1 if geometry is None else geometry.num_tiles(image.ref.size_wh) for image in missing.values())
    needed = num_tiles * tiles.bytes_per_tile
    disk = next(place for place in (store.folder, *store.folder.absolute().parents) if place.exists())
    free = from_first_rank(shutil.disk_usage(disk).free, args.training.world_size)
    logger.info(
        "Vision cache %s: %d of %d images have features. The others take %s: %d tiles of %d tokens x %d values (%s), "
        "%d bytes each. %s is free there.",
        store.folder,
        num_images - len(missing),
        num_images,
        _size(needed),
        num_tiles,
        tiles.num_tokens,
        tiles.width,
        f"8 bits and a scale a token, for {tiles.dtype}" if tiles.is_8bit else str(tiles.dtype),
        tiles.bytes_per_tile,
        _size(free),
    )
    if needed > free:
        smaller = "" if tiles.is_8bit else ", or take less with --vision_cache_dtype int8"
        raise UserError(
            f"The vision cache needs {_size(needed)} more, and {_size(free)} is free on the disk with "
            f"{store.folder}: {_size(needed - free)} is missing. Free some space, give a --vision_cache on another "
            f"disk{smaller}."
        )


def _compute(
    args: ParsedArgs, base: BaseModel, store: FeatureStore, missing: Mapping[bytes, RunImage], dtype: torch.dtype
) -> None:
    """Compute missing features, all ranks together, and find in the store what all have written.

    Raises:
        RunError: The disk is full, the tower gives numbers that are not finite, or what was written does not appear.
    """
    training, contents = args.training, list(missing)
    with torch.random.fork_rng(devices=[]):  # building CLIP draws numbers; the run's own stay as they are
        tower = load_tower(base, dtype=dtype, device=training.device)
    # The cores of this machine, shared by its ranks; launchers say how many there are.
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = min(_MOST_WORKERS, max(1, num_cores() // num_ranks))
    unreadable = fill_store(
        store,
        {content: missing[content] for content in contents[training.process_index :: training.world_size]},
        Encoder(tower, missing[contents[0]].reader.transform.normalizer, _computes_under_autocast(args)),
        num_workers=training.dataloader_num_workers or cores,
        world_size=training.world_size,
        total=len(missing),
    )
    del tower
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    of_all = from_all_ranks([image.ref.image for image in unreadable], training.world_size)
    names = [name for names in of_all for name in names]
    for name in names[:_MOST_NAMED]:
        logger.warning("%s could not be read, or is being changed; the vision cache has no features of it.", name)
    if len(names) > _MOST_NAMED:
        logger.warning("%d images more could not be read.", len(names) - _MOST_NAMED)
    expected, end = len(missing) - len(names), time.monotonic() + _SECONDS_TILL_SEEN
    while True:  # network file systems may show the files of another machine only after a while
        store.refresh()
        found = int((store.find(as_array(contents)) >= 0).sum())
        if found >= expected:
            return
        if time.monotonic() > end:
            raise RunError(
                f"{expected} images were encoded, but the features of {found} can be read from {store.folder}. Is it "
                "one folder for all machines, and is nothing deleting files there? Start the same command again: what "
                "is there is not computed again."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


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
