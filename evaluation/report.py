"""One Markdown report of a results folder: every figure and table of the paper that has been made, with what to look for."""

import argparse
from pathlib import Path

from table import table

from decdec.errors import UserError, run
from decdec.files import atomic, read_rows

# (title, file without suffix or table, what the paper says it shows)
PARTS = (
    ("Figure 4: output error against restored channels", "fig04_error_curve",
     "Restoring channels in order of |x| removes the error about as fast as the sorted |x| falls; random order is far slower."),
    ("Figure 5: outliers over decoding steps", "fig05_outliers",
     "Outlier channels change from step to step; a static list finds about 20 % of them."),
    ("Figure 12: kernel time against k_chunk", "fig12_kernel_time",
     "Compensation is free up to a knee, then grows linearly; an n_tb of 8 to 16 reaches the knee that the link allows."),
    ("Figure 13: perplexity against k_chunk", "fig13_perplexity", "Perplexity falls monotonically with k_chunk, most at 3 bits."),
    ("Figure 14: BBH against k_chunk", "fig14_bbh", "Accuracy rises with k_chunk (paper: 23 subtasks of 8B and 14B models)."),
    ("Figure 15: MT-Bench against k_chunk", "fig15_mt_bench", "At 3 bits a clear gain from k_chunk 8 on, then flat; 4 bits flat."),
    ("Figure 16: selections", "fig16_selection", "DecDEC is close to exact selection, static needs 4 to 8 times the channels, random is "
                                                 "worst; DecDEC finds about 80 % of the true top k, static at most 30 %."),
    ("Figure 17: perplexity against time a token, client GPUs", "fig17_tuned", "2.5 to 5 % slow-down buy most of the gain."),
    ("Figure 18: perplexity against time a token, other GPUs", "fig18_tuned", "Gains carry over to other and to server GPUs."),
    ("Table 2: residual bits at equal traffic", "table2.md", "4 bits are best or nearly best in every group."),
    ("Table 3: what the tuner chooses", "table3.md", "k_chunk grows as the memory's rate falls relative to the link's."),
)


def section(folder: Path, title: str, file: str, claim: str) -> list[str]:
    path = folder / (file if file.endswith(".md") else f"{file}.png")
    lines = [f"## {title}", "", f"The paper: {claim}", ""]
    if not path.is_file():
        return [*lines, "Not made yet.", ""]
    if path.suffix == ".md":
        return [*lines, path.read_text(encoding="utf-8").strip(), ""]
    return [*lines, f"![{title}]({path.relative_to(folder)}) ([PDF]({file}.pdf))", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="results folder; the perplexity rows lie beside it as FOLDER.jsonl")
    folder = Path(parser.parse_args().folder)
    if not folder.is_dir():
        raise UserError(f"folder: expected a results folder, got {str(folder)!r}")
    rows = [row for row in read_rows(folder.with_name(f"{folder.name}.jsonl")) if row.get("bench") == "perplexity"]
    models = sorted({row["model"] for row in rows}) or [folder.name]
    lines = [f"# {', '.join(models)}: the paper's figures and tables", "", "Made by `evaluation/evaluate.sh`; every picture reads only the "
             "JSON lines beside it, which say what was measured with what.", ""]
    for title, file, claim in PARTS:
        lines += section(folder, title, file, claim)
    if rows:
        lines += ["## Perplexity rows", "", "```", *table(rows), "```", ""]
    with atomic(folder / "REPORT.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {folder / 'REPORT.md'}")


if __name__ == "__main__":
    run(main)
