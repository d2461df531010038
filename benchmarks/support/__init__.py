"""What every benchmark shares: `timing`, `memory` and `rows`, one idea a file.

Start a benchmark as a module from the repository root, `python -m benchmarks.<name>`: as a plain
file it would put `benchmarks/` first on the import path, where `kernels.py` hides the Hugging Face
library of that name, which transformers imports.
"""
