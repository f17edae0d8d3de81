"""A base whose files hold quantised weights is refused, with its 16-bit source by name where the files know it."""

import shutil
from pathlib import Path

import pytest
import yaml

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.model import find_model
from llava_ft.cli import main
from llava_ft.convert.merge import MergeOptions, merge
from llava_ft.errors import CheckpointError
from llava_ft.inference.load import load_model
from tests.checkpoint.adapters import BASE, peft_adapter, set_fields

pytestmark = pytest.mark.usefixtures("in_recordings")

METHODS = {
    "bitsandbytes to 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "bitsandbytes to 8 bits": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True},
    "gptq to 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq to 4 bits": {"quant_method": "awq", "bits": 4},
    "an unknown method": {},
}


def quantized_copy(directory: Path, method: str = "awq to 4 bits") -> Path:
    shutil.copytree(BASE, directory)
    tower = str(Path("ckpt/clip-tiny").resolve())
    set_fields(directory / "config.json", quantization_config=METHODS[method], mm_vision_tower=tower)
    return directory


@pytest.mark.parametrize("method", METHODS)
def test_such_a_base_is_refused(tmp_path: Path, method: str):
    base = quantized_copy(tmp_path / "base", method)
    with pytest.raises(CheckpointError, match=f"holds weights quantised by {method}. Nothing is added to such weights"):
        find_model(str(base))
    with pytest.raises(CheckpointError, match="Give the 16-bit model"):
        load_model(str(base))


def test_the_16_bit_source_is_named(tmp_path: Path):
    base = quantized_copy(tmp_path / "base")
    peft_adapter(tmp_path / "adapter")
    set_fields(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(base))
    set_fields(base / "config.json", _name_or_path="someone/original")

    def refusal() -> str:
        with pytest.raises(CheckpointError) as caught:
            merge([(1.0, identify(tmp_path / "adapter"))], None, tmp_path / "merged", MergeOptions(verify=False))
        return str(caught.value)

    assert refusal().endswith("That seems to be someone/original.")
    (tmp_path / "adapter/run_config.yaml").write_text(yaml.safe_dump({"model_name_or_path": BASE}))
    assert refusal().endswith(f"That seems to be {BASE}.")
    (tmp_path / "adapter/run_config.yaml").unlink()
    set_fields(base / "config.json", _name_or_path=str(base))
    assert "No file here names it" in refusal()


def test_the_16_bit_source_is_merged_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = quantized_copy(tmp_path / "base")
    peft_adapter(tmp_path / "adapter")
    set_fields(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(base))
    argv = ["merge", "--model-path", str(tmp_path / "adapter"), "--save-model-path", str(tmp_path / "merged")]
    assert main(argv) == 2
    assert main([*argv, "--model-base", BASE]) == 0
    shown = capsys.readouterr().err
    assert f"was trained on {base}, whose weights are quantised by awq to 4 bits. It is put into {BASE}" in shown
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
