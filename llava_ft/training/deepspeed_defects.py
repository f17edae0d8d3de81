"""Defects of DeepSpeed that would change a result, and what is done instead.

**The idle step of stage 0.** With bf16 or fp16 and ZeRO stage 0, DeepSpeed 0.19 prepares the optimizer's state by a
step with gradients of zero. The state it makes is not empty afterwards: Adam counts that step, so that its bias
correction is one step ahead for the whole run, and decoupled weight decay has shrunk the master weights once before
any data was seen. The stages that divide the state leave that step out.
"""

from typing import Any


def leave_out_idle_step() -> None:
    """Keep DeepSpeed's stage 0 from stepping the optimizer before the first batch; call it before the engine is made.

    Optimizers make their state at the first step that has gradients, and `load_state_dict` does not need it before.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    for wrapper in (FP16_Optimizer, FP16_UnfusedOptimizer):
        wrapper.initialize_optimizer_states = _do_nothing


def _do_nothing(self: Any) -> None:
    pass
