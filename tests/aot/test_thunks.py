import pytest

from lamina_jax.aot.thunks import Thunk, num_graphs, outside_graphs, parse_thunks

DUMP = """
000: kCommandBuffer [source       | next=003 (1)]
    001: kCustomKernel [source       | next=002 (1)] loop_add_fusion grid: [1, 1, 1] threads: [8, 1, 1]
    002: kCustomCall   [prev=001 (1) | sink        ] kCustomCall
003: kAllReduce     [prev=000 (1) | next=000 (1)] kAllReduce
000: kCommandBuffer [prev=003 (1) | sink        ]
    004: kCopy         [source       | sink        ] kCopy
"""


def test_what_a_command_buffer_records_is_told_from_the_rest():
    assert parse_thunks(DUMP) == [
        Thunk(kind="kCustomKernel", label="loop_add_fusion", in_graph=True),
        Thunk(kind="kCustomCall", label="kCustomCall", in_graph=True),
        Thunk(kind="kAllReduce", label="kAllReduce", in_graph=False),
        Thunk(kind="kCopy", label="kCopy", in_graph=True),
    ]
    assert num_graphs(DUMP) == 2
    assert [t.kind for t in outside_graphs(parse_thunks(DUMP))] == ["kAllReduce"]


def test_an_unknown_format_is_an_error():
    with pytest.raises(ValueError, match="expected a line like"):
        parse_thunks("thunk 1: copy")
