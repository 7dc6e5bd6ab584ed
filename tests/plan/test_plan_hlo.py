"""Reading HLO: loops, memory spaces, collectives as TPU writes them, and the work of single instructions."""

import pytest

from jax_diffusion.plan import collectives, hlo, work

# ruff: noqa: E501
# A loop of 12 turns, its bound a constant in the condition; in it a loop whose bound comes in through the tuple, from 3
# to 8; a gather spread over a chain of fusions, one channel; a reduce-scatter as TPU has it.
LOOPS = """HloModule jit_f, is_scheduled=true, num_partitions=4

%inner_condition (p.1: (s32[], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

%inner_body (p.2: (s32[], s32[])) -> (s32[], s32[]) {
  %p.2 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %a.2 = f32[8,128]{1,0:T(8,128)S(1)} broadcast(%i.2), dimensions={}, backend_config={"estimated_cycles":"7"}
  ROOT %t.2 = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%i.2, %i.2)
}

%start (p.3: bf16[16,128]) -> (bf16[16,128], bf16[64,128], s32[2]) {
  %p.3 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g.3 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c.3 = (bf16[16,128]{1,0}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}) custom-call(%g.3), custom_call_target="AsyncCollectiveStart"
}

%step (p.4: bf16[16,128]) -> bf16[64,128] {
  %p.4 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.4 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.4), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter.1 (p.5: f32[64,128]) -> f32[32,128] {
  %p.5 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %r.5 = f32[64,128]{1,0:T(8,128)} all-reduce(%p.5), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, to_apply=%add
  ROOT %s.5 = f32[32,128]{1,0:T(8,128)} dynamic-slice(%r.5), dynamic_slice_sizes={32,128}
}

%condition (p.6: (s32[], f32[4])) -> pred[] {
  %p.6 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i.6 = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  %n.6 = s32[]{:T(128)} constant(12)
  ROOT %lt.6 = pred[]{:T(512)} compare(%i.6, %n.6), direction=LT
}

%body (p.7: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.7 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %w.7 = bf16[16,128]{1,0:T(8,128)(2,1)} broadcast(%p.7), dimensions={}, backend_config={"estimated_cycles":"100"}
  %async.7 = (bf16[16,128]{1,0}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}) fusion(%w.7), kind=kCustom, calls=%start
  %more.7 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w.7), kind=kCustom, calls=%step
  %three.7 = s32[]{:T(128)} constant(3)
  %eight.7 = s32[]{:T(128)} constant(8)
  %copied.7 = s32[]{:T(128)} copy(%eight.7)
  %pair.7 = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%three.7, %copied.7)
  %loop.7 = (s32[]{:T(128)}, s32[]{:T(128)}) while(%pair.7), condition=%inner_condition, body=%inner_body
  ROOT %t.7 = (s32[]{:T(128)}, f32[4]{0}) tuple(%three.7, %p.7)
}

ENTRY %main (x: f32[64,128]) -> f32[32,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start_at = (s32[]{:T(128)}, f32[4]{0}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[4]{0}) while(%start_at), condition=%condition, body=%body
  ROOT %out = f32[32,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"flag_configs":[],"estimated_cycles":"1000"}
}
"""


def test_loops_count_as_often_as_they_run():
    times = hlo.executions(LOOPS)
    assert times["main"] == 1 and times["body"] == 12 and times["condition"] == 13
    assert times["inner_body"] == 12 * 5 and times["inner_condition"] == 12 * 6
    assert hlo.cycles(LOOPS) == 1000 + 12 * (100 + 5 * 7)


def test_a_chain_of_fusions_is_one_gather_and_a_reduce_scatter_is_no_all_reduce():
    found = collectives.collectives(LOOPS)
    assert set(found) == {"all-gather", "reduce-scatter"}
    whole = 64 * 128 * 2
    assert found["all-gather"] == (12, 12 * whole, 12 * whole * 3 / 4)
    assert found["reduce-scatter"] == (1, 64 * 128 * 4, 64 * 128 * 4 / 2)  # the group is one axis of two devices


def test_what_the_compiler_says_of_a_loop_comes_first():
    text = LOOPS.replace("condition=%condition, body=%body", "condition=%condition, body=%body, backend_config="
                         '{"known_trip_count":{"n":"4"}}')  # fmt: skip
    assert hlo.executions(text)["body"] == 4


def test_a_loop_whose_bound_nobody_knows_counts_once():
    text = LOOPS.replace("%n.6 = s32[]{:T(128)} constant(12)", "%n.6 = s32[]{:T(128)} add(%i.6, %i.6)")
    assert hlo.executions(text)["body"] == 1


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'b','c'}, dimensions={3}", 8),
        ("replica_groups={}, channel_id=3", 16),
    ],
)
def test_group_sizes(groups, size):
    assert collectives.group_size(f", channel_id=1, {groups}", 16) == size


def entry(*lines: str) -> str:
    return "HloModule m, num_partitions=1\n\nENTRY %main (x: f32[]) -> f32[] {\n  " + "\n  ".join(lines) + "\n}\n"


def test_flops_of_a_product():
    text = entry(
        "%a = bf16[5,8,16]{2,1,0} parameter(0)",
        "%b = bf16[5,16,32]{2,1,0} parameter(1)",
        "ROOT %d = f32[5,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
        "rhs_contracting_dims={1}",
    )
    assert work.flops(text) == 2 * 5 * 8 * 32 * 16


