"""The README's tables are the files under docs/results, word for word, and its links lead somewhere."""

import re

BLOCKS = {"demo": "docs/results/demo/table.md", "seeds": "docs/results/seeds/table.md", "bank": "docs/results/bank/table.md"}


def test_tables_are_the_files(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, path in BLOCKS.items():
        block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)[1]
        tables = [line for line in block.splitlines() if line.startswith("|")]
        of_file = [line for line in (root / path).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        assert tables and tables == of_file[: len(tables)], f"README's block {name} differs from {path}"


def test_links_lead_somewhere(root):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (root / "README.md").read_text(encoding="utf-8")):
        assert (root / target).exists(), target
