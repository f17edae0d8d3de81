"""What a checkpoint and a vision cache take on disk, from shapes.

Tokenizer, configuration and logs, a few megabytes, are left out.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from llava_ft.checkpoint.names import (
    ADAPTER_BIN,
    NEW_ROWS_SUFFIX,
    NON_LORA_BIN,
    OPTIMIZER,
    PROJECTOR_BIN,
    native_name,
)  # fmt: skip
from llava_ft.checkpoint.save import WeightsFormat, is_in_adapter, result_kind
from llava_ft.checkpoint.weights import WeightFiles, has_model_weights
from llava_ft.data.features.store import FeatureFormat
from llava_ft.models.parts import module_part, part_of
from llava_ft.planning.model import ParameterShape, num_values
from llava_ft.planning.placement import optimizer_kind
from llava_ft.planning.request import PlanRequest
from llava_ft.resolve import RunModel

WHOLE_MODEL = "model weights"
OPTIMIZER_SHARDS = "global_stepN/*_optim_states.pt"
MODEL_STATES = "global_stepN/*_model_states.pt"


def checkpoint_files(
    shapes: Sequence[ParameterShape],
    request: PlanRequest,
    *,
    weights_format: WeightsFormat = "auto",
    save_vision_tower: bool = False,
    is_final: bool = False,
) -> dict[str, int]:
    """Return the bytes of each file, or group of files, of a checkpoint; the final one has no optimizer state."""
    trained = [shape for shape in shapes if shape.is_trained]
    written_as = result_kind(request.tuning)
    if written_as == "projector":
        files = {PROJECTOR_BIN: 4 * num_values(trained)}
    elif written_as == "lora":
        inside = [shape for shape in trained if is_in_adapter(shape.name)]
        # Embeddings and head are there whole if rows of added tokens are trained.
        names = {shape.name for shape in shapes}
        matrices = [shape for shape in shapes if shape.name.removesuffix(".weight") + NEW_ROWS_SUFFIX in names]
        whole = sum(shape.numel * shape.dtype.itemsize for shape in matrices)
        files = {
            ADAPTER_BIN: 4 * num_values(inside),
            NON_LORA_BIN: 4 * (num_values(trained) - num_values(inside)) + whole,
        }
    else:
        written = [shape for shape in shapes if save_vision_tower or shape.is_trained or shape.part != "vision tower"]
        size = request.compute_dtype.itemsize
        files = {WHOLE_MODEL: sum(shape.numel * (size if is_final else shape.dtype.itemsize) for shape in written)}
    copies = 2 if weights_format == "both" else 1
    files = {name: size * copies for name, size in files.items() if size}
    if is_final:
        return files
    kind = optimizer_kind(request.optimizer)
    if request.zero is None or request.zero.stage == 0:
        return files | {OPTIMIZER: kind.state_bytes(shape.shape for shape in trained)}
    ranks = request.machine.world_size
    share = -(-num_values(trained) // ranks)
    files[OPTIMIZER_SHARDS] = ranks * (4 * share + kind.state_bytes([(share,)]))
    if request.zero.stage < 3:
        files[MODEL_STATES] = request.compute_dtype.itemsize * num_values(trained)
    return files


def merged_base_bytes(shapes: Sequence[ParameterShape], run: RunModel) -> int | None:
    """Return the bytes of the model that `adapter_mode=merge_first` writes before the first step; None without it.

    Its weights have the type of the base's files; where these are not here, that which `config.json` names, else
    bfloat16. A vision tower is in it only where it is in the base's files.
    """
    if run.start is None or run.start.mode != "merge_first":
        return None
    dtype = run.config.dtype if isinstance(run.config.dtype, torch.dtype) else torch.bfloat16
    if has_model_weights(run.spec.directory.path):
        by_dtype: Counter[torch.dtype] = Counter()
        for info in WeightFiles.open(run.spec.directory.path).tensors.values():
            by_dtype[info.dtype] += info.num_bytes
        dtype = max(by_dtype, key=by_dtype.__getitem__)
    native = {native_name(shape.name).replace(".base_layer.", "."): shape for shape in shapes}
    return dtype.itemsize * sum(
        shape.numel
        for name, shape in native.items()
        if part_of(name) not in ("LoRA", "new token rows")
        and (run.spec.holds_vision_tower or module_part(name) != "vision tower")
    )


def vision_cache_bytes(num_tiles: int, run: RunModel, dtype: torch.dtype, kept_as: str) -> int:
    """Return the most that the features of so many tiles take, of `dtype` unless `vision_cache_dtype` is int8."""
    geometry, width = run.config.image_geometry, run.config.mm_hidden_size
    assert geometry is not None
    assert width is not None
    return num_tiles * FeatureFormat(geometry.features_per_tile, width, dtype, kept_as == "int8").bytes_per_tile
