"""Collectives counted in small programs, really compiled for eight CPU devices, and in lines that other compilers write."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dream_jax import sharding
from dream_jax.plan import hlo

LAYERS, SIZE = 6, 64


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh("8x1")


def compiled(mesh, function, *arguments):
    """The program's text; each argument is a shape and its axes."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, axes in arguments
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes).compile().as_text()


def whole(x):
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def by_kind(text, **options):
    return {one.kind: one for one in hlo.collectives(text, **options)}


def test_collective_in_a_scan_counts_once_a_round(mesh):
    def function(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ whole(w)), None

        return jax.lax.scan(layer, x, weights)[0]

    text = compiled(mesh, function, ((8, SIZE), ("fsdp",)), ((LAYERS, SIZE, SIZE), (None, "fsdp")))
    found = by_kind(text)
    assert set(found) == {"all-gather"}
    assert found["all-gather"].count == LAYERS
    assert found["all-gather"].sent == LAYERS * SIZE * SIZE * 4 * 7 / 8


def test_loops_in_loops_multiply(mesh):
    def function(x, weights):
        def inner(x, w):
            return jnp.tanh(x @ whole(w)), None

        return jax.lax.scan(lambda x, some: (jax.lax.scan(inner, x, some)[0], None), x, weights)[0]

    text = compiled(mesh, function, ((8, SIZE), ()), ((3, 5, SIZE, SIZE), (None, None, "fsdp")))
    assert by_kind(text)["all-gather"].count == 15


def test_loop_that_depends_on_data_counts_as_often_as_the_caller_says(mesh):
    def function(x, weights, rounds):
        def body(number, x):
            return jnp.tanh(x @ whole(jax.lax.dynamic_index_in_dim(weights, number % LAYERS, keepdims=False)))

        return jax.lax.fori_loop(0, jnp.sum(rounds).astype(jnp.int32), body, x)

    text = compiled(mesh, function, ((8, SIZE), ()), ((LAYERS, SIZE, SIZE), (None, "fsdp")), ((1,), ()))
    once, often = (by_kind(text, unknown_trips=trips)["all-gather"] for trips in (1, 7))
    assert (once.count, often.count) == (1, 7)
    assert often.sent == 7 * once.sent


def test_sums_and_permutations(mesh):
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=(PartitionSpec(), PartitionSpec("fsdp"))
    )
    def function(x):
        return jax.lax.psum(x, "fsdp"), jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])

    found = by_kind(compiled(mesh, function, ((8, SIZE), ("fsdp",))))
    assert found["all-reduce"].sent == 2 * SIZE * 4 * 7 / 8
    assert found["collective-permute"].sent == SIZE * 4
    assert {one.count for one in found.values()} == {1}


def test_scattered_sum_and_exchange(mesh):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(None, "fsdp"), out_specs=PartitionSpec("fsdp"))
    def function(x):
        summed = jax.lax.psum_scatter(x, "fsdp", tiled=True)
        return summed + jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)[:1, :1]

    found = by_kind(compiled(mesh, function, ((8, 8 * SIZE), (None, "fsdp"))))
    assert found["reduce-scatter"].sent == 8 * SIZE * 4 * 7 / 8
    assert found["all-to-all"].sent == 8 * SIZE * 4 * 7 / 8


def test_most_bytes_come_first_and_nothing_is_found_in_nothing(mesh):
    assert hlo.collectives(compiled(mesh, jnp.sin, ((8,), ()))) == ()
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.collectives("HloModule empty")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[448,152064]{1,0:T(8,128)}", 4 * 448 * 152064),
        ("bf16[28,128,1,448]{1,3,2,0:T(8,128)(2,1)S(1)}", 2 * 28 * 128 * 448),
        ("(s32[]{:T(128)}, pred[3,5], /*index=2*/u8[4])", 4 + 15 + 4),
        ("token[]", 0),
        ("s4[10]", 5),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.nbytes(shape) == size


