"""A small file of `fastsds reproduce`: two seeds, two sizes, two arms and one from a bank, in the embedded world."""

from pathlib import Path

SMALL = """
seeds: 2
pairs: [16, all]
sets: {steps: 4, log_every: 2, eval.suite: none, data.batch: 8, data.accumulation: 1, data.samples: 32, optimizer.lr: 1.0e-4}
backbones:
  world: {}
arms:
  clip: {label: L_CLIP, sets: {loss.lambda: 0}}
  sds: {label: L_CLIP + L_SDS, against: [clip]}
  banked: {sets: {loss.gradient: amortised, bank.draws: 1}, against: [clip, sds]}
evaluation:
  world_test:
    options: {items: 8}
    headline: [seen/text, test/text, test/group, test/swap_object, test/retrieval, test/reading]
    claims: [test/text, test/swap_object]
    zero_shot: [test/retrieval]
"""


def writer(folder: Path):
    """write(text, (old, new), ...) -> the path of a file with so many changes, each of which must find its place."""

    def write(text: str = SMALL, *changes: tuple[str, str]) -> Path:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (folder / "mine.yaml").write_text(text)
        return folder / "mine.yaml"

    return write
