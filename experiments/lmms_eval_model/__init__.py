"""The models of this project as a model of the lmms-eval harness, which holds the public benchmarks (docs/benchmarks.md).

lmms-eval is no dependency of the project, so no other package imports this one while a module loads.
"""
