"""What is measured on a model that runs: activation statistics, captured requests, gradients."""
