"""The serving benchmark's arguments."""

import argparse

import pytest
from metrics import Slo
from serving import jobs_of, slo_of


def test_goodput_takes_vllms_form():
    assert slo_of(["ttft:500", "tpot:100"]) == Slo(ttft_s=0.5, tpot_s=0.1)
    assert slo_of(["e2el:2500"]) == Slo(e2e_s=2.5)
    assert slo_of([]) is None


@pytest.mark.parametrize("promise", ["ttft", "ttft:soon", "speed:100"])
def test_anything_else_is_refused(promise):
    with pytest.raises(SystemExit, match=promise):
        slo_of([promise])


def test_jobs_draw_their_lengths_from_those_given():
    args = argparse.Namespace(num_prompts=40, input_len=[3, 9], output_len=[5], vocab_size=500)
    jobs = jobs_of(args, 1)
    assert {len(job.prompt) for job in jobs} == {3, 9}
    assert {job.output_len for job in jobs} == {5}
    assert len({job.prompt for job in jobs}) == 40
    assert jobs_of(args, 1) == jobs
    assert jobs_of(args, 2) != jobs
