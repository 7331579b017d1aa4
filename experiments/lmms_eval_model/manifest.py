"""The entry point by which lmms-eval finds the model: `lmms-eval --model llava_mini`.

lmms-eval drops all plug-ins if one entry point fails, so this module imports nothing but the manifest's class.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MODEL_NAME = "llava_mini"
"""The text of `--model`, and the key of a task's own prompts for this model."""

# A chat class cannot score given answers: lmms-eval asserts that such tasks generate text.
MANIFEST = ModelManifest(MODEL_NAME, simple_class_path="experiments.lmms_eval_model.model.PretrainedModel")
