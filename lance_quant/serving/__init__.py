"""Serving elsewhere: packed weights in the layouts that vLLM and vllm-omni load."""
