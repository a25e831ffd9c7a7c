"""The bar on stderr: stages may come back, and where there are many, those that are done do not pile up."""

from __future__ import annotations

import pytest

from onnxsnp.console import progress_bar


@pytest.mark.parametrize(("keep", "shown"), [(True, ["one", "two"]), (False, ["one"])])
def test_a_stage_that_comes_back_is_taken_up_again(keep: bool, shown: list[str]) -> None:
    bar = progress_bar(keep=keep)
    with bar as update:
        for stage in ("one", "two", "one"):
            update(stage, 0, 0)
            update(stage, 1, 2)
        assert [task.description for task in bar._bar.tasks] == shown
        assert bar._bar.tasks[0].completed == 1
