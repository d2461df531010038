"""The operations in Triton, one file each: kernels, what launches them, how to compile them ahead.

Importing a file here imports Triton; `cdpvae_kernels.dispatch` does so when a kernel is first used.
Every file ends with `specializations()`: the ways its kernels are compiled for the 8B shapes, which
`python -m cdpvae_kernels.resources` needs to count registers without a GPU.
"""