@pytest.mark.parametrize(
    "window, out, products",
    [
        ("size=3 pad=1_1", 8, 3 * 8 - 2),  # the padding is not counted
        ("size=3", 6, 18),
        ("size=3 stride=2 pad=0_1", 4, 11),
        ("size=3 pad=2_2 lhs_dilate=2", 17, 3 * 8),  # holes neither: every input meets the whole kernel
    ],
)
def test_flops_of_a_convolution(window, out, products):
    text = entry(
        "%a = bf16[2,8,4]{2,1,0} parameter(0)",
        "%k = bf16[3,4,6]{2,1,0} parameter(1)",
        f"ROOT %c = bf16[2,{out},6]{{2,1,0}} convolution(%a, %k), window={{{window}}}, dim_labels=b0f_0io->b0f",
    )
    assert work.flops(text) == 2 * products * 2 * 4 * 6


def test_flops_of_cudnn_and_cublas():
    text = entry(
        "%a = bf16[2,8,8,4]{3,2,1,0} parameter(0)",
        "%k = bf16[6,3,3,4]{3,2,1,0} parameter(1)",
        "%c = (bf16[2,8,8,6]{3,2,1,0}, u8[0]{0}) custom-call(%a, %k), window={size=3x3 pad=1_1x1_1}, "
        'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"',
        "%m = bf16[64,16]{1,0} parameter(2)",
        "%n = bf16[16,32]{1,0} parameter(3)",
        'ROOT %g = (bf16[64,32]{1,0}, s8[1024]{0}) custom-call(%m, %n), custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
    )
    assert work.flops(text) == 2 * (2 * 8 * 8 * 6) * 9 * 4 + 2 * 64 * 32 * 16


def test_flops_of_cudnn_attention():
    """Forward q k^T and its product with v; backward the scores again and four gradients."""
    config = 'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["2", "4", "16", "32"]}}}'
    text = entry(
        "%q = bf16[2,16,4,8]{3,2,1,0} parameter(0)",
        "%k = bf16[2,32,4,8]{3,2,1,0} parameter(1)",
        f'%f = (bf16[2,16,4,8]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", {config}',
        "ROOT %b = (bf16[2,16,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), "
        f'custom_call_target="__cudnn$fmhaSoftmaxBackward", {config}',
    )
    assert work.flops(text) == (2 + 5) * 2 * (2 * 4 * 16 * 32) * 8


def test_flops_of_splash_attention():
    """Forward two products, of q three with the scores again, of k and v four. Its metadata is lines of text, the last
    of which starts like the end of a computation."""

    def call(name, result):
        return (
            f'%{name} = ({result}) custom-call(%i, %q, %k, %k), custom_call_target="tpu_custom_call", '
            'frontend_attributes={kernel_metadata={\n}}, metadata={op_name="jit(step)/attention"}'
        )

    text = entry(
        "%i = s8[1,1,1]{2,1,0} parameter(0)",
        "%q = bf16[2,4,16,8]{3,2,1,0} parameter(1)",
        "%k = bf16[2,4,32,8]{3,2,1,0} parameter(2)",
        call("splash_mha_fwd_residuals.1", "f32[16,128]{1,0}, bf16[2,4,16,8]{3,2,1,0}"),
        call("splash_mha_dq_no_residuals.2", "bf16[2,4,16,8]{3,2,1,0}"),
        call("splash_mha_dkv_no_residuals.3", "bf16[2,4,32,8]{3,2,1,0}, bf16[2,4,32,8]{3,2,1,0}"),
        call("another_kernel.4", "bf16[2,4,16,8]{3,2,1,0}"),
        "%m = bf16[64,16]{1,0} parameter(3)",
        "ROOT %d = bf16[64,64]{1,0} dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
    )
    assert work.flops(text) == (2 + 3 + 4) * 2 * (2 * 4 * 16 * 32) * 8 + 2 * 64 * 64 * 16


def test_traffic_is_of_the_large_memory_alone():
    text = entry(
        "%a = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%b = f32[8,128]{1,0:T(8,128)S(1)} negate(%a)",
        "%c = f32[8,128]{1,0:T(8,128)S(1)} negate(%b)",
        "ROOT %d = f32[8,128]{1,0:T(8,128)} add(%b, %c)",
    )
    assert work.traffic(text) == 2 * 8 * 128 * 4


STACK = """HloModule m, num_partitions=1

%layer (p.0: f32[28,64], p.1: s32[]) -> f32[1,64] {
  %p.0 = f32[28,64]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %s = f32[1,64]{1,0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,64}
  ROOT %n = f32[1,64]{1,0} negate(%s)
}

%store (p.2: f32[28,64], p.3: f32[1,64], p.4: s32[]) -> f32[28,64] {
  %p.2 = f32[28,64]{1,0} parameter(0)
  %p.3 = f32[1,64]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %u = f32[28,64]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4)
}

ENTRY %main (w: f32[28,64], i: s32[]) -> f32[28,64] {
  %w = f32[28,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,64]{1,0} fusion(%w, %i), kind=kLoop, calls=%layer
  ROOT %y = f32[28,64]{1,0} fusion(%w, %x, %i), kind=kLoop, calls=%store
}
"""


def test_of_a_stack_that_is_sliced_or_updated_the_slice_is_moved():
    """64 read, 64 written, then 64 read and 64 written; four bytes each, and the two indices."""
    assert work.traffic(STACK) == 4 * 64 * 4 + 2 * 4


def test_serial_time_is_the_slower_of_both_for_each_instruction():
    text = entry(
        "%a = f32[8,128]{1,0} parameter(0)",
        "%b = f32[128,8]{1,0} parameter(1)",
        "%d = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "ROOT %e = f32[8,8]{1,0} negate(%d)",
    )
    product, moved = 2 * 8 * 8 * 128, 2 * 8 * 8 * 4
    assert work.serial_seconds(text, peak=1.0, bandwidth=1.0) == product + moved
