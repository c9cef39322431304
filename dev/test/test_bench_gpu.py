"""What dev/bench_gpu.py says about what its workers find, and the plot of it: on recorded figures, without a GPU."""
import json

import pytest

from dev import bench_gpu
from dev.doc import plot_bench

OURS = {"times": [0.1167, 0.1160, 0.1171], "first": 5.2, "peak": 989.4e12, "copy": 2.8e12, "flops": 5.6e13,
        "memory": 38 << 30, "gpu": "NVIDIA H100 80GB HBM3",
        "kernels": {"fc forward": [12.0, 12, 7.4e12, 1 << 30], "gelu_forward": [2.0, 12, 0, 2_800_000_000]}}
PYTORCH = {"times": [0.1434, 0.1431], "version": "2.11", "attention": ["aten::_flash_attention_forward"],
           "memory": 45 << 30}


@pytest.fixture
def measured(monkeypatch, tmp_path, capsys):
    """(what is printed, the file) where PyTorch with cuDNN's attention fails"""
    asked = []

    def ask(who, *args, **variables):
        asked.append((who, variables.get("NUMBA_CACHE_DIR")))
        return {"ours": OURS, "flash": PYTORCH, "cudnn": None}[who]
    monkeypatch.setattr(bench_gpu, "ask", ask)
    path = tmp_path / "bench_gpu.json"
    bench_gpu.main(["--runs", "d12:64", "--torch", "--kernels", "--output", str(path)])
    cold, warm = asked[:2]
    assert cold == warm and cold[1]  # one cache, which is empty at first
    assert [who for who, _ in asked[2:]] == ["ours", "flash", "cudnn", "ours"]
    return capsys.readouterr().out, path


def test_lines(measured):
    out, path = measured
    assert "d12 B=64 first step after 5.2 s, cold" in out and "5.2 s, warm" in out
    assert "ours       median   116.70 ms, best   116.00,    561,577 tok/s, 38.0 GiB, 48.5 % of NVIDIA H100" in out
    assert "PyTorch 2.11: aten::_flash_attention_forward" in out and "45.0 GiB" in out
    assert "ours are 1.228 times as fast as PyTorch with flash" in out and "with cudnn" not in out
    fc, gelu = (line for line in out.splitlines() if " x " in line)
    assert fc.split()[:2] == ["fc", "forward"] and fc.endswith("617 TFLOP/s,  62 % of its ceiling")
    assert gelu.endswith("14.3 % " + "    1400 GB/s,  50 % of its ceiling")
    row, = json.loads(path.read_text())["runs"]
    assert row["memory"] == {"ours": 38 << 30, "flash": 45 << 30}


def test_plot(measured, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "gpu.svg"
    plot_bench.main([str(measured[1]), "-o", str(picture)])
    drawn = picture.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("NVIDIA H100 80GB HBM3; PyTorch 2.11", "562k", "457k"))
