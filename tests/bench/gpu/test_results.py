"""What `bench gpu` writes, and what breaks it off."""

import json
import time

import pytest
import torch

from bench.gpu import results

CPU = torch.device("cpu")


def test_what_takes_too_long_is_broken_off():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="not done in 0 s"), results.within(0.2):
        time.sleep(60)
    assert time.monotonic() - started < 55
    with results.within(60):
        pass
    time.sleep(0.01)  # nothing is left to go off


def test_steps_share_one_file(tmp_path):
    first = results.Sheet(tmp_path, "shapes", CPU)
    first.put("said", "passed")
    results.Sheet(tmp_path, "suite", CPU).put("said", "unfinished")
    results.Sheet(tmp_path, "shapes", CPU)  # begun again, and ended before it found something
    found = json.loads((tmp_path / results.FILE).read_text())
    assert found["suite"]["said"] == "unfinished" and set(found["shapes"]) == {"about"}
    (tmp_path / results.FILE).write_text("{")
    results.Sheet(tmp_path, "suite", CPU).put("said", "passed")
    assert set(json.loads((tmp_path / results.FILE).read_text())) == {"suite"}
