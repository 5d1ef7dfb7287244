"""Silence the lines that third-party packages print and that nobody can act on. This is the one place that does it.

Each entry of `NOISE` names one logger and the beginning of one message; everything else, errors above all, passes.
`FASTSDS_VERBOSE=1` in the environment brings all of it back.

What cannot be silenced from here: the lines of the `deepspeed` launcher ("cmd = ...", "WORLD INFO DICT", "process N
spawned"). It is a process of its own that runs before this package is imported. `python -m fastsds.train` has no launcher.
"""
import contextlib
import logging
import os
import warnings

NOISE = (
    # logger                            beginning of the message                    why nobody can act on it
    ("xformers", "WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions"),     # its torch kernels do not need them
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),      # 4-bit matmul on the CPU: not used
    ("DeepSpeed", "Setting accelerator to CPU"),                                    # there is no GPU: known
    ("DeepSpeed", "**** You are using ZeRO with an untested optimizer"),            # the configs allow it, tests cover it
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),                      # a CUDA folder, no GPU: known
    ("torch.distributed.elastic.multiprocessing.redirects", "NOTE: Redirects are currently not supported"),
)


class _Drop(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def verbose() -> bool:
    """Whether the user asked for all the noise: FASTSDS_VERBOSE is set, and not to 0."""
    return os.environ.get("FASTSDS_VERBOSE", "0") not in ("", "0")


def install() -> None:
    """Put one filter on each logger in `NOISE`, and one on Pillow's warnings: it has one for many an image, and reads it.

    Imports none of the packages; safe to call twice.
    """
    if verbose():
        return
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for name in {name for name, _ in NOISE}:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Drop) for f in logger.filters):
            logger.addFilter(_Drop(tuple(beginning for n, beginning in NOISE if n == name)))


@contextlib.contextmanager
def loading():
    """Within the block, reading local weights draws no bar, and nothing warns of tensors that lack or do not fit, nor of a
    model without weights: who loads raises one error for them. Errors and downloads are untouched.
    """
    if verbose():
        yield
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    def no_bar(factory, args, kwargs):
        return transformers_logging.EmptyTqdm(*args, **kwargs)

    libraries = (diffusers_logging, transformers_logging)
    levels, bars = [library.get_verbosity() for library in libraries], diffusers_logging.is_progress_bar_enabled()
    before = transformers_logging.set_tqdm_hook(no_bar)
    root = logging.getLogger()                                        # open_clip's warnings
    level = root.level
    try:
        diffusers_logging.disable_progress_bar()
        for library in libraries:
            library.set_verbosity_error()
        root.setLevel(max(level, logging.ERROR))
        yield
    finally:
        root.setLevel(level)
        for library, verbosity in zip(libraries, levels):
            library.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(before)
        if bars:
            diffusers_logging.enable_progress_bar()
