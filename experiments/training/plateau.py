"""Training until validation loss stops falling: the rule, its learning rate, and the measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.config.schema import TrainConfig
from experiments.training.divergence import require_finite

RATE_FACTOR = 0.1
"""The learning rate is multiplied by it at a plateau."""
LAST_PLATEAU = 2
"""Training ends at this plateau: the first lowers the learning rate."""
ACCURACY, LOSS = "validation_accuracy", "validation_loss"


def count_plateaus(losses: Iterable[float], patience: int, min_improvement: float) -> int:
    """Count plateaus: runs of measurements in a row that do not improve on the best one before.

    The rule is that of torch's `ReduceLROnPlateau` with a patience lower by one.

    Args:
        losses: Validation loss of each measurement, in order.
        patience: Measurements of one plateau.
        min_improvement: An improvement is below the best loss before by more than this share of it.

    Returns:
        The number of plateaus.

    Example:
        >>> count_plateaus([0.9, 0.6, 0.6, 0.7], patience=2, min_improvement=0.005)
        1
    """
    best, without_improvement, plateaus = float("inf"), 0, 0
    for loss in losses:
        if loss < best * (1 - min_improvement):
            best, without_improvement = loss, 0
        else:
            without_improvement += 1
        if without_improvement == patience:
            plateaus, without_improvement = plateaus + 1, 0
    return plateaus


def plateaus_in_log(log: Iterable[Mapping[str, Any]], config: TrainConfig) -> int:
    """Count the plateaus in a Trainer's log; see `count_plateaus`."""
    losses = (entry[LOSS] for entry in log if LOSS in entry)
    return count_plateaus(losses, config.patience, config.min_improvement)


def stops_at_plateau(log: Iterable[Mapping[str, Any]], config: TrainConfig) -> bool:
    """Return whether training ends because of a plateau."""
    return config.until == "plateau" and plateaus_in_log(log, config) >= LAST_PLATEAU


def learning_rate_factor(config: TrainConfig, step: int, log: Sequence[Mapping[str, Any]], warmup_steps: int) -> float:
    """Return what the peak learning rate is multiplied by at a step: a warm-up, and `RATE_FACTOR` for each plateau.

    The factor depends on the log alone, so a resumed run has it too.

    Args:
        config: Training settings.
        step: Steps taken.
        log: Trainer's log.
        warmup_steps: Steps of the warm-up, along which the rate rises linearly.
    """
    warm_up = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return warm_up * RATE_FACTOR ** plateaus_in_log(log, config)


class Validation(TrainerCallback):
    """Measures the validation split during training, and ends training at the last plateau.

    The measurements are entries of Trainer's log, which its checkpoints hold. They come before the checkpoint of the
    same step.

    Args:
        measure: Returns the `accuracy` and `loss` of the model.
        config: Training settings.
    """

    def __init__(self, measure: Callable[[], Mapping[str, float]], config: TrainConfig) -> None:
        self.measure, self.config = measure, config

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure every `eval_steps` and after the last step; Trainer calls this.

        Raises:
            ValueError: If the loss is not finite.
        """
        step = state.global_step
        if step % self.config.eval_steps == 0 or step == state.max_steps:
            # A model that trains in bfloat16 holds weights of two dtypes, which autocast alone brings together.
            with (
                torch.autocast(args.device.type, torch.bfloat16, enabled=self.config.bf16),
                torch.compiler.set_stance("force_eager"),  # its batches and its cache would need graphs of their own
            ):
                scores = self.measure()
            require_finite("validation loss", scores["loss"], step, self.config)
            rate = kwargs["optimizer"].param_groups[0]["lr"]
            entry = {"step": step, ACCURACY: scores["accuracy"], LOSS: scores["loss"], "learning_rate": rate}
            state.log_history.append(entry)
            if stops_at_plateau(state.log_history, self.config):
                control.should_training_stop = control.should_save = True
        return control


def training_part(log: Sequence[dict[str, float]], config: TrainConfig) -> dict[str, Any]:
    """Return the `train` part of a record.

    Args:
        log: Trainer's log with the measurements of the validation split.
        config: Training settings.

    Returns:
        `log` without the measurements, `steps` taken, `stopped` ("plateau" or "max_steps"), and `validation`: the learning
        curve, None if it was not measured.
    """
    return {
        "log": [entry for entry in log if ACCURACY not in entry],
        "steps": log[-1]["step"],
        "stopped": "plateau" if stops_at_plateau(log, config) else "max_steps",
        "validation": learning_curve(log) or None,
    }


def learning_curve(log: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the measurements in a log as records hold them.

    Args:
        log: Trainer's log.

    Returns:
        `step`, `accuracy` (0 to 1), `loss` (nats per token) and `learning_rate` of each measurement.
    """
    return [
        {
            "step": entry["step"],
            "accuracy": entry[ACCURACY],
            "loss": entry[LOSS],
            "learning_rate": entry["learning_rate"],
        }
        for entry in log
        if ACCURACY in entry
    ]
