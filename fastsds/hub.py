"""Files of the Hugging Face hub: from this disk first, fetched only where a hub id was named, refused within seconds."""

from contextlib import contextmanager
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.weights import first_line

HUB = "hf-hub:"
PATIENCE = 5.0  # seconds that the hub has for its first answer; huggingface_hub alone would ask six times


@contextmanager
def offline():
    """Within the block nothing asks the hub, whichever library is called: what is on this disk is found."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch(repo: str, names: tuple[str, ...], where: str, hint: str = "") -> Path:
    """The path of the first of `names` that a repository has: on this disk, or fetched.

    Raises: ConfigError that names what is missing and what to do; within PATIENCE where the hub does not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, local_files_only=True))
            except EntryNotFoundError:
                pass
        reach(repo, names[0], where)
        for name in names:
            try:
                return Path(hf_hub_download(repo, name))
            except EntryNotFoundError:
                pass
    except ConfigError:
        raise
    except Exception as error:  # a name that is none, a network that breaks off, a full disk
        raise ConfigError(f"{where}: {HUB}{repo}: {first_line(error)}") from error
    raise ConfigError(f"{where}: {HUB}{repo} has no {' and no '.join(names)}{hint}")


def reach(repo: str, name: str, where: str, missing: str | None = None) -> None:
    """Raise ConfigError unless the hub answers for a file of a repository. missing: what of it is not on this disk."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repo, name), timeout=PATIENCE)
    except EntryNotFoundError:
        return
    except RepositoryNotFoundError as error:
        raise ConfigError(f"{where}: the hub has no {repo}, or it is closed to this machine's token") from error
    except Exception as error:  # of whatever kind the network's library has
        off = isinstance(error, OfflineModeIsEnabled)
        why = "the hub is not to be asked" if off else f"the hub cannot be reached ({first_line(error)})"
        raise ConfigError(
            f"{where}: {missing or name} of {HUB}{repo} is not on this disk, and {why}: fetch it where there is a network "
            f"(hf download {repo}), or name a local folder"
        ) from error
