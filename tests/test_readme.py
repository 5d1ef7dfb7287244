"""The README's tables are the files under docs/results, word for word, and its links lead somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

BLOCKS = {"demo": "docs/results/demo/table.md", "seeds": "docs/results/seeds/table.md", "bank": "docs/results/bank/table.md"}


def test_tables_are_the_files(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, path in BLOCKS.items():
        block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)[1]
        tables = [line for line in block.splitlines() if line.startswith("|")]
        of_file = [line for line in (root / path).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        assert tables and tables == of_file[: len(tables)], f"README's block {name} differs from {path}"


def test_links_lead_somewhere(root):
    """Of the README and of every page."""
    for page in (root / "README.md", *root.glob("docs/**/*.md"), *root.glob("benchmarks/**/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(root)}: {target}"


def test_the_photographs_of_the_readme_train_and_leave_the_house(root, tmp_path):
    """Its block, word for word, in an empty folder, in a shell whose path has the environment's programs first."""
    block = re.search(r"<!-- photographs -->\n```\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "photos" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 50 and rows[-1]["clip"] < rows[0]["clip"]
    assert not (tmp_path / "runs" / "photos" / "skipped.jsonl").exists()
    assert {"curves.png", "residuals.png"} <= {file.name for file in (tmp_path / "photos-report").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} <= {file.name for file in (tmp_path / "photos-clip").iterdir()}
