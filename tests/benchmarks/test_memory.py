"""The memory command tells what recomputing saves."""

from scripts.benchmarks.memory import STYLES, memory


def test_the_table_has_a_row_for_each_way(capsys):
    memory(patch_size=(32, 32, 16), batch_size=1, repeats=1, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(STYLES)
    assert "1 x [32, 32, 16], cpu" in lines[0]
    assert all(line.endswith(" s") and "GiB" in line for line in lines[2:])
    memory(size="L", device="meta")
    assert "['block', 'block', None, None, None]" in capsys.readouterr().out
