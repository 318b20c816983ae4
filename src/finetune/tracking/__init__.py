"""training figures, stage outputs -> MLflow runs and registered versions; the only modules that import mlflow.

The pipeline's files are the truth: MLflow may be down while a model trains, and is filled from them afterwards.
`TrainingMirror` is what a training holds. It imports no mlflow: that takes seconds before the first step.
"""

from finetune.tracking.mirror import TrainingMirror

__all__ = ["TrainingMirror"]
