"""How a LLaVA's own data code is told where samples lie."""

from dataclasses import make_dataclass
from typing import List, Optional  # noqa: UP035, as LLaVAs spell them

import pytest

from llava_mixlora.inference.samples import takes_several_files


@pytest.mark.parametrize(
    "kind, several",
    [(str, False), (Optional[str], False), (Optional[List[str]], True), (list[str], True)],  # noqa: UP006, UP045
)
def test_several_files_are_given_where_the_flag_is_a_list(kind, several):
    assert takes_several_files(make_dataclass("DataArguments", [("data_path", kind)])) == several
