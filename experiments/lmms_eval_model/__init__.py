"""The models of this project in the lmms-eval harness, which holds the public benchmarks (docs/benchmarks.md).

lmms-eval is no dependency of the project. `model`, `manifest` and `video_questions` import it, so other packages import
those inside functions alone.
"""
