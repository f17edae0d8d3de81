"""Kernels of GPUs, replaced by references of the same signatures."""

import pytest
from torch.nn.attention import varlen
from transformers import modeling_flash_attention_utils as flash

from llava_ft.models.attention import kernels
from tests.models.attention import reference


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put references in the place of what has no CPU kernel."""
    asked = flash._lazy_define_process_function(reference.flash_attn_varlen_func)

    def imported(implementation, *args, **kwargs):
        assert implementation in ("flash_attention_2", "flash_attention_3")
        return (None, reference.flash_attn_varlen_func, None, None, None), (asked, None)

    monkeypatch.setattr(varlen, "varlen_attn", reference.varlen_attn)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", imported)
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(kernels, name, lambda: True)
