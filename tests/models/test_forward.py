"""The model computes what original LLaVA computes."""

import numpy as np
import pytest
import torch

from llava_ft.checkpoint.model import find_model, load_base
from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.image_files import load_image
from llava_ft.data.images import ImageTransform
from llava_ft.models.llava import LlavaForCausalLM
from tests.conftest import RECORDINGS, read_recording

TOLERANCE = 1e-4
RUNS = read_recording("forward/index.json")["runs"]
IMAGES = {
    "b1_two_images": ["landscape.jpg", "portrait.png"],
    "b2_text_mixed": ["landscape.jpg"],
    "b3_multi_image": ["rgba.png", "square.png", "landscape.jpg"],
    "b_text_only": [],
    "linear": ["landscape.jpg", "gray.png"],
    "sel_-2_patch": ["landscape.jpg", "portrait.png"],
    "sel_-1_cls_patch": ["landscape.jpg", "portrait.png"],
}


def load(path: str, attn_implementation: str = "eager", **wishes) -> LlavaForCausalLM:
    base = find_model(path, wishes=wishes)
    model, _ = load_base(base, dtype_of=lambda name: torch.float32, attn_implementation=attn_implementation)
    return model.eval()


def pixels(run: str) -> torch.Tensor:
    mode = "square" if run == "linear" else "pad"
    transform = ImageTransform.from_pretrained(RECORDINGS / "ckpt/clip-tiny", mode)
    return torch.stack([transform(load_image(RECORDINGS / "images/src" / name)) for name in IMAGES[run]])


def expand(
    recording: dict[str, torch.Tensor], tokens_per_image: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expand and right-pad ids and labels, as the data side does."""
    rows = []
    for ids, labels, mask in zip(recording["input_ids"], recording["labels"], recording["attention_mask"], strict=True):
        row_ids, row_labels = [], []
        for token, label in zip(ids[mask.bool()].tolist(), labels[mask.bool()].tolist(), strict=True):
            count = tokens_per_image if token == IMAGE_TOKEN_INDEX else 1
            row_ids += [token] * count
            row_labels += [label] * count
        rows.append((row_ids, row_labels))
    length = max(len(row_ids) for row_ids, _ in rows)
    ids = torch.tensor([row_ids + [0] * (length - len(row_ids)) for row_ids, _ in rows])
    labels = torch.tensor([row + [IGNORE_INDEX] * (length - len(row)) for _, row in rows])
    mask = torch.tensor([[1] * len(row_ids) + [0] * (length - len(row_ids)) for row_ids, _ in rows])
    return ids, labels, mask


def read(run: str) -> dict[str, torch.Tensor]:
    arrays = np.load(RECORDINGS / f"forward/{run}.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("run", list(IMAGES))
def test_embeddings_loss_logits_and_gradients_are_the_original_s(run: str, attn_implementation: str):
    recorded, facts = read(run), RUNS[run]
    path = "ckpt/llava1-tiny-linear" if run == "linear" else "ckpt/llava15-tiny"
    wishes = {
        "mm_vision_select_layer": facts["select_layer"],
        "mm_vision_select_feature": facts["select_feature"],
    }
    model = load(path, attn_implementation, **wishes)
    ids, labels, mask = expand(recorded, model.config.tokens_per_image)
    images = pixels(run) if IMAGES[run] else None

    embeds = model.embed_inputs(ids, images)
    real = mask.bool()
    assert torch.equal(real, recorded["out_attention_mask"].bool())
    assert torch.equal(labels, recorded["out_labels"])
    torch.testing.assert_close(embeds[real], recorded["out_embeds"][real], atol=TOLERANCE, rtol=0)

    logits = model(input_ids=ids, attention_mask=mask, pixel_values=images).logits
    at = recorded["logits_at"]
    torch.testing.assert_close(logits[at[:, 0], at[:, 1]], recorded["logits"], atol=TOLERANCE, rtol=0)

    model.train()
    model.requires_grad_(True)
    loss = model(input_ids=ids, attention_mask=mask, pixel_values=images, labels=labels).loss
    assert loss.item() == pytest.approx(facts["loss"], abs=TOLERANCE)
    loss.backward()
    for name, parameter in model.named_parameters():
        if f"grad:{name}" in recorded:
            torch.testing.assert_close(parameter.grad, recorded[f"grad:{name}"], atol=TOLERANCE, rtol=0)
        elif name in facts.get("grad_norm", {}) and "vision_tower" not in name:
            assert parameter.grad.norm().item() == pytest.approx(facts["grad_norm"][name], rel=1e-4), name


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1, 3])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_vision_features_are_the_original_s(layer: int, feature: str):
    recorded = read("features")
    model = load("ckpt/llava15-tiny", mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    features = model.model.vision_tower(pixels("b1_two_images")[:1])[0]
    torch.testing.assert_close(features, recorded[f"vision_{layer}_{feature}"], atol=TOLERANCE, rtol=0)
    if (layer, feature) == (-2, "patch"):
        projected = model.encode_images(pixels("b1_two_images")[:1])[0]
        torch.testing.assert_close(projected, recorded["projected"], atol=TOLERANCE, rtol=0)
