"""What an export has written, compared with what it was made from."""

from collections.abc import Iterable
from pathlib import Path

import torch

from llava_ft.checkpoint.names import native_name
from llava_ft.checkpoint.proof import ConversionReport
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.checkpoint.whole import WholeModel
from llava_ft.errors import RunError


def compare_written(report: ConversionReport, whole: WholeModel, directory: Path, names: Iterable[str]) -> None:
    """Compare tensors on disk with the base's: frozen ones bit for bit, the others for how much they changed.

    Args:
        report: Gets `frozen` and `changed`.
        whole: What was written.
        directory: Where it was written, under whatever names.
        names: Native names of what was to be written.

    Raises:
        RunError: A tensor is missing, or a frozen one has other values.
    """
    written = WeightFiles.open(directory)
    keys = {native_name(key): key for key in written.tensors}
    report.frozen = {"tensors": 0, "bit_identical": True}
    for name in names:
        key = keys.get(name)
        if key is None:
            raise RunError(f"{name} is missing from what was written. Is the disk damaged?")
        before = whole.before(name)
        if before is None:
            continue
        after = written.read([key])[key]
        rows = min(before.shape[0], after.shape[0]) if before.dim() else None
        before, after = before[:rows], after[:rows]
        if whole.origin(name) == "frozen":
            report.frozen["tensors"] += 1
            if before.dtype != after.dtype:
                report.frozen["bit_identical"] = None
            elif not torch.equal(before, after):
                raise RunError(f"{name} is frozen but was written with other values. Is the disk damaged?")
        elif whole.origin(name) != "tower":
            difference = float((after.float() - before.float()).abs().max())
            scale = float(before.float().abs().max())
            relative = difference / scale if scale else 0.0
            report.changed.append({"name": name, "max_difference": difference, "relative": relative})
