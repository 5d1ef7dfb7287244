"""fastsds: distil the reasoning of a frozen text-to-image diffusion model into CLIP, fast and in little memory."""
from pathlib import Path

from fastsds import quiet

__version__ = "0.1.0"

# In a wheel the kernels are installed as fastsds/kernels. In a source tree, and in an editable install, they lie beside
# this package, in a top-level `kernels/` without __init__.py: it is found as fastsds.kernels through this path, and never
# hides the PyPI package `kernels`.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

quiet.install()
