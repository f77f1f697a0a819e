"""The memory command measures what recomputing saves."""

from scripts.memory import STYLES, measure, memory

SMALL = {"model_id": "S", "kernel_size": 3, "num_input_channels": 1, "num_classes": 3}


def test_recomputing_more_keeps_less():
    kept = [measure(style, (32, 32, 32), 1, "cpu", 1, **SMALL)[0] for style in (None, "expansion", "block")]
    assert kept[0] > 2 * kept[1] > 4 * kept[2]
    assert (
        kept[2] >= 32**3 * 32 * 4 * 4
    )  # four inputs of full-resolution blocks, 32 channels of float32, stay in any case


def test_what_is_kept_grows_with_the_batch_since_parameters_are_not_counted():
    one, two = (measure(None, (32, 16, 16), batch, "cpu", 1, **SMALL)[0] for batch in (1, 2))
    assert two == 2 * one


def test_the_table_has_a_row_for_each_way(capsys):
    memory(patch_size=(32, 32, 16), batch_size=1, repeats=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(STYLES)
    assert "1 x [32, 32, 16], cpu" in lines[0]
    assert all(line.endswith(" s") and "GiB" in line for line in lines[2:])
