"""The end of a training that diverged: JSON has no NaN, so its record could not be written after the evaluation."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.config.schema import TrainConfig

_LOGGED = {"loss": "loss", "grad_norm": "gradient norm"}  # by Trainer's names


def require_finite(name: str, value: float, step: int, config: TrainConfig) -> None:
    """Check a number that training logs.

    Raises:
        ValueError: If it is NaN or infinite. The message says what to lower.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"train: {name} is {value} at step {step}; lower train.learning_rate ({config.learning_rate:g})"
        )


class DivergenceStop(TrainerCallback):
    """Ends training with an error at the first logged loss or gradient norm that is not finite.

    Losses are logged every few steps, so the weights themselves are checked before each checkpoint and at the last step.

    Args:
        config: Training settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check an entry of Trainer's log; Trainer calls this in every process, before it writes a checkpoint."""
        for key, name in _LOGGED.items():
            if logs and key in logs:
                require_finite(name, logs[key], state.global_step, self.config)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the trained weights where a checkpoint is due; Trainer calls this after each step."""
        if model is None or not (control.should_save or state.global_step >= state.max_steps):
            return
        for weight in model.parameters():
            if weight.requires_grad and not (finite := weight.detach().isfinite()).all():
                require_finite("a weight", weight[~finite][0].item(), state.global_step, self.config)
