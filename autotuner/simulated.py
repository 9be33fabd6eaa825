"""Times of a GPU that is not here, from its data sheet."""

import analytic
from datasheet import Sheet
from profiling import Sample
from shapes import Layer

# Shares of the advertised rates that kernels reach: measured on an H100, 2026-11-22 (2.96 of 3.36 TB/s, 50 of 64 GB/s).
DRAM_SHARE, LINK_SHARE = 0.88, 0.78


def simulated_rates(sheet: Sheet) -> analytic.Rates:
    return analytic.Rates(DRAM_SHARE * sheet.dram_gb_s, LINK_SHARE * sheet.link_gb_s, sheet.sms)


class SimulatedTimer:
    """Times by the analytic model with its fixed costs."""

    def __init__(self, rates: analytic.Rates):
        self.rates = rates

    def time(self, layer: Layer, n_tb: int, k_chunk: int) -> Sample:
        return Sample(round(analytic.compensated_us(layer, n_tb, k_chunk, self.rates), 4), 0.0, 1)