# What only the compilers of GPUs and TPUs write, cut down to what counts; test_plan.py compiles real steps with libtpu.
PROGRAM = """
HloModule step, is_scheduled=true

%all-reduce-scatter (input: f32[64,32]) -> f32[8,32] {{
  %input = f32[64,32]{{1,0}} parameter(0)
  %all-reduce.1 = f32[64,32]{{1,0}} all-reduce(%input), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
  ROOT %slice = f32[8,32]{{1,0}} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={{8,32}}
}}

%async (p: f32[64]) -> f32[8] {{
  %p = f32[64]{{0}} parameter(0)
  ROOT %reduce-scatter.1 = f32[8]{{0}} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={{0}}, to_apply=%add
}}

%begins (q: f32[8]) -> f32[16] {{
  %q = f32[8]{{0}} parameter(0)
  ROOT %all-gather.1 = f32[16]{{0}} all-gather(%q), channel_id=5, replica_groups={groups}, dimensions={{0}}
}}

%async_collective_fusion.1 (r: f32[8]) -> f32[16] {{
  %r = f32[8]{{0}} parameter(0)
  ROOT %all-gather.2 = f32[16]{{0}} all-gather(%r), channel_id=5, replica_groups={groups}, dimensions={{0}}
}}

%condition (carried: (u32[], f32[4])) -> pred[] {{
  %limit = u32[] constant(7)
  %carried.1 = (u32[], f32[4]{{0}}) parameter(0)
  %counter = u32[] get-tuple-element(%carried.1), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}}

%body (carried: (u32[], f32[4])) -> (u32[], f32[4]) {{
  %carried.2 = (u32[], f32[4]{{0}}) parameter(0)
  %counter.1 = u32[] get-tuple-element(%carried.2), index=0
  %part = f32[4]{{0}} get-tuple-element(%carried.2), index=1
  %kernel = f32[4]{{0}} custom-call(%part), custom_call_target="tpu", backend_config={{"text":"spans lines
}}}}"}}
  %send = (f32[4]{{0}}, f32[4]{{0}}, u32[]) collective-permute-start(%kernel), source_target_pairs={{{{0,1}},{{1,0}}}}
  %sent = f32[4]{{0}} collective-permute-done(%send)
  %one = u32[] constant(1)
  %next = u32[] add(%counter.1, %one)
  %after = u32[] add(%one, %next)
  ROOT %out = (u32[], f32[4]{{0}}) tuple(%after, %sent)
}}

ENTRY %main (a: f32[64,32], b: f32[64], c: f32[4]) -> f32[8,32] {{
  %a = f32[64,32]{{1,0}} parameter(0)
  %b = f32[64]{{0}} parameter(1)
  %c = f32[4]{{0}} parameter(2)
  %scattered = f32[8,32]{{1,0}} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %start = ((f32[64]{{0}}), f32[8]{{0}}) async-start(%b), calls=%async
  %done = f32[8]{{0}} async-done(%start), calls=%async
  %gather = (f32[8]{{0}}, f32[16]{{0}}) all-gather-start(%done), replica_groups={groups}, dimensions={{0}}
  %gathered = f32[16]{{0}} all-gather-done(%gather)
  %pair = ((f32[8]{{0}}, f32[2]{{0}}), (f32[16]{{0}}, f32[4]{{0}})) all-gather-start(%done, %c), replica_groups={groups}
  %spread = f32[16]{{0}} fusion(%done), kind=kCustom, calls=%begins
  %meanwhile = f32[16]{{0}} fusion(%spread), kind=kOutput, calls=%async_collective_fusion.1
  %zero.1 = u32[] constant(0)
  %begin = (u32[], f32[4]{{0}}) tuple(%zero.1, %c)
  %loop = (u32[], f32[4]{{0}}) while(%begin), condition=%condition, body=%body
  ROOT %copy = f32[8,32]{{1,0}} copy(%scattered)
}}
"""


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1},{2,3},{4,5},{6,7}}",
        "[4,2]<=[8]",
        "mesh['x'=4,'y'=2] {'y'}",
        "mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}",
        "mesh['x'=8] {'x':(4)2}",
    ],
)
def test_what_accelerators_write(groups):
    found = by_kind(PROGRAM.format(groups=groups))
    # A fusion that is a scattered sum, and an asynchronous one whose two halves are one.
    assert found["reduce-scatter"].count == 2
    assert found["reduce-scatter"].sent == (64 * 32 + 64) * 4 * 7 / 8
    # Of a start only what comes out counts, be it one array or several; one that two fusions share is one.
    assert found["all-gather"].count == 3
    assert found["all-gather"].sent == (16 + 16 + 4 + 16) * 4 / 2
    # 0, 2, 4, 6: four rounds of a loop that the compiler has unrolled once, read from its condition and its body.
    assert found["collective-permute"].count == 4
    assert found["collective-permute"].sent == 4 * 4 * 4
    assert "all-reduce" not in found


def test_unknown_groups_raise():
    with pytest.raises(ValueError, match="unknown form"):
        hlo.collectives(PROGRAM.format(groups="something"))


def test_a_branch_counts_however_its_conditional_names_it():
    """XLA writes `branch_computations={...}`, or for a predicate `true_computation=` and `false_computation=`."""
    program = """
%yes (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  ROOT %sum = f32[64]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
}

%no (y: f32[64]) -> f32[64] {
  ROOT %y = f32[64]{0} parameter(0)
}

ENTRY %main (p: pred[], z: f32[64]) -> f32[64] {
  %p = pred[] parameter(0)
  %z = f32[64]{0} parameter(1)
  ROOT %either = f32[64]{0} conditional(%p, %z, %z), BRANCHES
}
"""
    for branches in ("true_computation=%yes, false_computation=%no", "branch_computations={%no, %yes}"):
        assert by_kind(program.replace("BRANCHES", branches))["all-reduce"].count == 1
