"""A page from a benchmark run: every number on it comes from the run."""

import importlib.util


def run(name, params, median, **extra):
    return {"name": name, "params": params, "stats": {"median": median}, "extra_info": extra}


def test_a_page_from_a_run(root):
    spec = importlib.util.spec_from_file_location("report", root / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
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
