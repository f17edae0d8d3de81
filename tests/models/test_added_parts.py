"""A language model, a tower and a projector that the package does not have, added through the registries alone."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MptConfig, MptForCausalLM, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from llava_ft.cli import main
from llava_ft.errors import UserError
from llava_ft.inference.generate import prepare_inputs
from llava_ft.inference.load import load_model
from llava_ft.inspection.weights import describe
from llava_ft.models import families, projectors, towers
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families import register_family
from llava_ft.models.families.family import Family
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.projectors import register_projector
from llava_ft.models.projectors.projector import ProjectorType
from llava_ft.models.towers import register_tower
from llava_ft.models.towers.tower import TowerType
from llava_ft.planning.model import build_model, parameter_shapes
from tests.conftest import RECORDINGS
from tests.models.test_flops import counted_flops
from tests.planning.helpers import plan_of, request_of
from tests.training.helpers import Run, fixed_logits, flags, prepare, state_of, train

pytestmark = pytest.mark.usefixtures("in_recordings")

# ---------------------------------------------------------------------------------------------- a language model


class LlavaQwen2Config(LlavaModelConfig, Qwen2Config):
    model_type = "llava_qwen2"


class LlavaQwen2ForCausalLM(LlavaForCausalLM, Qwen2ForCausalLM):
    config_class = LlavaQwen2Config


QWEN2 = Family("qwen2", LlavaQwen2ForCausalLM, LlavaQwen2Config, ("llava_qwen2",))


# ------------------------------------------------------------------------------------------------------- a tower


class PatchNetConfig(PreTrainedConfig):
    model_type = "patch_net"
    hidden_size: int = 24
    num_hidden_layers: int = 2
    image_size: int = 56
    patch_size: int = 14


class PatchNet(nn.Module):
    """Patches, then layers that each look at a patch's neighbours. No class token."""

    def __init__(self, config: PatchNetConfig):
        super().__init__()
        self.patches = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.blocks = nn.ModuleList(
            nn.Conv2d(config.hidden_size, config.hidden_size, 3, padding=1) for _ in range(config.num_hidden_layers)
        )


def encode(encoder: PatchNet, pixel_values: torch.Tensor, num_layers: int) -> torch.Tensor:
    picture = encoder.patches(pixel_values)
    for block in encoder.blocks[:num_layers]:
        picture = picture + torch.tanh(block(picture))
    return picture.flatten(2).transpose(1, 2)


PATCH_NET = TowerType(
    model_type="patch_net",
    config_class=PatchNetConfig,
    fields=("hidden_size", "num_hidden_layers", "image_size", "patch_size"),
    build=PatchNet,
    encode=encode,
    layers="blocks",
    sizes=(("hidden_size", "patches.weight", 0), ("patch_size", "patches.weight", 2)),
    example="the one in this test",
)


# --------------------------------------------------------------------------------------------------- a projector


class PairProjector(nn.Module):
    """Norm, then one token of each two neighbours in a row."""

    def __init__(self, name: str, width_in: int, width_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.linear = nn.Linear(2 * width_in, width_out)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.normal_(self.linear.weight, std=0.05)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(features).unflatten(1, (-1, 2)).flatten(2))


