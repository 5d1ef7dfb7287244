"""A page from a benchmark run: every number on it comes from the run."""

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F

from fastsds import testing


@pytest.fixture
def report(root):
    spec = importlib.util.spec_from_file_location("report", root / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, params, median, **extra):
    return {"name": name, "params": params, "stats": {"median": median}, "extra_info": extra}


def test_a_page_from_a_run(report):
    on_gpu = dict(bytes=100, percent_of_copy=81.6, peak_memory=3 << 20, launches=4, device_ms={"median": 0.25})
    on_cpu = dict(bytes=1, percent_of_copy=7.2)
    case = {"shape": [8, 4], "dtype": "UNSERIALIZABLE[torch.bfloat16]"}
    data = {
        "machine_info": {"gpu": "some GPU", "torch": "2", "triton": "3", "threads": 1},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [
            run("test_dmd_loss[x]", {"provider": "ours", **case}, 9.0, **on_gpu),
            run("test_dmd_loss[y]", {"provider": "eager", **case}, 0.002, **on_cpu),
            run("test_share_of_a_step[a]", {"provider": "ours"}, 0.001, bytes=0),
            run("test_share_of_a_step[b]", {"provider": "unet_forward"}, 0.099, bytes=0),
        ],
    }
    page = report.page(data)
    assert page.startswith("some GPU; torch 2, triton 3; commit 0123456789ab.\n")
    assert "| dmd_loss | 8x4 bfloat16 | 0.25 ms, 82 %, 3 MiB, 4 launches | 2 ms, 7.2 % |  |" in page
    data["machine_info"]["gpu"] = None
    assert "nothing here says anything of the kernels" in report.page(data) and "kernels" not in page
    assert page.endswith("Noise and loss are 1 % of a step of UNet forward, noise and loss.\n")


def test_what_is_not_measured_is_not_said(report, tmp_path, monkeypatch, capsys):
    """A first provider that did not fit; a README table, or a page, with no run behind it."""
    timed = {"ms": 3.0, "samples_per_s": 2.0, "tflop_per_s": 1.0, "percent_of_peak": 50.0, "floor_ms": 1.5}
    providers = [{"provider": "eager", "skipped": "out of memory"}, {"provider": "ours", **timed, "peak_memory": 2**20}]
    rows = report.side_by_side({"extra_info": {"providers": providers}})
    assert [cell.strip() for cell in rows[-1].split("|")[1:4]] == ["ours", "3", "2"] and "out of memory" in rows[2]
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("<!-- step -->\n<!-- /step -->\n")
    assert report.main(["check"]) == 0
    (tmp_path / "README.md").write_text("<!-- step -->\n| ours | a million |\n<!-- /step -->\n")
    assert report.main(["check"]) == 1 and "README.md" in capsys.readouterr().out
    runs = [run("test_step", None, 1.0, providers=providers)]
    data = {"machine_info": {"gpu": "G", "torch": "2", "triton": "3"}, "benchmarks": runs}
    (tmp_path / "results" / "g.json").write_text(json.dumps(data))
    assert report.main([]) == 0 and report.main(["check"]) == 0 and "| ours | 3 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "results" / "cpu.md").write_text("| ours | a million |\n")
    with pytest.raises(SystemExit, match="no run behind cpu.md"):
        report.main(["check"])


def test_the_flop_of_a_floor_have_attention_in_them():
    """q k^T and p v forward; two products for each backward; the CPU's own kernel counts as nothing."""
    q = torch.randn(2, 3, 64, 16, requires_grad=True)
    product = 2 * 2 * 3 * 64 * 64 * 16
    assert testing.count_flop(torch.no_grad()(lambda: F.scaled_dot_product_attention(q, q, q))) == 2 * product
    assert testing.count_flop(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 6 * product


def test_what_is_kept_says_what_the_pages_and_the_readme_say(report, root, capsys):
    """`benchmarks/report.py check`: every table is made from benchmarks/results/*.json."""
    assert report.main(["check"]) == 0, capsys.readouterr().out
    assert (root / "benchmarks" / "results" / "cpu.json").is_file()
    text = (root / "README.md").read_text(encoding="utf-8")
    for mark in report.BLOCKS:
        assert f"<!-- {mark} -->\n|" not in text and f"<!-- {mark} -->\n<!--" not in text, f"nothing is said under {mark}"
