"""A vllm-omni plugin (entry point group `vllm_omni.general_plugins`) for ByteDance's Lance.

`register` runs in every process of a server, perhaps more than once. It patches the Lance pipeline of the versions in
KNOWN so that float and 4-bit checkpoints load (loading.py), requests are answered as the official code answers them
(tasks.py) and clips can be asked for over HTTP (server.py). On other versions it warns and leaves everything as it is.
"""

import importlib.metadata
import logging

KNOWN = ("0.30.0",)

log = logging.getLogger("vllm.plugins.lance")  # below "vllm", whose handler shows it


def vllm_omni_version() -> str | None:
    """The installed vllm-omni's version without a build's suffix; None where there is none."""
    try:
        return importlib.metadata.version("vllm-omni").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def register() -> None:
    """Patch vllm-omni, once; see the module."""
    version = vllm_omni_version()
    if version is None:  # plain vllm
        return
    if version not in KNOWN:
        log.warning("vllm-omni-lance knows vllm-omni %s, not %s: nothing is patched; 4-bit Lance will not load",
                    ", ".join(KNOWN), version)
        return
    from vllm_omni_lance import loading, server, tasks

    for part in (loading, tasks, server):
        part.patch()
