"""How hiding depends on the SMs: time over that of the base GEMV against k_chunk, one line for each SM count of a
profile, one picture per kind of layer.

At each k_chunk the fastest n_tb counts. Reads rows of run_profile.py --sms.
"""

import argparse
from pathlib import Path

import numpy as np
import session as sessions
from quality import fastest
from shapes import Layer
from timings import Timings, read_profile

from decdec import figure_style as style
from decdec.errors import UserError, run


def normalised(timings: Timings, layer: Layer) -> np.ndarray:
    """Time over the base time at k_chunk 0, 1, ..., each with its fastest n_tb; NaN where nothing was measured."""
    least, _ = fastest(timings.times()[layer])
    return np.where(np.isinf(least), np.nan, least) / least[0]


def draw(path: Path, layer: Layer, of_sms: dict[int, Timings]) -> None:
    curves = {sms: normalised(timings, layer) for sms, timings in sorted(of_sms.items())}
    with style.figure(path, height=2.6) as (_, axes):
        for look, (sms, curve) in zip(style.LINES, curves.items()):
            axes.plot(np.arange(len(curve)), curve, label=f"{sms} SMs, base {of_sms[sms].base(layer):.0f} us",
                      **look | {"marker": None})
        axes.set_xlabel("$k_{chunk}$ (channels per 1024)")
        axes.set_ylabel("time over base GEMV")
        axes.set_title(f"{layer.label}, {layer.d_in}x{layer.d_out}\n{next(iter(of_sms.values())).conditions.device}")
        axes.set_ylim(0.95, 2.5)
        axes.set_xlim(0, np.nanmax([np.searchsorted(np.nan_to_num(curve), 2.5) for curve in curves.values()]))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sessions.add_arguments(parser)
    parser.add_argument("--out", required=True, help="folder for the figures, one PDF and PNG per kind and bit width")
    arguments = parser.parse_args()
    shapes, rows = sessions.model_shapes(arguments), read_profile(arguments.profile)
    counts = sorted({row["sms"] for row in rows if row["what"] == "rates"})
    if not 2 <= len(counts) <= len(style.LINES):
        raise UserError(f"profile: {arguments.profile}: expected rows of 2 to {len(style.LINES)} SM counts, got "
                        f"{', '.join(map(str, counts)) or 'none'}; run run_profile.py --sms")
    of_sms = {sms: Timings(shapes.layers, sessions.saved_session(arguments, sms).conditions, rows) for sms in counts}
    for layer in shapes.layers:
        path = Path(arguments.out) / f"few_sms_{layer.kind}_w{layer.bits}.pdf"
        draw(path, layer, of_sms)
        print(f"wrote {path} and .png")


if __name__ == "__main__":
    run(main)
