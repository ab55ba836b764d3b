"""Measure a trained model on held-out cells, beside baselines, and write the report."""

from sedd.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
