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
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich import filesize
from torch.utils.data import DataLoader, Dataset

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.fingerprint import vision_tower_fingerprint
from llava_ft.checkpoint.model import ModelSpec, load_tower
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.features.contents import NO_CONTENT, RunImage, content_digests
from llava_ft.data.features.store import DIGEST, FeatureFormat, FeatureReader, FeatureStore, as_array, name_digest
from llava_ft.data.image_processor import PixelNormalizer
from llava_ft.data.image_reader import ImageReader
from llava_ft.data.preparation.processes import Progress, num_cores
from llava_ft.errors import ImageError, RunError, UserError
from llava_ft.models.towers.tower import VisionTower, hidden_state_index
from llava_ft.training.distributed import blind_ranks, from_all_ranks, from_first_rank
from llava_ft.tuning.plan import TuningPlan

logger = logging.getLogger(__name__)

_IMAGES_PER_BATCH: Final = 32
"""Written together, so it is what a killed run loses."""
_TILES_PER_PASS: Final = 32
_MOST_WORKERS: Final = 16
_MOST_NAMED: Final = 5
_SECONDS_TILL_SEEN = 120.0
_SECONDS_BETWEEN_LOOKS: Final = 1.0
_size = partial(filesize.decimal, precision=2)


def use_vision_cache(
    args: ParsedArgs, base: ModelSpec, plan: TuningPlan, datasets: BuiltDatasets, compute_dtype: torch.dtype
) -> bool:
    """Let the data sets read features of the vision tower instead of images, after computing what is missing.

    Returns:
        Whether the run needs no vision tower: nothing forbids the cache that is asked for.

    Raises:
        UserError: The directory cannot be used, or the disk has too little room.
        RunError: The disk is full after all, or the tower gives numbers that are not finite.
    """
    assert args.data.vision_cache is not None
    training, directory, by_name = args.training, Path(args.data.vision_cache), _images_by_name(datasets)
    reason = None
    # Images are prepared without random numbers: that is no reason against it.
    if base.config.mm_vision_config is None:
        reason = "the model has no vision tower"
    elif plan.trains_any({"vision tower"}):
        reason = "the vision tower is trained, so its features change with every step"
    elif not by_name:
        reason = "the data has no images"
    if reason:
        logger.info("The vision cache is off: %s.", reason)
        return False
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"vision_cache={directory} cannot be made or is no directory: {error.strerror}. Give a directory that can "
            "be written to."
        ) from None
    blind = blind_ranks(directory, training)
    if blind:
        raise UserError(
            f"vision_cache={directory} on the machine of rank 0 is another folder than on that of rank {blind[0]}. "
            "Give a folder that all machines share."
        )
    images = [*by_name.values()]
    geometry, width = base.config.image_geometry, base.config.mm_hidden_size
    assert geometry is not None
    assert width is not None
    tiles = FeatureFormat(
        geometry.features_per_tile, width, compute_dtype, is_8bit=args.data.vision_cache_dtype == "int8"
    )
    store = FeatureStore(directory, _feature_key(args, base, images[0].reader), tiles)
    if store.num_damaged:
        logger.warning(
            "%d files in %s are damaged or not of this cache; the images in them are encoded anew. Delete them.",
            store.num_damaged,
            store.folder,
        )
    contents = np.empty(len(images), dtype=DIGEST)
    mine = content_digests(directory / "contents", images[training.process_index :: training.world_size])
    for rank, some in enumerate(from_all_ranks(mine, training.world_size)):
        contents[rank :: training.world_size] = as_array(some)
    firsts = np.sort(np.unique(contents, return_index=True)[1])
    firsts = firsts[contents[firsts] != np.void(NO_CONTENT)]
    # What another run writes meanwhile may be seen by some ranks and not by others, so the first one decides for all.
    numbers: list[int] = from_first_rank(firsts[~store.has(contents[firsts])].tolist(), training.world_size)
    missing = {bytes(contents[number]): images[number] for number in numbers}
    _announce(store, len(firsts), missing, training.world_size)
    if missing:
        _fill(args, base, store, missing)
    names = as_array([*by_name])
    order = np.argsort(names)
    for dataset in (datasets.train, datasets.validation):
        if dataset is not None and isinstance(dataset.image_reader, ImageReader):
            dataset.image_reader = FeatureReader(dataset.image_reader, store, names[order], contents[order])
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
                try:
                    found.setdefault(name_digest(reader, ref), RunImage(reader, ref))
                except ImageError:
                    continue
    return found


