"""Counts of collectives by `experiments/scaling`, against a program counted by hand."""

import runpy

HLO = """
  %all-gather.1 = f32[32,96]{0,1} all-gather(%wrapped_copy), channel_id=5, dimensions={1}
  %all-reduce.7 = (f32[], bf16[2,32]{1,0}, /*index=2*/s32[3]{0}) all-reduce(%a, %b, %c)
  ROOT %all-reduce.8 = f32[16]{0} all-reduce(%d), channel_id=2
  %get-tuple-element.3 = f32[] get-tuple-element(%all-reduce.7), index=0
  %fusion = f32[99]{0} fusion(%all-gather.1), calls=%computation
"""


def test_bytes_of_collectives_are_those_of_their_results():
    collectives = runpy.run_path("experiments/scaling/collectives.py")["collectives"]
    assert collectives(HLO) == {
        "all-gather": {"count": 1, "bytes": 4 * 32 * 96},
        "all-reduce": {"count": 2, "bytes": 4 + 2 * 2 * 32 + 4 * 3 + 4 * 16},
    }
    assert collectives("") == {}
