"""Running a loaded model over the samples of a task."""
