"""Lance on plain PyTorch: no checkout of the official source, no flash-attn, no CUDA needed.

    config          sizes, file locations           vision   pictures and frames -> patches
    tokens          templates, splits, positions    video    clips <-> files (PyAV)
    mot             the two-expert decoder          vit      patches -> tokens (transformers)
    cache           keys and values of the past     vae      latents <-> pixels (diffusers)
    understanding   greedy answers                  loader   files -> modules, one tensor at a time
    generation      rectified flow, guidance        samples  the seven tasks, the official example files
    pipeline        all of it together              merge    q/k/v and gate/up as one matmul each
    steps           steps that recur, eager         compiled compiled steps, CUDA graphs
"""
