"""Figure 12 of the paper: time over that of the base GEMV against k_chunk, one line per n_tb, one picture per kind of
layer.

The dotted line marks the knee of the paper's law for the rates measured in the same run, the grey line the law with the
fixed cost that the points show. Reads rows of run_profile.py.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import analytic
import session as sessions
from shapes import Layer
from timings import Timings, read_profile

from decdec import figure_style as style
from decdec.errors import UserError, run

SHOWN = (2, 4, 8, 16, 32)  # lines drawn where they are candidates, beside the one fastest at the largest k_chunk


def shown(n_tbs: Iterable[int], fastest: int) -> list[int]:
    """At most as many n_tb as there are line styles, the fastest among them."""
    chosen = [n for n in n_tbs if n in SHOWN and n != fastest][:len(style.LINES) - 1]
    return sorted([*chosen, fastest])


def draw(path: Path, layer: Layer, timings: Timings, dram_gb_s: float, link_gb_s: float) -> None:
    base = timings.base(layer)
    lines = {n_tb: points for n_tb, points in sorted(timings.points[layer].items()) if n_tb and points}
    if not lines:
        raise UserError(f"profile: has only the base time of {layer.label}; run run_profile.py")
    last = max(max(points) for points in lines.values())
    fastest = min(lines, key=lambda n_tb: lines[n_tb][max(lines[n_tb])] / max(lines[n_tb]))
    fixed = analytic.fitted_fixed_us(layer, lines[fastest].items(), base, link_gb_s)
    with style.figure(path, height=2.6) as (_, axes):
        for look, n_tb in zip(style.LINES, shown(lines, fastest)):
            points = {0: base} | lines[n_tb]
            axes.plot(sorted(points), [points[k] / base for k in sorted(points)], label=f"$n_{{tb}}$ = {n_tb}", **look)
        ks = range(1, last + 1)
        expected = [max(base, analytic.fetch_us(layer, k, link_gb_s, fixed)) / base for k in ks]
        axes.plot(ks, expected, color="0.6", linewidth=2.5, zorder=0, label=f"law, {fixed:.1f} us fixed")
        axes.axvline(analytic.knee(layer.bits, layer.residual_bits, dram_gb_s, link_gb_s), color="black", linewidth=0.8,
                     linestyle=(0, (1, 1)))
        axes.set_xlabel("$k_{chunk}$ (channels per 1024)")
        axes.set_ylabel("time over base GEMV")
        here = timings.conditions
        axes.set_title(f"{layer.label}, {layer.d_in}x{layer.d_out}\n{here.device}, {here.sms} SMs")
        axes.set_ylim(0.9, 1.05 * max(2.0, lines[fastest][max(lines[fastest])] / base))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sessions.add_arguments(parser)
    parser.add_argument("--sms", type=int, help="rows of so many SMs")
    parser.add_argument("--out", required=True, help="folder for the figures, one PDF and PNG per kind and bit width")
    arguments = parser.parse_args()
    shapes = sessions.model_shapes(arguments)
    session = sessions.saved_session(arguments, arguments.sms)
    timings = Timings(shapes.layers, session.conditions, read_profile(arguments.profile))
    for layer in shapes.layers:
        path = Path(arguments.out) / f"fig12_{layer.kind}_w{layer.bits}.pdf"
        draw(path, layer, timings, session.rates.dram_gb_s, session.rates.link_gb_s)
        print(f"wrote {path} and .png")


if __name__ == "__main__":
    run(main)