def _feature_key(args: ParsedArgs, base: ModelSpec, reader: ImageReader) -> dict[str, Any]:
    """Return everything that features depend on besides the image and how they are kept."""
    config, geometry = base.config, base.config.image_geometry
    assert geometry is not None
    assert config.tower_facts is not None
    return {
        "tower": {
            "fingerprint": vision_tower_fingerprint(base.sources),
            "hidden_state": hidden_state_index(config.mm_vision_select_layer, config.tower_facts.depth),
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


def _computes_under_autocast(args: ParsedArgs) -> bool:
    return bool((args.training.bf16 or args.training.fp16) and not args.training.deepspeed)


def _announce(store: FeatureStore, num_images: int, missing: Mapping[bytes, RunImage], world_size: int) -> None:
    """Say what there is and what computing the rest takes of the disk.

    Raises:
        UserError: It does not fit.
    """
    tiles = store.tiles
    if not missing:
        logger.info("Vision cache %s: the features of all %d images are there.", store.folder, num_images)
        return
    geometry = next(iter(missing.values())).reader.transform.geometry
    num_tiles = sum(1 if geometry is None else geometry.num_tiles(image.ref.size_wh) for image in missing.values())
    needed = num_tiles * tiles.bytes_per_tile
    disk = next(place for place in (store.folder, *store.folder.absolute().parents) if place.exists())
    free = from_first_rank(shutil.disk_usage(disk).free, world_size)
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


def _fill(args: ParsedArgs, base: ModelSpec, store: FeatureStore, missing: Mapping[bytes, RunImage]) -> None:
    """Compute missing features, all ranks together, and find in the store what all have written.

    Raises:
        RunError: The disk is full, the tower gives numbers that are not finite, or what was written does not appear.
    """
    training, contents = args.training, list(missing)
    with torch.random.fork_rng(devices=[]):  # building a tower draws numbers; the run's own stay as they are
        tower = load_tower(base, dtype=store.tiles.dtype, device=training.device)
    normalizer = missing[contents[0]].reader.transform.normalizer
    encode = Encoder(tower, normalizer, _computes_under_autocast(args))
    # The cores of this machine, shared by its ranks; launchers say how many there are.
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    num_workers = training.dataloader_num_workers or min(_MOST_WORKERS, max(1, num_cores() // num_ranks))
    share = {content: missing[content] for content in contents[training.process_index :: training.world_size]}
    loader: DataLoader[Any] = DataLoader(
        _Pictures(share),
        batch_size=_IMAGES_PER_BATCH,
        num_workers=min(num_workers, len(share) // _IMAGES_PER_BATCH),
        collate_fn=list,
        generator=torch.Generator(),  # the run's own random numbers stay as they are
    )
    unreadable: list[str] = []
    whose = "" if training.world_size == 1 else ", this rank's share"
    with Progress(f"Encoding images{whose}", len(share), "images") as progress, ThreadPoolExecutor(1) as thread:
        written: Future[None] | None = None
        for batch in loader:
            unreadable += [share[digest].ref.image for digest, pixels in batch if pixels is None]
            readable = {digest: pixels for digest, pixels in batch if pixels is not None}
            parts: dict[bytes, torch.Tensor] = {}
            if readable:
                features = encode(torch.cat([*readable.values()])).to(tower.dtype).cpu()
                parts = dict(zip(readable, features.split([len(pixels) for pixels in readable.values()]), strict=True))
            for digest, part in parts.items():
                if not bool(torch.isfinite(part).all()):
                    raise RunError(
                        f"The vision tower gives numbers that are not finite for {share[digest].ref.image} in "
                        f"{tower.dtype}. Use bf16 instead of fp16, or check the tower's weights."
                    )
            if written is not None:
                written.result()  # one batch is written while the next is encoded, and no more wait
            written = thread.submit(store.add, parts) if parts else None
            progress.advance(len(batch))
        if written is not None:
            written.result()
    del tower, encode
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    names = [name for names in from_all_ranks(unreadable, training.world_size) for name in names]
    for name in names[:_MOST_NAMED]:
        logger.warning("%s could not be read, or is being changed; the vision cache has no features of it.", name)
    if len(names) > _MOST_NAMED:
        logger.warning("%d images more could not be read.", len(names) - _MOST_NAMED)
    expected, end = len(missing) - len(names), time.monotonic() + _SECONDS_TILL_SEEN
    while True:  # network file systems may show the files of another machine only after a while
        store.refresh()
        found = int(store.has(as_array(contents)).sum())
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
    """The tower with what goes before it in a run."""

    tower: VisionTower
    normalizer: PixelNormalizer
    autocast: bool

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode tiles: `(K, 3, H, W)` uint8 to `(K, N, C)`."""
        device, dtype = next(self.tower.parameters()).device, self.tower.dtype
        with torch.autocast(device.type, dtype) if self.autocast else nullcontext():
            passes = [self.tower(self.normalizer(tiles.to(device))) for tiles in pixels.split(_TILES_PER_PASS)]
        return torch.cat(passes)


class _Pictures(Dataset[tuple[bytes, torch.Tensor | None]]):
    """Digests with decoded images; None for one that cannot be read or has been changed."""

    def __init__(self, images: Mapping[bytes, RunImage]):
        self._images = [*images.items()]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[bytes, torch.Tensor | None]:
        digest, image = self._images[index]
        try:
            pixels = image.reader.read([image.ref])["pixel_values"]
        except ImageError as error:
            logger.debug("%s", error)
            return digest, None
        # A file may have been replaced since its content was looked at; its features must not get the old name.
        return digest, pixels if image.content_digest() == digest else None
