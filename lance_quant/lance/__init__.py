"""Lance's runtime on plain PyTorch: no checkout of the official source, no flash-attn, no CUDA needed.

    settings        tasks, presets, sampling        progress progress bars
    config          sizes, file locations           vae      latents <-> pixels (diffusers)
    tokens          templates, splits, mRoPE        vit      patches -> tokens (transformers)
    mot             the two-expert decoder          loader   files -> modules, one tensor at a time
    cache           KV cache                        merge    q/k/v and gate/up as one matmul each
    linear          linears on CPUs                 runtime  all of it together
    understanding   greedy and sampled answers      steps    recurring steps, eager
    generation      rectified flow, guidance        compiled recurring steps, compiled; CUDA graphs

    media/          vision: pictures and frames -> patches     video: clips <-> files (PyAV)
                    samples: the official example files        inputs: what a caller holds -> frames
"""
