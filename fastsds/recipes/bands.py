"""How far the teacher's answer is from the noise, by noise level: means since they were last asked for, over all ranks."""

import math

import torch

from fastsds.schedule import log_snr

BANDS = 8


class NoiseBands:
    """Means of a residual in equal bands of log SNR between `low` and `high`; one band where these are equal.

    Sums are kept in float64 where the residuals are: the host waits for nothing before `means`.
    """

    def __init__(self, low: float, high: float):
        self.count = BANDS if high > low else 1
        self.edges = torch.linspace(low, high, self.count + 1, dtype=torch.float64)
        self.sums: torch.Tensor | None = None  # [3, bands]: samples, residuals, weighted residuals

    def names(self) -> list[str]:
        """What a band is called: its edges, to as many places as tell them apart: "-3.12_-2.47"."""
        width = float(self.edges[1] - self.edges[0])
        places = max(2, 1 - math.floor(math.log10(width))) if width > 0 else 2
        low, high = self.edges[:-1].tolist(), self.edges[1:].tolist()
        return [f"{a:.{places}f}_{b:.{places}f}" for a, b in zip(low, high, strict=True)]

    @torch.no_grad()
    def add(self, abar: torch.Tensor, residual: torch.Tensor, weighted: torch.Tensor) -> None:
        """Count samples in. What lies past an end (SNR 0) is in the band there. Shapes: all [b]."""
        self.edges = self.edges.to(abar.device)
        band = torch.bucketize(log_snr(abar), self.edges[1:-1], right=True)
        inside = band[:, None] == torch.arange(self.count, device=abar.device)  # [b, bands]
        rows = torch.stack([torch.ones_like(abar, dtype=torch.float64), residual.double(), weighted.double()])
        sums = torch.where(inside, rows[:, :, None], 0.0).sum(dim=1)
        self.sums = sums if self.sums is None else self.sums + sums

    def whole(self, world_size: int = 1) -> torch.Tensor | None:
        """The sums of all ranks, or None where no sample was counted. Collective. Shapes: float64 [3, bands]."""
        if self.sums is None or world_size == 1:
            return self.sums
        sums = self.sums.clone()
        torch.distributed.all_reduce(sums)
        return sums

    def means(self, world_size: int = 1) -> dict[str, torch.Tensor]:
        """Each band's mean residual and mean weighted residual, bands without a sample left out; then start anew.

        Collective; the host waits. Returns: "residual/LOW_HIGH" and "weighted/LOW_HIGH" -> 0-dim.
        """
        sums, self.sums = self.whole(world_size), None
        if sums is None:
            return {}
        means = {}
        for band, (name, samples) in enumerate(zip(self.names(), sums[0].tolist(), strict=True)):
            if samples:
                means |= {f"residual/{name}": sums[1, band] / samples, f"weighted/{name}": sums[2, band] / samples}
        return means
