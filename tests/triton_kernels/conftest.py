"""The kernels run in Triton's interpreter, on CPU tensors; the switch must be set before they are imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
