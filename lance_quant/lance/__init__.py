"""Lance on plain PyTorch: no checkout of the official source, no flash-attn, no CUDA needed.

    config          sizes, file locations           vision   pictures -> patches
    tokens          templates, splits, positions    vit      patches -> tokens (transformers)
    mot             the two-expert decoder          vae      latents -> pixels (diffusers)
    cache           keys and values of the past     loader   files -> modules, one tensor at a time
    understanding   greedy answers                  samples  the official example files
    generation      rectified flow, guidance        pipeline all of it together
"""
