# SPDX-License-Identifier: Apache-2.0
"""Rules of objects that follow from how their classes are written."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.runtime.ownership import Exclusive, exclusive, lasting, write_anyway

MAKES_NO_CALL = {"time_stages", "stage_seconds", "handle_of"}


@pytest.mark.parametrize("name", ["ExpertParallel", "HighThroughput", "OneSided"])
def test_every_public_method_is_exclusive(name: str) -> None:
    methods = dict(inspect.getmembers(getattr(moegen, name), inspect.isfunction))
    public = {each for each in methods if not each.startswith("_")} - MAKES_NO_CALL
    assert {"dispatch", "combine", "warmup", "check", "synchronize", "destroy"} <= public
    assert [each for each in public if not hasattr(methods[each], "__wrapped__")] == []


class Counter(Exclusive):
    """Adds one in `add`, while `during` runs."""

    def __init__(self) -> None:
        self.number = 0

    @exclusive
    def add(self, during: Any = lambda: None) -> int:
        during()
        self.number += 1
        return self.number


def test_the_same_thread_may_enter_again() -> None:
    counter = Counter()
    assert counter.add(counter.add) == 2


def test_another_thread_is_refused_until_the_call_has_returned_or_failed() -> None:
    counter, refused = Counter(), []

    def other() -> None:
        try:
            counter.add()
        except errors.BusyError as error:
            refused.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    def fails() -> None:
        in_a_thread()
        raise KeyError

    with pytest.raises(KeyError):
        counter.add(fails)
    assert counter.number == 0 and len(refused) == 1
    assert refused[0].startswith("this Counter is being used by another thread, so that add() did nothing")
    in_a_thread()
    assert counter.number == 1 and len(refused) == 1


def test_copies_are_refused() -> None:
    with pytest.raises(TypeError, match="a moegen Counter belongs to its process and its ranks; it cannot be pickled"):
        copy.deepcopy({"held": [Counter()]})


def test_lasting_tensors_and_tensors_of_users_can_be_written() -> None:
    with torch.inference_mode():
        theirs = torch.zeros(2)
        with lasting():
            ours = torch.zeros(2)
            part = ours.view(torch.int32)
    assert theirs.is_inference() and not ours.is_inference() and not part.is_inference()
    write_anyway(theirs, ours + 1)
    write_anyway(ours, theirs)
    part.zero_()
    assert theirs.tolist() == [1, 1] and ours.tolist() == [0, 0]
