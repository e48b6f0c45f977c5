"""docs/cli.md names every key with its flag, and no other."""

import re
from pathlib import Path

from fastmtl.cli.keys import FLAGS, KEYS

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def test_the_table_of_keys_is_complete():
    rows = re.findall(r"^\| `((?:data|model|train)\.[a-z_]+)` \| (?:`(--[a-z-]+)`)?", TEXT, flags=re.M)
    assert [name for name, _ in rows] == [key.name for key in KEYS]
    assert {flag: name for name, flag in rows if flag} == {flag: key.name for flag, key in FLAGS.items()}
