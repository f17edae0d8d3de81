"""`--vision_cache`: the features of the frozen vision tower, computed once and read in every later epoch and run.

What is notable: images are known by their content, so a renamed or copied file costs nothing; disk use is announced and
compared with what is free before any is taken; whatever is missing is computed by all ranks together before the
language model is loaded, so the tower and the model are never on the device at the same time.
"""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.base import BaseModel, load_tower
from llava_ft.checkpoint.fingerprint import vision_tower_fingerprint
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.features.entry_log import DIGEST, Array
from llava_ft.data.features.files import FeatureSettings, FeatureStore
from llava_ft.data.features.format import FeatureFormat
from llava_ft.data.features.image_contents import NO_CONTENT, ContentTable, LocatedImage, image_contents, image_states
from llava_ft.data.features.reader import FeatureReader, name_digest
from llava_ft.data.image_reader import ImageReader, ImageRef
from llava_ft.data.preparation.processes import num_cores
from llava_ft.data.preparation.progress import Progress
from llava_ft.errors import ImageError, RunError, UserError
from llava_ft.models.config import LlavaLlamaConfig, hidden_state_index
from llava_ft.training.shared_output import blind_ranks, from_all_ranks, from_first_rank
from llava_ft.training.vision_fill import Encoder, ImageToEncode, fill_store
from llava_ft.tuning.freeze import TuningPlan

logger = logging.getLogger(__name__)

_TOWER_PREFIX = "model.vision_tower."
_CONTENTS = "contents"
_MOST_WORKERS = 16
_MOST_NAMED = 5
_SECONDS_TILL_SEEN = 120.0
_SECONDS_BETWEEN_LOOKS = 1.0


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
    images = _find_images(datasets)
    reason = _reason_against(base.config, plan, images)
    if reason:
        logger.info("The vision cache is off: %s.", reason)
        return False
    directory = Path(args.data.vision_cache)
    _check_directory(directory, args)
    geometry, width = base.config.image_geometry, base.config.mm_hidden_size
    assert geometry is not None
    assert width is not None
    settings = FeatureSettings(
        key=_key(args, base, images[0].reader),
        tiles=FeatureFormat.of_tower(geometry, width, compute_dtype, args.data.vision_cache_dtype),
    )
    store = FeatureStore(settings.folder(directory), settings)
    if store.num_damaged:
        logger.warning(
            "%d entries in %s are damaged or have no features; these images are encoded anew.",
            store.num_damaged,
            store.folder,
        )
    contents = _contents_of(images, directory / _CONTENTS, args)
    missing = _missing(store, images, contents, args.training.world_size)
    _announce(store, len(set(contents.tolist()) - {NO_CONTENT}), missing, args)
    if missing:
        store = _compute(args, base, store, missing, compute_dtype)
    _hand_out(datasets, store, images, contents)
    return True


@dataclass(frozen=True, slots=True)
class _Image:
    """One of the run's images, each name once."""

    name: bytes
    reader: ImageReader
    ref: ImageRef

    @property
    def located(self) -> LocatedImage:
        return LocatedImage(self.reader.places[self.ref.source], self.ref.image)


def _find_images(datasets: BuiltDatasets) -> list[_Image]:
    """Find the images of training and validation data, each name once; those without a usable name are left out."""
    found: dict[bytes, _Image] = {}
    for dataset in (datasets.train, datasets.validation):
        reader = dataset.image_reader if dataset is not None else None
        if dataset is None or not isinstance(reader, ImageReader):
            continue
        for position in range(len(dataset)):
            for ref in dataset.image_refs(position):
                try:
                    name = name_digest(reader.locate(ref))
                except ImageError:
                    continue
                found.setdefault(name, _Image(name, reader, ref))
    return list(found.values())


def _reason_against(config: LlavaLlamaConfig, plan: TuningPlan, images: Sequence[_Image]) -> str:
    """Return why no features can be kept, or nothing. Images are prepared without random numbers: that is no reason."""
    if config.mm_vision_config is None:
        return "the model has no vision tower"
    if plan.trains(_TOWER_PREFIX):
        return "the vision tower is trained, so its features change with every step"
    return "" if images else "the data has no images"


def _check_directory(directory: Path, args: ParsedArgs) -> None:
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


