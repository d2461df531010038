"""Triton kernels run on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported for the first time, by whichever test
module comes first. The variable is taken away again so that processes the tests start do not
inherit it.
"""

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    del os.environ["TRITON_INTERPRET"]
    triton.knobs.runtime.interpret = True

# Fixtures that several folders use: texts and a tokenizer, a small network, a small run.
# Where cdpvae's own dependencies are missing, as on a machine that has torch alone, the kernels
# can be tested all the same.
pytest_plugins = ["support.texts", "support.small_model", "support.small_run"]
if not all(find_spec(name) for name in ("pydantic", "transformers", "peft", "tyro", "deepspeed")):
    pytest_plugins = []
