"""Memory, spills and communication: what makes the check fail, and what its tables say."""

import dataclasses

from lamina_jax.aot.compiler import Memory
from lamina_jax.aot.fit import Fit, fit_attention_worker, fit_model_worker
from lamina_jax.aot.hlo import Traffic, collectives, copies
from lamina_jax.aot.report import Entry, human, problems, program_row, table
from lamina_jax.aot.resources import KernelResources

GB = 10**9


def test_a_model_worker_holds_all_weights_and_works_in_what_its_largest_slice_takes():
    small = Memory(arguments=3 * GB, outputs=GB, aliased=0, temporaries=GB)
    large = Memory(arguments=2 * GB, outputs=GB, aliased=0, temporaries=6 * GB)
    fit = fit_model_worker(weights=70 * GB, programs=[(small, 2 * GB), (large, GB)], in_flight=GB, capacity=84 * GB)
    # The large slice: one GB of inputs besides its weights, its output and its temporaries.
    assert (fit.held, fit.working) == (70 * GB, 8 * GB)
    assert fit.free == 84 * GB - 70 * GB - 8 * GB - GB - fit.reserve
    assert fit.fits
    assert not dataclasses.replace(fit, capacity=fit.needed - 1).fits


def test_a_cache_in_place_counts_once_and_a_copied_one_twice():
    in_place = Memory(arguments=72 * GB, outputs=72 * GB, aliased=72 * GB, temporaries=GB)
    copied = dataclasses.replace(in_place, aliased=0)
    fits = [fit_attention_worker(cache=72 * GB, memory=m, capacity=84 * GB) for m in (in_place, copied)]
    assert [fit.working for fit in fits] == [GB, 73 * GB]
    assert [fit.fits for fit in fits] == [True, False]


HLO = """
HloModule m, is_scheduled=true

%body (p: f32[4]) -> f32[4] {
  %ar = bf16[256,8192]{1,0} all-reduce(%x), replica_groups={{0,1}}
  ROOT %c = f32[4]{0} copy(%p)
}

ENTRY %main () -> () {
  %s = (f32[8,4]{1,0}, f32[8,8]{1,0}) all-gather-start(%l), dimensions={1}
  %d = f32[8,8]{1,0} all-gather-done(%s)
  %again = f32[2]{0} all-reduce(%y)
}
"""


def test_communication_and_copies_are_counted():
    assert collectives(HLO) == {
        "all-reduce": Traffic(count=2, nbytes=256 * 8192 * 2 + 8),
        "all-gather": Traffic(count=1, nbytes=256),
    }
    assert copies(HLO) == Traffic(count=1, nbytes=16)


def entry(spill_bytes: int) -> Entry:
    kernel = KernelResources(name="attend", registers=255, spill_bytes=spill_bytes, stack_bytes=0, shared_bytes=0)
    return Entry(
        program="attention",
        target="h20",
        memory=Memory(arguments=81 * GB, outputs=81 * GB, aliased=81 * GB, temporaries=GB),
        kernels=(kernel,),
        collectives=collectives(HLO),
        copies=copies(HLO),
        num_launches=5,
        num_outside=2,
        num_graphs=1,
    )


def test_spills_and_misfits_are_problems():
    fit = Fit(worker="model worker", held=70 * GB, working=GB, in_flight=0, capacity=72 * GB, reserve=2 * GB)
    assert problems([entry(0)], [("h20", dataclasses.replace(fit, capacity=73 * GB))]) == []
    assert problems([entry(16)], [("h20", fit)]) == [
        "attention on h20: kernel attend spills 16 bytes per thread",
        "model worker on h20: needs 73.00 GB of 72.00 GB, 1.00 GB too much",
    ]


def test_rows_are_what_was_found():
    row = program_row(entry(0))
    assert row[5:] == (
        "1",
        "255",
        "0 B",
        "1 all-gather 256 B, 2 all-reduce 4.19 MB",
        "1 16 B",
        "5",
        "1 with 3 launches",
    )
    assert table(("a", "bb"), [("ccc", "d")]) == "| a   | bb |\n|-----|----|\n| ccc | d  |"
    assert [human(n) for n in (12, 1500, 70_550_000_000)] == ["12 B", "1.50 KB", "70.55 GB"]
