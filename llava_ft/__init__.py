"""Fine-tuning of LLaVA models."""

from llava_ft.version import __version__ as __version__
