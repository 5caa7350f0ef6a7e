"""Stands in for torchaudio, whose wheel needs CUDA: vllm-omni's server imports it, and Lance makes no sound."""
