"""Running a model: Pipeline, the Python interface, and what the scripts run over the samples of a task."""