def _key(args: ParsedArgs, base: BaseModel, reader: ImageReader) -> dict[str, Any]:
    """Everything that features depend on besides the image and their format."""
    config, geometry = base.config, base.config.image_geometry
    assert geometry is not None
    assert config.vision_config is not None
    return {
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


def _computes_under_autocast(args: ParsedArgs) -> bool:
    return bool((args.training.bf16 or args.training.fp16) and not args.training.deepspeed)


def _contents_of(images: Sequence[_Image], folder: Path, args: ParsedArgs) -> Array:
    """Return the digest of each image's content; ranks share the reading of those that are not known yet."""
    training = args.training
    table = ContentTable(folder)
    located = [image.located for image in images]
    contents = np.zeros(len(images), dtype=DIGEST)
    if training.process_index == 0:
        contents = table.find(image_states(located))
    contents = from_first_rank(contents, training.world_size)
    unknown = np.flatnonzero(contents == np.void(NO_CONTENT))
    mine = unknown[training.process_index :: training.world_size]
    with Progress("Reading images to know their content", len(mine), "images") as progress:
        done = 0
        for states, some in image_contents([located[number] for number in mine]):
            contents[mine[done : done + len(some)]] = some
            done += len(some)
            is_read = some != np.void(NO_CONTENT)
            if is_read.any():
                table.add(states[is_read], some[is_read])
            progress.advance(len(some))
    table.close()
    for rank, some in enumerate(from_all_ranks(contents[mine], training.world_size)):
        contents[unknown[rank :: training.world_size]] = some
    return contents


def _missing(store: FeatureStore, images: Sequence[_Image], contents: Array, world_size: int) -> list[ImageToEncode]:
    """Return the images whose features are not in the store, each content once, in the order of the data.

    What another run writes meanwhile may be seen by some ranks and not by others, so the first one decides for all.
    """
    firsts = np.sort(np.unique(contents, return_index=True)[1])
    is_missing = (store.find(contents[firsts]) < 0) & (contents[firsts] != np.void(NO_CONTENT))
    numbers: list[int] = from_first_rank(firsts[is_missing].tolist(), world_size)
    return [ImageToEncode(bytes(contents[number]), images[number].reader, images[number].ref) for number in numbers]


def _num_tiles(image: ImageToEncode) -> int:
    geometry = image.reader.transform.geometry
    return 1 if geometry is None else geometry.num_tiles(image.image.size_wh)


def _announce(store: FeatureStore, num_images: int, missing: Sequence[ImageToEncode], args: ParsedArgs) -> None:
    """Say what there is and what computing the rest takes of the disk.

    Raises:
        UserError: It does not fit.
    """
    tiles = store.settings.tiles
    if not missing:
        logger.info("Vision cache %s: the features of all %d images are there.", store.folder, num_images)
        return
    num_tiles = sum(map(_num_tiles, missing))
    needed = num_tiles * tiles.bytes_per_tile
    free = from_first_rank(shutil.disk_usage(_existing(store.folder)).free, args.training.world_size)
    logger.info(
        "Vision cache %s: %d of %d images have features. The others take %s: %d tiles of %d tokens x %d values (%s), "
        "%d bytes each. %s is free there.",
        store.folder,
        num_images - len(missing),
        num_images,
        size_text(needed),
        num_tiles,
        tiles.num_tokens,
        tiles.width,
        f"8 bits and a scale a token, for {tiles.dtype}" if tiles.is_8bit else str(tiles.dtype),
        tiles.bytes_per_tile,
        size_text(free),
    )
    if needed > free:
        smaller = "" if tiles.is_8bit else ", or take less with --vision_cache_dtype int8"
        raise UserError(
            f"The vision cache needs {size_text(needed)} more, and {size_text(free)} is free on the disk with "
            f"{store.folder}: {size_text(needed - free)} is missing. Free some space, give a --vision_cache on another "
            f"disk{smaller}."
        )


def size_text(num_bytes: int) -> str:
    """Return a size as people read it, with the exact number where a unit rounds it."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _compute(
    args: ParsedArgs, base: BaseModel, store: FeatureStore, missing: Sequence[ImageToEncode], dtype: torch.dtype
) -> FeatureStore:
    """Compute missing features, all ranks together; return the store with them."""
    training = args.training
    with torch.random.fork_rng(devices=[]):  # building CLIP draws numbers; the run's own stay as they are
        tower = load_tower(base, dtype=dtype, device=training.device)
    encoder = Encoder(tower, missing[0].reader.transform.normalizer, _computes_under_autocast(args))
    unreadable = fill_store(
        store,
        missing[training.process_index :: training.world_size],
        encoder,
        num_workers=training.dataloader_num_workers or _own_cores(),
        world_size=training.world_size,
        total=len(missing),
    )
    del tower, encoder
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    of_all = from_all_ranks([wanted.image.image for wanted in unreadable], training.world_size)
    names = [name for names in of_all for name in names]
    for name in names[:_MOST_NAMED]:
        logger.warning("%s could not be read, or is being changed; the vision cache has no features of it.", name)
    if len(names) > _MOST_NAMED:
        logger.warning("%d images more could not be read.", len(names) - _MOST_NAMED)
    return _with_all(store, missing, len(missing) - len(names))


def _with_all(store: FeatureStore, wanted: Sequence[ImageToEncode], expected: int) -> FeatureStore:
    """Open the store anew, once it has the features that all ranks have written.

    Network file systems may show the files of another machine only after a while.

    Raises:
        RunError: They do not appear.
    """
    contents = np.frombuffer(b"".join(image.content for image in wanted), dtype=DIGEST)
    end = time.monotonic() + _SECONDS_TILL_SEEN
    while True:
        store = FeatureStore(store.folder, store.settings)
        found = int((store.find(contents) >= 0).sum())
        if found >= expected:
            return store
        if time.monotonic() > end:
            raise RunError(
                f"{expected} images were encoded, but the features of {found} can be read from {store.folder}. Is it "
                "one folder for all machines, and is nothing deleting files there? Start the same command again: what "
                "is there is not computed again."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _own_cores() -> int:
    """Count the cores for each rank of this machine; launchers say how many ranks there are."""
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, min(_MOST_WORKERS, num_cores() // num_ranks))


def _hand_out(datasets: BuiltDatasets, store: FeatureStore, images: Sequence[_Image], contents: Array) -> None:
    """Give the data sets readers of features."""
    names = np.frombuffer(b"".join(image.name for image in images), dtype=DIGEST)
    order = np.argsort(names)
    positions = store.find(contents[order])
    positions[contents[order] == np.void(NO_CONTENT)] = -1
    for dataset in (datasets.train, datasets.validation):
        if dataset is not None and isinstance(dataset.image_reader, ImageReader):
            dataset.image_reader = FeatureReader(dataset.image_reader, store, names[order], positions)
