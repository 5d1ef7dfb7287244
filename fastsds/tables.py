"""Tables of cells: for the terminal, and as markdown."""

import re
import textwrap


def as_text(header: list[str], rows: list[list[str]], widest: int = 12) -> str:
    """A table for the terminal: headings wrapped, words to the left, numbers to the right."""
    columns = range(len(header))
    body = [[row[c] for row in rows] for c in columns]
    widths = [max(map(len, [*body[c], *header[c].split()])) for c in columns]
    titles = [textwrap.wrap(header[c], max(widths[c], widest)) for c in columns]
    widths = [max(widths[c], *map(len, titles[c])) for c in columns]
    depth = max(map(len, titles))
    words = [any(re.search(r"[a-z]{2}", cell) for cell in body[c]) for c in columns]

    def line(cells):
        placed = (x.ljust(w) if word else x.rjust(w) for x, w, word in zip(cells, widths, words, strict=True))
        return "  ".join(placed).rstrip()

    head = [line([([""] * (depth - len(t)) + t)[k] for t in titles]) for k in range(depth)]
    return "\n".join([*head, "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row).replace("+-", "±") + " |" for row in cells)
