"""From step to step: the learning rate, losses and norms that are out of line, the number of steps."""
import math
import re
from collections import deque
from statistics import fmean, pstdev

import pytest
from runs import SHARDS, log

from dev.run.flags import parse_flags
from dev.run.schedule import Outliers, require_finite, scheduled_learning_rate, z_score


def learning_rate(kind, peak, final, warmup, N, s):
    """FACTS: the four schedules"""
    low = peak * final
    if kind == "constant":
        return peak
    if s < warmup:
        return peak * (s + 1) / warmup
    if kind == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * (s - warmup) / (N - warmup))) * (peak - low)
    if kind == "linear":
        return peak - (s - warmup) / (N - warmup) * (peak - low)
    knee = int(0.8 * N)
    return peak if s < knee else low + (1 - math.sqrt((s - knee) / (N - knee))) * (peak - low)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup, N", [
    (0, 1), (0, 100), (1, 100), (10, 100), (90, 100), (700, 18865), (100, 100), (7, 9)])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_schedules(kind, warmup, N, final):
    flags = parse_flags(f"-k {kind} -u {warmup} -q {final} -l 6e-4".split())
    for step in {0, max(0, warmup - 1), min(warmup, N - 1), N // 2, int(0.8 * N) - (N > 1), int(0.8 * N), N - 1}:
        expected = learning_rate(kind, 6e-4, final, warmup, N, step)
        assert scheduled_learning_rate(flags, step, N) == pytest.approx(expected, rel=1e-9, abs=1e-18), step


def test_known_points_of_the_schedules():
    def rate(text, step, steps=100):
        return scheduled_learning_rate(parse_flags(f"-l 1 {text}".split()), step, steps)
    assert rate("-u 10 -q 0", 0) == 0.1 and rate("-u 10 -q 0", 9) == rate("-u 10 -q 0", 10) == 1
    assert rate("-u 10 -q 0", 55) == pytest.approx(0.5) and rate("-u 10 -q 0.2", 55) == pytest.approx(0.6)
    assert rate("-k linear -q 0", 25) == 0.75 and rate("-k linear -q 0.5", 50) == 0.75
    assert rate("-k wsd -q 0", 79) == rate("-k wsd -q 0", 80) == 1 and rate("-k wsd -q 0", 85) == 0.5
    assert rate("-k constant -u 10 -q 0", 0) == 1 and rate("-q 1", 57) == 1


def test_schedule_in_the_log(train, out):
    train("-x 10 -u 3 -q 0.1 -k linear -l 1e-2")
    rates = [re.search(r" lr:(\S+) ", line)[1] for line in log(out)]
    assert rates == [f"{learning_rate('linear', 1e-2, 0.1, 3, 10, s):.6f}" for s in range(10)]


def test_z_score(rng):
    values = rng.normal(3, 0.5, 400).tolist()
    values[200], values[350] = 30.0, -7.0
    window = deque(maxlen=128)
    scores = [z_score(value, window) for value in values]
    assert all(map(math.isnan, scores[:128])) and len(scores) == 400
    for i in range(128, 400):
        last = values[i - 127:i + 1]
        assert scores[i] == pytest.approx((values[i] - fmean(last)) / pstdev(last), rel=1e-9)
    assert scores[200] > 10 and scores[350] < -9
    same = deque(maxlen=128)
    assert [z_score(2.5, same) for _ in range(130)][128:] == [0, 0]


@pytest.mark.parametrize("loss_limit, norm_limit, far", [
    (0, 0, []), (5, 0, [200]), (0, 5, [250]), (5, 5, [200, 250]), (1e9, 1e9, []),
])
def test_outliers(rng, loss_limit, norm_limit, far):
    """Losses far above those before, or norms; one that is far below is none, nor is one among the first 128 steps."""
    losses, norms = rng.normal(3, 0.1, 300), rng.normal(1, 0.1, 300)
    losses[[100, 200]], losses[210], norms[250] = 30, -30, 9
    outliers, windows = Outliers(loss_limit, norm_limit), (deque(maxlen=128), deque(maxlen=128))
    for step, (loss, norm) in enumerate(zip(losses, norms)):
        scores = z_score(loss, windows[0]), z_score(norm, windows[1])
        assert outliers.far(loss, norm) == (step in far), step
        assert outliers.scores == pytest.approx(scores, nan_ok=True)
    assert outliers.windows == windows


def test_skipped_updates_leave_the_weights(train, out, tiny):
    """After 128 steps every update with a gradient norm above the mean's 0.01 deviations is skipped."""
    printed = train("-x 133 -n 1 -nk 6 -sg 0.01 -l 1e-4")
    lines = re.findall(r"^step (\d+)/\d+(?: \(.*?\))?: (.*)$", printed, re.MULTILINE)
    skipped = {int(step) for step, text in lines if "update skipped" in text}
    assert skipped and min(skipped) >= 128 and skipped != set(range(128, 133)), skipped
    for step in range(128, 133):
        same = (out / f"model_{step:08d}.bin").read_bytes() == (out / f"model_{step + 1:08d}.bin").read_bytes()
        assert same == (step in skipped)


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_what_is_no_number_is_an_error(loss, norm):
    with pytest.raises(ValueError, match=r"step 7: .*diverged\n---> HINT: "):
        require_finite(7, loss, norm)
    require_finite(7, 1e30, 0.0)


def test_one_epoch(train):
    steps = re.findall(r"^step (\d+)/\d+", train("-x -1 -d 32"), re.MULTILINE)
    assert len(steps) == sum(SHARDS) // 32
