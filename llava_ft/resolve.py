"""What a run's flags ask for, settled once: training, planning and looking at data all begin here.

`resolve_model` reads small files and the headers of weight files, and loads nothing. What it settles nobody settles
again: base and vision tower, configuration, tokenizer, where each weight lies, and what is trained.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.directory import Need
from llava_ft.checkpoint.model import ModelSpec, check_added_tokens, count_new_rows, find_model
from llava_ft.checkpoint.names import NON_LORA_BIN
from llava_ft.checkpoint.overrides import Force, force_from_flags, refuse_unless
from llava_ft.constants import CHECKPOINT_FIELDS
from llava_ft.conversation import get_template
from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.preparation.truncation import Limits
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer
from llava_ft.models.config import LlavaModelConfig
from llava_ft.tuning.plan import TuningPlan

if TYPE_CHECKING:
    from llava_ft.checkpoint.start import Start

logger = logging.getLogger(__name__)

_TOKENS_OF_FLAGS = {"mm_use_im_start_end": 2, "mm_use_im_patch_token": 1}


@dataclass(frozen=True)
class RunModel:
    """The model of a run, before any weight is read."""

    args: ParsedArgs  # the request, its base named
    start: "Start | None"  # what the run starts from; None for the base alone
    spec: ModelSpec
    """The base with its vision tower and projector, and with what was trained beside the start's adapter."""

    @property
    def config(self) -> LlavaModelConfig:
        """The settled configuration."""
        return self.spec.config

    @cached_property
    def tuning(self) -> TuningPlan:
        """What is trained.

        Raises:
            UserError: Nothing would be.
        """
        return TuningPlan.from_flags(
            lora_enable=self.args.flags.lora_enable,
            tune_mm_mlp_adapter=self.args.model.tune_mm_mlp_adapter,
            freeze_mm_mlp_adapter=self.args.flags.freeze_mm_mlp_adapter,
            freeze_backbone=self.args.model.freeze_backbone,
            has_vision=self.spec.has_vision,
            mm_projector_lr=self.args.flags.mm_projector_lr,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's tokenizer, with the tokens that the flags add."""
        return self.vocabulary[0]

    @cached_property
    def vocabulary(self) -> tuple[PreTrainedTokenizerFast, int]:
        """The tokenizer, and how many tokens were added to it."""
        tokenizer = load_tokenizer(self.spec.directory.path, model_max_length=self.args.flags.model_max_length)
        num_added = add_image_tokens(
            tokenizer,
            mm_use_im_start_end=self.config.mm_use_im_start_end,
            mm_use_im_patch_token=self.config.mm_use_im_patch_token,
        )
        return tokenizer, num_added

    @cached_property
    def num_new_rows(self) -> int:
        """Entries that the tokenizer has beyond the base's vocabulary."""
        return count_new_rows(self.config, self.tokenizer, self.spec.directory.path)

    @property
    def num_added_by_flags(self) -> int:
        """How many tokens the flags add, where there is no tokenizer: none to a base that was trained with them."""
        base = self.spec.directory.config
        return sum(n for key, n in _TOKENS_OF_FLAGS.items() if getattr(self.config, key) and not base.get(key))

    @property
    def tokenize(self) -> SampleTokenizer:
        """What turns the run's records into ids and labels."""
        return SampleTokenizer(
            self.tokenizer,
            get_template(self.args.model.version),
            mm_use_im_start_end=self.config.mm_use_im_start_end,
            supervise=self.args.data.supervise,
        )

    def data_plan(self, num_processes: int | None = None, *, goes_first: bool = True) -> DataPlan:
        """Say how the run reads its data.

        Args:
            num_processes: How many read, tokenise and decode; None leaves their number to the request.
            goes_first: Whether this process prepares records at once, or lets another one of its machine go first.
        """
        data, geometry = self.args.data, self.config.image_geometry
        needs_sizes = geometry is not None and geometry.needs_image_sizes
        cache_dir = Path(data.data_cache_dir) if data.data_cache_dir else None
        return DataPlan(
            self.tokenize,
            Limits(geometry, self.args.flags.model_max_length, data.truncation),
            ImageChecks(data.check_images, needs_sizes, data.image_exif_transpose),
            data.image_folder,
            PreparationSettings(cache_dir, num_processes or data.preprocessing_num_workers, goes_first),
        )


def resolve_model(args: ParsedArgs, *, need: Need = "weights") -> RunModel:
    """Settle the model that a run asks for.

    Args:
        args: The request.
        need: What of the model has to be here: its weights for training, its tokenizer for looking at data, and
            `config.json` alone for planning.

    Raises:
        UserError: Something is missing, damaged, not supported, or contradicts the request.
    """
    start = start_of(args)
    if start is not None:
        name = start.base_name(args.model.model_name_or_path)
        if not args.model.model_name_or_path:
            logger.info("The base model is %s, as %s says.", name, start.path)
        args = args.with_model(name)
    return _resolve(args, start, need)


def start_of(args: ParsedArgs) -> "Start | None":
    """Find what a run starts from; None if it starts from its base alone.

    Raises:
        UserError: It cannot start from that.
    """
    path, flag = args.flags.start
    if not path:
        return None
    from llava_ft.checkpoint.start import find_start  # runs that start from their base do without

    flags = args.flags
    return find_start(path, flags.adapter_mode, trains_adapter=flags.lora_enable, flag=flag, cache_dir=flags.cache_dir)


def resolve_merged(run: RunModel, merged: str) -> RunModel:
    """Settle the model of a run whose start was merged into its base, which it now trains on.

    Args:
        run: The run.
        merged: Directory of the merged model.
    """
    return _resolve(run.args.with_model(merged), None, "weights")


def force_of(args: ParsedArgs) -> Force:
    """Return what the run passes over."""
    return force_from_flags(args.flags.force, args.flags.allow_base_mismatch)


def _resolve(args: ParsedArgs, start: "Start | None", need: Need) -> RunModel:
    wishes: dict[str, Any] = {key: getattr(args.model, key, None) for key in CHECKPOINT_FIELDS}
    wishes |= {key: getattr(args.data, key) for key in ("image_aspect_ratio", "image_grid_pinpoints")}
    wishes = {key: wish for key, wish in wishes.items() if wish is not None}
    force, has_weights = force_of(args), need == "weights"
    if start is not None and has_weights:
        start.check_adapter({"r": args.flags.lora_r, "lora_alpha": args.flags.lora_alpha}, force=force)
    spec = find_model(
        args.model.model_name_or_path,
        vision_tower=args.model.vision_tower or (start.vision_tower if start is not None else None),
        projector_file=args.model.pretrain_mm_mlp_adapter or (start.projector_file if start is not None else None),
        wishes=wishes if start is None else start.wishes() | wishes,
        extra_sources=start.sources(force=force) if start is not None and has_weights else (),
        cache_dir=args.flags.cache_dir,
        need=need,
    )
    if start is not None and has_weights:
        start.check_newline(spec)
        if start.has_adapter and spec.projector_is_new and start.vision_tower is not None:
            refuse_unless(
                force is True,
                f"The projector that the adapter in {start.path} was trained with is neither in {NON_LORA_BIN} nor in "
                f"{spec.directory.path}; a new one would take its place.",
                "If it was frozen in that run, give it with --pretrain_mm_mlp_adapter beside --lora_weight_path.",
            )
    run = RunModel(args, start, spec)
    if has_weights:
        tokenizer, num_added = run.vocabulary
        _ = run.num_new_rows  # raises that the tokenizer is another model's; loading makes the vocabulary larger
        check_added_tokens(spec, len(tokenizer), num_added)
    return run