PAIRS = ProjectorType("pairs", re.compile("pairs"), PairProjector, num_tokens=lambda n: n // 2, keeps_grid=False)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """The three are known while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
        patch.setattr(towers, "_TOWERS", dict(towers._TOWERS))
        patch.setattr(projectors, "_PROJECTORS", list(projectors._PROJECTORS))
        register_family(QWEN2)
        register_tower(PATCH_NET)
        register_projector(PAIRS)
        yield


def test_attention_that_would_not_see_where_samples_begin_is_refused():
    class LlavaMptForCausalLM(LlavaForCausalLM, MptForCausalLM):
        config_class = MptConfig

    with pytest.raises(TypeError, match=r"LlavaMptForCausalLM has attention of its own\. Allowed are"):
        register_family(Family("mpt", LlavaMptForCausalLM, LlavaQwen2Config, ("llava_mpt",)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two language models, with a head of its own and without one, and a tower, as their directories would be."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("untied", "tied"):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=name == "tied",
            bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
        for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(RECORDINGS / "ckpt/base-llm" / file, folder / name)
    (folder / "tower").mkdir()
    save_file(PatchNet(PatchNetConfig()).state_dict(), folder / "tower/model.safetensors", metadata={"format": "pt"})
    (folder / "tower/config.json").write_text(json.dumps({"model_type": "patch_net"}))
    shutil.copy(RECORDINGS / "ckpt/clip-tiny/preprocessor_config.json", folder / "tower")
    return folder


PACKED = {"packing": "True", "group_by_modality_length": None, "model_max_length": "512"}
RUNS = {
    "lora, packed": ("lora", "untied", PACKED),
    "lora, padded": ("lora", "tied", {}),
    "full, packed": ("full", "untied", PACKED),
    "full, padded": ("full", "tied", {}),
}


def run_flags(folder: Path, name: str) -> tuple[str, dict[str, object]]:
    """Return a run's method and what it changes of the common flags."""
    method, base, flags = RUNS[name]
    parts = {"vision_tower": folder / "tower", "mm_projector_type": "pairs", "pretrain_mm_mlp_adapter": None}
    return method, parts | {"model_name_or_path": folder / base} | flags


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        found = {}
        for name in RUNS:
            method, changes = run_flags(folder, name)
            found[name] = train(folder / name, method, **changes)
        return found


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", RUNS)
def test_it_learns(runs: dict[str, Run], name: str):
    model = runs[name].trainer.model
    assert len(losses(runs[name])) == 6
    assert losses(runs[name])[-1] < losses(runs[name])[0]
    geometry = model.config.image_geometry
    assert (model.config.model_type, geometry.features_per_tile, geometry.tokens_per_tile) == ("llava_qwen2", 16, 8)
    trained = {parameter_name for parameter_name, p in model.named_parameters() if p.requires_grad}
    assert any(parameter_name.endswith("mm_projector.norm.weight") for parameter_name in trained)
    assert not any("vision_tower" in parameter_name for parameter_name in trained)


@pytest.mark.parametrize("name", RUNS)
def test_it_resumes_bit_equal(runs: dict[str, Run], folder: Path, name: str):
    again, (method, changes) = folder / f"{name}, again", run_flags(folder, name)
    again.mkdir()
    shutil.copytree(folder / name / "checkpoint-3", again / "checkpoint-3")
    straight, resumed = state_of(runs[name]), state_of(train(again, method, **changes))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.usefixtures("runs")
def test_it_is_merged_and_asked(folder: Path, capsys: pytest.CaptureFixture[str]):
    adapter = ["--model-path", str(folder / "lora, packed"), "--model-base", str(folder / "untied")]
    assert main(["merge", *adapter, "--save-model-path", str(folder / "merged"), "--save-vision-tower"]) == 0
    on_base, merged = (
        load_model(str(folder / "lora, packed"), str(folder / "untied")),
        load_model(str(folder / "merged")),
    )
    for one, other in zip(fixed_logits(on_base), fixed_logits(merged), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    base, ours = load_file(folder / "untied/model.safetensors"), load_file(folder / "merged/model.safetensors")
    assert torch.equal(base["model.layers.0.self_attn.q_proj.bias"], ours["model.layers.0.self_attn.q_proj.bias"])
    capsys.readouterr()
    question = ["--image-file", "images/src/square.png", "--query", "What?", "--max-new-tokens", "4"]
    assert main(["generate", "--model-path", str(folder / "merged"), *question]) == 0
    answer = capsys.readouterr().out
    assert main(["generate", *adapter, *question]) == 0
    assert capsys.readouterr().out == answer


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", RUNS)
def test_its_files_are_whole(folder: Path, name: str):
    assert describe(folder / name).missing == []


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("layout", "message"),
    [("hf", "its language model is a qwen2, and LLaMA alone is written"), ("gguf", "its language model is a qwen2")],
)
def test_layouts_that_have_no_place_for_it_say_so(folder: Path, capsys, layout: str, message: str):
    paths = ["--model-path", str(folder / "full, padded"), "--save-path", str(folder / layout)]
    assert main(["export", "--format", layout, *paths]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("runs")
def test_a_full_run_is_loaded_again(runs: dict[str, Run], folder: Path):
    loaded = load_model(str(folder / "full, padded"))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    trained = dict(runs["full, padded"].trainer.model.named_parameters())
    assert torch.equal(loaded.model.model.mm_projector.linear.weight, trained["model.mm_projector.linear.weight"])
    inputs = prepare_inputs(loaded, "<image>\nWhat?", ["images/src/square.png"])
    assert int((inputs["input_ids"] == -200).sum()) == 8


@pytest.mark.parametrize("name", RUNS)
def test_it_is_planned(runs: dict[str, Run], folder: Path, name: str):
    method, changes = run_flags(folder, name)
    argv = flags(folder / "planned", method, **changes)
    spec, request = request_of(argv)
    planned = {
        shape.name: (shape.shape, shape.is_trained) for shape in parameter_shapes(build_model(spec, request), request)
    }
    built = {key: (tuple(p.shape), p.requires_grad) for key, p in runs[name].trainer.model.named_parameters()}
    assert planned == built
    assert request.lora is None or not request.lora.fast  # there is no kernel for its layers
    cached = ["--vision_cache", str(folder / "planned-features")]
    assert plan_of(argv).memory.total >= plan_of([*argv, *cached]).memory.total > 0


@pytest.mark.parametrize("name", RUNS)
def test_its_flops_are_those_that_torch_counts(folder: Path, name: str):
    method, changes = run_flags(folder, name)
    counted, worked_out = counted_flops(flags(folder / "counted", method, **changes))
    assert worked_out == counted


def test_a_new_projector_starts_as_it_says(folder: Path):
    method, changes = run_flags(folder, "lora, padded")
    run = prepare(folder / "new", method, **changes)
    projector = run.trainer.model.get_submodule("base_model.model.model.mm_projector")
    assert not projector.linear.bias.any()
    assert projector.linear.weight.std().item() == pytest.approx(0.05, rel=0.1)
    run.stop.release()


def test_its_features_are_kept(runs: dict[str, Run], folder: Path):
    method, changes = run_flags(folder, "full, padded")
    run = train(folder / "cached", method, **changes, vision_cache=folder / "features")
    assert losses(run) == losses(runs["full, padded"])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "other",
    [
        {"bits": "4"},
        {"s2_scales": "56,112"},
        {"padding_free": "True", "group_by_modality_length": None},
        {"mm_use_im_start_end": "True", "gradient_checkpointing": "selective"},
        {"torch_compile": "True", "torch_compile_backend": "aot_eager"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_it_is_trained_in_other_ways_and_merged(folder: Path, tmp_path: Path, other: dict[str, object]):
    method, changes = run_flags(folder, "lora, padded")
    run = train(tmp_path / "out", method, **changes | other, max_steps=2)
    assert len(losses(run)) == 2
    adapter = ["--model-path", str(tmp_path / "out"), "--model-base", str(folder / "tied")]
    assert main(["merge", *adapter, "--save-model-path", str(tmp_path / "merged")]) == 0


def test_packed_samples_do_not_see_each_other(folder: Path):
    loaded = load_model(str(folder / "untied"))
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    apart = [loaded.model(input_ids=part).logits for part in ids.split([5, 7], dim=1)]
    joined = loaded.model(input_ids=ids, sample_lengths=[5, 7]).logits
    torch.testing.assert_close(joined, torch.cat(apart, dim=1))


def test_places_of_tokens_are_needed_for_a_picture(folder: Path):
    tiled = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}
    method, changes = run_flags(folder, "lora, padded")
    with pytest.raises(UserError, match="the 8 tokens of a tile form no square"):
        prepare(folder / "out", method, **changes | tiled)
