"""Users' errors, processes, seeds: what every entry point stands on."""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import utils
from utils import (
    Interruptible,
    Preempted,
    UserError,
    check_ranks_agree,
    checksum,
    first_line,
    gather_over_ranks,
    init_processes,
    is_main_process,
    mean_over_ranks,
    mixed_seed,
    progress_bar,
    reduce_sum,
    run_program,
    say,
    seed_everything,
    stop_if_asked,
    stop_signals,
    world,
)

# ---------------------------------------------------------------------------------------------------------------------
# Errors


def ends(monkeypatch, error: BaseException) -> int:
    """The exit code of a program that ends in this error."""
    monkeypatch.setattr(sys, "argv", ["folder/main.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_program(main)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such model"), "main.py: error: no such model"),
        (UserError("Traceback: a worker\n  said\nutils.UserError: bad image x.png"), "main.py: error: bad image x.png"),
        (OSError(errno.ENOSPC, "No space left on device", "f.pth"), "main.py: error: cannot write f.pth: No space"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write to the output folder: Permission denied"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "a data loading process died.*--workers"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, error, line):
    assert ends(monkeypatch, error) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(line, err)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), FileNotFoundError(errno.ENOENT, "gone")])
def test_an_error_of_our_own_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_program(main)


def test_a_program_that_ends_well_says_nothing(capsys):
    run_program(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_first_line():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_a_stop_signal_is_heeded_between_batches(monkeypatch, capsys):
    monkeypatch.setattr(utils, "_stop_asked", [])
    monkeypatch.setattr(sys, "argv", ["main.py"])
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def main():
        with stop_signals():
            batches = Interruptible([1, 2, 3])
            assert len(batches) == 3
            for batch in batches:
                seen.append(batch)
                if batch == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

    run_program(main)
    assert seen == [1, 2]
    assert capsys.readouterr().out == "main.py: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_stops_where_no_signal_came(monkeypatch):
    monkeypatch.setattr(utils, "_stop_asked", [])
    stop_if_asked()
    utils._stop_asked.append("SIGUSR1")
    with pytest.raises(Preempted, match="SIGUSR1"):
        stop_if_asked()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.parametrize(
    ("device", "message"),
    [("toaster", "--device toaster: not a device"), ("cuda", "--device cuda: this PyTorch"), ("cuda:1", "cuda:1")],
)
def test_a_device_that_is_not_there(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        init_processes(argparse.Namespace(device=device))


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_plain_process_on_the_cpu(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = argparse.Namespace(device=device)
    assert init_processes(args) == torch.device("cpu")
    assert (args.rank, args.world_size, args.distributed) == (0, 1, False)


def test_one_process_is_all_ranks(capsys):
    assert world() == (0, 1)
    assert is_main_process()
    tensor = torch.arange(3.0)
    reduce_sum(tensor)
    assert tensor.tolist() == [0, 1, 2]
    assert gather_over_ranks([1.0, 2.0]) == [[1.0, 2.0]]
    assert mean_over_ranks({"loss": 0.5, "accuracy": 0.25}) == {"loss": 0.5, "accuracy": 0.25}
    check_ranks_agree("weights", 5)
    say("one", 2)
    assert capsys.readouterr().out == "one 2\n"
    assert list(progress_bar([1, 2], "batches")) == [1, 2]


def test_several_processes(two_ranks):
    for rank in two_ranks:
        found = rank["processes"]
        assert found["gathered"] == [[0.0, 0.5], [1.0, 1.5]]
        assert found["means"] == {"a": 0.5, "b": 1.0}
        assert found["sums"] == [1.0, 3.0]
        assert found["odd"].startswith("weights of rank 1 differ from those of rank 0")
    assert [rank["processes"]["world"] for rank in two_ranks] == [(0, 2), (1, 2)]
    assert [rank["processes"]["said"] for rank in two_ranks] == ["hello\n", ""]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_a_checksum_tells_a_bit_and_a_place(dtype):
    tensors = [torch.arange(7).to(dtype), torch.arange(6).view(2, 3).mT.to(dtype), torch.ones((), dtype=dtype)]
    known = checksum(tensors)
    assert known == checksum([tensor.clone() for tensor in tensors])
    assert 0 <= known < 2**53
    changed = [tensor.clone() for tensor in tensors]
    changed[0][3] += 1
    assert checksum(changed) != known
    swapped = [tensors[0][[1, 0, 2, 3, 4, 5, 6]], *tensors[1:]]
    assert checksum(swapped) != known
    assert checksum([tensors[1], tensors[0], tensors[2]]) != known


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=5), st.data())
def test_a_mixed_seed_depends_on_every_number_and_on_their_order(key, draw):
    seed = mixed_seed(*key)
    assert seed == mixed_seed(*key)
    assert 0 <= seed < 2**63
    place = draw.draw(st.integers(0, len(key) - 1))
    other = [*key]
    other[place] = draw.draw(st.integers(0, 2**32 - 1).filter(lambda number: number != key[place]))
    assert mixed_seed(*other) != seed
    turned = [*key[1:], key[0]]
    assert (mixed_seed(*turned) == seed) == (turned == key)


def test_a_longer_key_is_another_key():
    """A seed of (5,) and one of (5, 0) are drawn for different things."""
    assert len({mixed_seed(5), mixed_seed(5, 0), mixed_seed(5, 0, 0)}) == 3


def test_seeding_seeds_all_generators():
    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    seed_everything(1, 2)
    first = drawn()
    seed_everything(2, 1)
    assert all(one != other for one, other in zip(drawn(), first, strict=True))
    seed_everything(1, 2)
    assert drawn() == first
