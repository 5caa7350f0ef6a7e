"""lance-quant: ByteDance's Lance in 4 bits, and a runtime that needs nothing of the official source.

    storage      files on disk                       lance        the model: decoder, tokens, tasks, loader
    formats      what the bytes mean                 kernels      what computes packed linears
    cpu          C and float32 products              inference    running a model over samples
    calibration  what is measured on a model         evaluation   how far a run is from its baseline
    methods      how weights are quantized           official     ByteDance's own source as a witness

The scripts at the root of the repository are thin over this package.
"""

__version__ = "0.1.0"
