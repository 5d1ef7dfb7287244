"""Package fastsds. Ranges are what should work; constraints.txt pins what was tested together."""
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

# Two folders of the source tree become parts of the package, and only that: they have no __init__.py and are never
# importable as `kernels` (the name of a PyPI package) or `configs`.
FOLDERS = {"fastsds.kernels": "kernels", "fastsds.configs": "configs"}


def version() -> str:
    for line in (ROOT / "fastsds" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("fastsds/__init__.py has no __version__")


def data_files(package: str) -> list[str]:
    """All files under a package's folder that are not Python, relative to that folder."""
    folder = ROOT / FOLDERS.get(package, package.replace(".", "/"))
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*"))
            if p.is_file() and p.suffix not in (".py", ".pyc") and "__pycache__" not in p.parts]


DATA = ["webdataset>=1,<2", "braceexpand>=0.1.7", "datasets>=4,<6", "pyarrow>=21"]  # shards, and Hugging Face data sets on disk
LOGS = ["tensorboard>=2.19", "wandb>=0.20"]
BENCH = ["pytest>=8.1", "pytest-benchmark>=5,<6", "scikit-image>=0.25"]  # whose photographs are fed

setup(
    name="fastsds",
    version=version(),
    description="Distil the reasoning of a frozen text-to-image diffusion model into CLIP, fast and in little memory",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["fastsds", "fastsds.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={name: data_files(name) for name in ("fastsds.world", "fastsds.configs", "fastsds.evaluation.suites")},
    entry_points={"console_scripts": ["fastsds=fastsds.cli:script"]},
    install_requires=[
        "torch>=2.11,<3",
        "torchvision>=0.26",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "numpy>=1.26",
        "packaging>=24",
        "pyyaml>=6",
        "safetensors>=0.8",
        "pillow>=11",
        "matplotlib>=3.9",
        "open_clip_torch>=3.3,<4",
        "transformers>=5.17,<6",
        "diffusers>=0.42,<1",
        "tokenizers>=0.22",
        "huggingface_hub>=1.32,<3",
        "deepspeed>=0.19,<0.20",
        "bitsandbytes>=0.50,<1",
        "xformers>=0.0.35",
    ],
    extras_require={
        # setuptools builds the wheel that the packaging tests look into
        "test": [
            *BENCH, *DATA, *LOGS,
            "ruff>=0.14", "scipy>=1.13", "setuptools>=77,<82",
        ],
        "bench": BENCH,
        "data": DATA,
        "logs": LOGS,
    },
)
