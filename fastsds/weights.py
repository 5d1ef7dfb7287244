"""Weights of other libraries' models, read with one clear error."""

from pathlib import Path

from fastsds import quiet
from fastsds.config import ConfigError


def open_safetensors(path: Path):
    """A lazy reader of one file: names and shapes cost its header, a tensor its own bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: truncated or damaged ({error}): fetch or copy it again") from error


def from_folder(kind, folder: Path, where: str, **options):
    """`kind.from_pretrained(folder)` of diffusers or transformers, never from the network.

    Raises: ConfigError that begins with `where`: whatever the library says, or the first tensor that lacks or does not fit.
    """
    options |= dict(local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)  # the report tells
    try:
        with quiet.loading():
            model, report = kind.from_pretrained(str(folder), **options)
    except Exception as error:  # of whatever kind: what is wrong is in the user's files
        raise ConfigError(f"{where}: {first_line(error)}") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ConfigError(f"{where}: tensor {name} is {tuple(found)}, by its config.json {tuple(expected)}")
    for name in sorted(report["missing_keys"]):
        raise ConfigError(f"{where}: tensor {name} is missing")
    return model


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
