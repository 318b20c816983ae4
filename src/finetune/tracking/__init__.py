"""training figures, stage outputs -> MLflow runs and registered versions; the only modules that import mlflow.

The pipeline's files are the truth: MLflow may be down while a model trains, and is filled from them afterwards.
`TrainingMirror` is what a training holds. It imports no mlflow: that takes seconds before the first step.
"""

import os

from finetune.tracking.mirror import TrainingMirror

__all__ = ["TrainingMirror"]

# Read while mlflow is imported, by whichever module of this package comes first. Its check of requirements asks pip,
# which fails offline.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING"] = "false"
os.environ["MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# A bar of its own for every small file.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# SQLite opens a database on a disk that is read-only for reading, and a pool would keep that connection for ever.
os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
